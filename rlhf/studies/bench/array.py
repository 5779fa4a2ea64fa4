"""`rlhf bench --array DIR`: write the jobs as commands for an external scheduler."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.common.files import write_text
from rlhf.common.yaml_text import dump_yaml
from rlhf.errors import UserError
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
# First, the initial models are prepared, and the policies that are not trained are evaluated. Then
# the training runs start from the initial models. Then the table of results is written.
set -e
first=$(sbatch --parsable {start})
second=$(sbatch --parsable --dependency=afterok:$first {train})
sbatch --dependency=afterok:$second --job-name=bench-table --wrap {table}
"""


def write_job_array(bench: Bench, folder: str | Path) -> list[Path]:
    """Write the manifest, lists of commands and Slurm scripts; return the paths of the files.

    `start.txt` and `train.txt` contain one command per line. The commands in `train.txt` need the
    results of those in `start.txt`. Other schedulers can be used too, for example
    `xargs -P 8 -I{} sh -c {} < start.txt`.

    Raises:
        UserError: One of the files exists with other content.
    """
    target = Path(folder).resolve()
    manifest = target / "manifest.yaml"
    tree = asdict(bench.config) | {"output_dir": str(bench.root.resolve())}
    tree = {key: value for key, value in tree.items() if key not in ("resume", "overwrite")}
    texts = {manifest: dump_yaml(tree)}
    jobs = bench.jobs()
    lists = {
        "start": [job for job in jobs if job.after is None],
        "train": [job for job in jobs if job.after is not None],
    }
    for name, listed in lists.items():
        texts |= _job_list_and_slurm_script_texts(target, name, listed, manifest)
    table = shlex.quote(f"rlhf bench {shlex.quote(str(manifest))} --resume")
    scripts = {name: shlex.quote(str(target / f"{name}.slurm")) for name in lists}
    texts[target / "submit.sh"] = _SUBMIT_TEMPLATE.format(**scripts, table=table)
    _check_no_file_would_change(texts)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _check_no_file_would_change(texts: Mapping[Path, str]) -> None:
    """Check that no file exists with other content, such as the user's own manifest.

    Raises:
        UserError: A file exists with other content.
    """
    for path, text in texts.items():
        if path.is_dir() or (path.is_file() and path.read_bytes() != text.encode()):
            raise UserError(
                f"array: {path} exists with other content: remove it, or choose another folder"
            )


def _job_list_and_slurm_script_texts(
    folder: Path, name: str, jobs: Sequence[Job], manifest: Path
) -> dict[Path, str]:
    """Return the texts of `<name>.txt` with the commands of jobs, and of `<name>.slurm`."""
    commands, script = folder / f"{name}.txt", folder / f"{name}.slurm"
    quoted = shlex.quote(str(manifest))
    lines = [f"rlhf bench {quoted} --only {shlex.quote(job.key)}\n" for job in jobs]
    text = _SLURM_TEMPLATE.format(
        name=f"bench-{name}",
        count=len(jobs),
        logs=shlex.quote(str(folder)),
        commands=shlex.quote(str(commands)),
    )
    return {commands: "".join(lines), script: text}
