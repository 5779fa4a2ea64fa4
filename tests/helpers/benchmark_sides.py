"""Sides that take no time, for tests of the harness."""

from benchmarks.worker import Job, Pace

WORK = {"first": 1.0, "second": 2.0, "third": 3.0}


def count(job: Job, pace: Pace, *, work: float) -> None:
    """A step notes that it was taken, in a file that all sides share."""

    def step() -> float:
        with (job.folder / "order.txt").open("a") as file:
            file.write(f"{work:.0f}")
        return work

    print("what a library prints does not disturb the reports")
    pace.loop(step)


def fail(job: Job, pace: Pace) -> None:
    """Ends with an error."""
    raise RuntimeError("no such trainer")


def prepare(job: Job) -> None:
    """Leaves a mark."""
    (job.folder / "prepared").write_text(job.request["model"])
