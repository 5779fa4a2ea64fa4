"""`rlhf bench --array DIR`: write the jobs as commands for an external scheduler."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.common.yaml_text import dump_yaml
from rlhf.studies.bench.plan import Bench
from rlhf.studies.jobs import Job

_SLURM_TEMPLATE = """\
#!/bin/sh
#SBATCH --job-name={name}
#SBATCH --array=1-{count}
#SBATCH --cpus-per-task=1
#SBATCH --output={logs}/%x-%a.log
eval "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {commands})"
"""

_SUBMIT_TEMPLATE = """\
#!/bin/sh
# First, the initial models are prepared. Then the training runs start from them. Then the table of
# results is written.
set -e
first=$(sbatch --parsable {start})
second=$(sbatch --parsable --dependency=afterok:$first {train})
sbatch --dependency=afterok:$second --job-name=bench-table --wrap {table}
"""


def write_job_array(bench: Bench, folder: str | Path) -> list[Path]:
    """Write the manifest, lists of commands and SLURM scripts; return the paths of the files.

    `start.txt` and `train.txt` contain one command per line. The commands in `train.txt` need the
    results of those in `start.txt`. Other schedulers can be used too, for example
    `xargs -P 8 -I{} sh -c {} < start.txt`.
    """
    target = Path(folder).resolve()
    target.mkdir(parents=True, exist_ok=True)
    manifest = target / "manifest.yaml"
    tree = asdict(bench.config) | {"output_dir": str(bench.root.resolve())}
    tree = {key: value for key, value in tree.items() if key not in ("resume", "overwrite")}
    manifest.write_text(dump_yaml(tree), encoding="utf-8")
    jobs = bench.jobs()
    lists = {
        "start": [job for job in jobs if job.after is None],
        "train": [job for job in jobs if job.after is not None],
    }
    written = [manifest]
    for name, listed in lists.items():
        written += _write_list(target, name, listed, manifest)
    table = shlex.quote(f"rlhf bench {shlex.quote(str(manifest))} --resume")
    scripts = {name: shlex.quote(str(target / f"{name}.slurm")) for name in lists}
    submit = target / "submit.sh"
    submit.write_text(_SUBMIT_TEMPLATE.format(**scripts, table=table), encoding="utf-8")
    return [*written, submit]


def _write_list(folder: Path, name: str, jobs: Sequence[Job], manifest: Path) -> list[Path]:
    """Write `<name>.txt` with the commands of jobs, and `<name>.slurm`; return both paths."""
    commands, script = folder / f"{name}.txt", folder / f"{name}.slurm"
    quoted = shlex.quote(str(manifest))
    lines = [f"rlhf bench {quoted} --only {shlex.quote(job.key)}\n" for job in jobs]
    commands.write_text("".join(lines), encoding="utf-8")
    text = _SLURM_TEMPLATE.format(
        name=f"bench-{name}",
        count=len(jobs),
        logs=shlex.quote(str(folder)),
        commands=shlex.quote(str(commands)),
    )
    script.write_text(text, encoding="utf-8")
    return [commands, script]
