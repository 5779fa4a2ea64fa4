"""Fast fake sides for tests of the benchmark harness."""

from benchmarks.worker import Job, StepTimer

WORK = {"first": 1.0, "second": 2.0, "third": 3.0}


def count(job: Job, timer: StepTimer, *, work: float) -> None:
    """Record each step in a file that all sides share."""

    def step() -> float:
        with (job.folder / "order.txt").open("a") as file:
            file.write(f"{work:.0f}")
        return work

    print("what a library prints does not disturb the reports")
    timer.loop(step)


def fail(job: Job, timer: StepTimer) -> None:
    """Raise an error."""
    raise RuntimeError("no such trainer")


def prepare(job: Job) -> None:
    """Create a marker file."""
    (job.folder / "prepared").write_text(job.request["model"])
