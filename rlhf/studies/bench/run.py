"""`rlhf bench`: environments x algorithms x training seeds, and a table that can be trusted.

    rlhf bench MANIFEST.yaml [--jobs 2] [--resume]     do what is left, then write the result
    rlhf bench MANIFEST.yaml --against bench.json      exit code 1 if anything got worse
    rlhf bench MANIFEST.yaml --array DIR               write the commands for another engine
    rlhf bench MANIFEST.yaml --only menu/seed0/ppo     do one job in this process

--config FILE and --key value override the manifest, as everywhere.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.common.names import nearest
from rlhf.errors import UserError
from rlhf.studies.bench.gate import common_seeds, gate, read_result
from rlhf.studies.bench.jobs import Workers, do, open_study
from rlhf.studies.bench.plan import Bench
from rlhf.studies.bench.report import write_bench
from rlhf.studies.bench.scores import find, read_scores

log = logging.getLogger(__name__)

MANIFEST = "bench.yaml"


def run_bench(bench: Bench, *, jobs: int = 1) -> Path:
    """Do every job that is not done yet, then write the result; returns its page.

    Args:
        bench: the checked manifest.
        jobs: processes.

    Raises:
        UserError: the directory exists, or some runs were refused; the others are kept.
    """
    check_environments(bench)
    open_study(bench.root, MANIFEST, bench.config, bench.jobs())
    with Workers(jobs, logs=bench.root / "logs") as workers:
        failed = workers.do_all(bench.jobs(), bench.root.name)
    if failed:
        key, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{key}: {reason}{more}; the other runs are kept, continue with --resume")
    scores = read_scores(bench)
    return write_bench(bench, scores, find(scores, baseline=bench.baseline))


def run_and_judge(bench: Bench, *, jobs: int = 1, against: str | None = None) -> int:
    """`run_bench`, and the exit code: 1 when something is worse than the result ``against``."""
    before = None if against is None else read_result(against)
    if before is not None:
        common_seeds(bench.config.seeds, before)
    print(run_bench(bench, jobs=jobs))
    if before is None:
        return 0
    outcome = gate(read_result(bench.root / "bench.json"), before)
    print(outcome.line())
    return 1 if outcome.worse else 0


def do_one(bench: Bench, key: str) -> Path:
    """Do one job in this process, as a line of a job array; returns the place of its last stage.

    Raises:
        UserError: there is no such job, or the one that it waits for is not done.
    """
    known = {job.key: job for job in bench.jobs()}
    if key not in known:
        raise UserError(f"--only: there is no job {key!r}{nearest(key, known)}")
    job = known[key]
    if job.after and not (bench.place(job.after).parent / "evaluate" / "finished").exists():
        raise UserError(f"--only {key}: it starts from what {job.after} leaves; do that first")
    do(job)
    return Path(job.stages[-1][1]["output_dir"])


def check_environments(bench: Bench) -> None:
    """Make every gymnasium environment once.

    Raises:
        UserError: one does not exist, or does not take its arguments.
    """
    from rlhf.rollout.collector import make_env_factory

    for task in bench.environments.values():
        if task.env.id is not None:
            make_env_factory(task.env)().close()


def describe(bench: Bench) -> str:
    """What a benchmark will do, for `--dry-run`."""
    from rlhf.studies.bench.result import protocol

    check_environments(bench)
    jobs = bench.jobs()
    waiting = sum(job.after is not None for job in jobs)
    return "\n".join(
        [f"{waiting} training runs, {len(jobs) - waiting} jobs before them", *protocol(bench)]
    )
