"""`rlhf bench`: train every algorithm in every environment with every seed, and compare scores."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from rlhf.commands.command import CommandTable
from rlhf.common.names import did_you_mean
from rlhf.config.bench import BenchCommandConfig
from rlhf.config.launcher import LauncherConfig
from rlhf.errors import UserError
from rlhf.studies.bench.array import write_job_array
from rlhf.studies.bench.manifest import make_bench
from rlhf.studies.bench.plan import Bench
from rlhf.studies.bench.regression_check import check_regression, common_seeds, read_bench_result
from rlhf.studies.bench.report import write_bench_report
from rlhf.studies.bench.result import protocol_sentences
from rlhf.studies.bench.scores import analyze_scores, read_scores
from rlhf.studies.jobs import JobsFailedError, failed_jobs_text, lock_study_directory, run_job
from rlhf.studies.launchers import make_launcher

MANIFEST_FILE = "bench.yaml"


def run_bench(bench: Bench, launcher: LauncherConfig | None = None) -> Path:
    """Run all unfinished jobs with a launcher, and write the result.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: The model or an environment cannot be loaded, the directory exists and neither
            `resume` nor `overwrite` is set, a stage was started with another configuration, some
            jobs failed (finished runs are kept), or the random or optimal return of an environment
            is unknown.
    """
    check_model_and_environments(bench)
    with lock_study_directory(
        bench.root, MANIFEST_FILE, bench.config, bench.commands, bench.jobs()
    ):
        config = launcher or LauncherConfig()
        with make_launcher(config, bench.commands, bench.root) as started:
            failed = started.run_jobs(bench.jobs(), bench.root.name)
        if failed:
            raise JobsFailedError(failed_jobs_text(failed))
        scores = read_scores(bench)
        return write_bench_report(bench, scores, analyze_scores(scores, baseline=bench.baseline))


def run(config: BenchCommandConfig, commands: CommandTable) -> Generator[str, None, int]:
    """Run a benchmark or one of its jobs, or write its job array; yield the lines to print.

    Returns:
        The exit code: 1 if a score is significantly worse than in the result at ``against``, else
        0.
    """
    bench = make_bench(config.manifest(), commands)
    if config.array:
        yield from map(str, write_job_array(bench, config.array))
        return 0
    if config.only:
        yield str(run_one_job(bench, config.only))
        return 0
    earlier = read_bench_result(config.against) if config.against else None
    if earlier is not None:
        common_seeds(config.seeds, earlier)
    yield str(run_bench(bench, config))
    if earlier is None:
        return 0
    outcome = check_regression(read_bench_result(bench.root / "bench.json"), earlier)
    yield outcome.summary_line()
    return 1 if outcome.significant_losses else 0


def plan(name: str, config: BenchCommandConfig, commands: CommandTable) -> str:
    """Check a benchmark and describe its runs, for `--dry-run`."""
    bench = make_bench(config.manifest(), commands)
    check_model_and_environments(bench)
    jobs = bench.jobs()
    waiting = sum(job.after is not None for job in jobs)
    return "\n".join(
        [
            f"{waiting} training runs, and {len(jobs) - waiting} jobs that must finish first",
            *protocol_sentences(bench),
        ]
    )


def run_one_job(bench: Bench, key: str) -> Path:
    """Run the job with this key in this process; return the directory of its last stage.

    Raises:
        UserError: There is no job with this key, or the job that it depends on is not finished.
    """
    known = {job.key: job for job in bench.jobs()}
    if key not in known:
        raise UserError(f"--only: there is no job {key!r}{did_you_mean(key, known)}")
    job = known[key]
    if job.after and not (bench.run_path(job.after).parent / "evaluate" / "finished").exists():
        raise UserError(f"--only {key}: it needs the result of {job.after}; run that job first")
    run_job(job, bench.commands)
    return Path(job.stages[-1][1]["output_dir"])


def check_model_and_environments(bench: Bench) -> None:
    """Check that the model and every gymnasium environment of a benchmark can be loaded.

    Raises:
        UserError: The model is not available, or an environment does not exist or does not accept
            its arguments.
    """
    from rlhf.models.loading import find_model_folder
    from rlhf.rollout.environments.calls import make_env_factory

    find_model_folder(bench.config.model)
    for task in bench.environments.values():
        if task.env.id is not None:
            make_env_factory(task.env)().close()
