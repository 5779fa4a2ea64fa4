"""Run one side of a workload in a worker process.

    python -m benchmarks.worker WORKLOAD SIDE FOLDER

The process runs one step for each line "go" on standard input, and writes one JSON object for each
step to standard output. The processes of all sides exist at the same time, but only one of them
runs a step at any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.system_load import LoadReading, peak_gib
from rlhf.common.imports import import_object


@dataclass(frozen=True)
class Job:
    """Inputs of a workload, which are read from ``folder``."""

    folder: Path

    @property
    def request(self) -> dict[str, Any]:
        """Content of request.json, which has the key ``model``, the model that the user chose."""
        return json.loads((self.folder / "request.json").read_text())

    @property
    def settings(self) -> dict[str, Any]:
        """Content of job.json, which the workload's ``prepare`` writes.

        The keys include ``model`` (a folder), ``work`` and ``config``.
        """
        return json.loads((self.folder / "job.json").read_text())

    @property
    def model(self) -> str:
        """Folder of the model."""
        return self.settings["model"]

    @property
    def work_per_step(self) -> float:
        """Amount of work of one step, in the workload's unit."""
        return self.settings["work"]


class StepTimer:
    """Waits until the harness starts a step, times the step and reports the measurements.

    The time between ``done`` and the next ``wait_for_start`` is not measured. During this time, the
    processes of the other sides wait.
    """

    def __init__(self, orders: TextIO, reports: TextIO) -> None:
        self.orders, self.reports = orders, reports
        self.pending: dict[str, Any] = {"ready": True}
        self.begun = LoadReading.now()

    def wait_for_start(self) -> None:
        """Report the last step, and wait for the harness to start the next step.

        The process exits at the end of its input.
        """
        self.report({**self.pending, "peak_gib": peak_gib()})
        if self.orders.readline().strip() != "go":
            raise SystemExit
        self.begun = LoadReading.now()

    def done(self, work: float) -> None:
        """Stop the timer; ``work`` is the amount of work of the step."""
        now = LoadReading.now()
        self.pending = {
            "seconds": now.clock - self.begun.clock,
            "others": now.cores_used_by_others(self.begun),
            "work": work,
        }

    def loop(self, step: Callable[[], float]) -> None:
        """Run and time ``step`` repeatedly, without end; ``step`` returns its amount of work."""
        while True:
            self.wait_for_start()
            self.done(step())

    def report(self, row: dict[str, Any]) -> None:
        """Write one JSON object as a line of output."""
        self.reports.write(json.dumps(row) + "\n")
        self.reports.flush()


def redirect_stdout_to_stderr() -> TextIO:
    """Return a stream to standard output, after redirecting all other output to standard error."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return reports


def main(workload: str, side: str, folder: str) -> None:
    """Run a side until its input ends, or run "prepare", "check" or "measure" once.

    Args:
        workload: name of the workload.
        side: name of the side, or the function "prepare", "check" or "measure".
        folder: folder of the inputs.
    """
    from benchmarks.workloads import WORKLOADS

    reports = redirect_stdout_to_stderr()
    row = WORKLOADS[workload]
    job = Job(Path(folder))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if side in ("prepare", "check", "measure"):
        result = import_object(getattr(row, side))(job, **row.options)
        reports.write(json.dumps({"result": result}) + "\n")
        reports.flush()
        return
    spec = row.sides[side]
    if spec.allocator:
        from rlhf.runs import launch

        launch.prepare_process()
    import_object(spec.run)(job, StepTimer(sys.stdin, reports), **spec.options)


if __name__ == "__main__":
    main(*sys.argv[1:])
