"""Worker process of one side of a workload; it runs a step for each line on standard input.

    python -m benchmarks.worker WORKLOAD SIDE FOLDER

The processes of all sides exist at the same time; one of them steps while the others wait. The
input has one word per line, the output one JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.system_load import Reading, peak_gib
from rlhf.common.imports import import_object


@dataclass(frozen=True)
class Job:
    """Inputs of a side, read from ``folder``."""

    folder: Path

    @property
    def request(self) -> dict[str, Any]:
        """The user's options: ``model``."""
        return json.loads((self.folder / "request.json").read_text())

    @property
    def settings(self) -> dict[str, Any]:
        """Values from the workload's ``prepare``: ``model`` (a folder), ``work``, ``config``."""
        return json.loads((self.folder / "job.json").read_text())

    @property
    def model(self) -> str:
        """Folder of the model."""
        return self.settings["model"]

    @property
    def work(self) -> float:
        """Work of one step, in the workload's unit."""
        return self.settings["work"]


class StepTimer:
    """Waits for a side's turn, times its step and reports it.

    The time between ``done`` and the next ``start`` is not measured, but the other sides still
    wait.
    """

    def __init__(self, orders: TextIO, reports: TextIO) -> None:
        self.orders, self.reports = orders, reports
        self.pending: dict[str, Any] = {"ready": True}
        self.begun = Reading.now()

    def start(self) -> None:
        """Report the last step and wait for the next turn; exit at the end of the input."""
        self.report({**self.pending, "peak_gib": peak_gib()})
        if self.orders.readline().strip() != "go":
            raise SystemExit
        self.begun = Reading.now()

    def done(self, work: float) -> None:
        """Stop the timer after ``work`` units."""
        now = Reading.now()
        self.pending = {
            "seconds": now.clock - self.begun.clock,
            "others": now.others(self.begun),
            "work": work,
        }

    def loop(self, step: Callable[[], float]) -> None:
        """Call ``step``, which returns its work, at every turn."""
        while True:
            self.start()
            self.done(step())

    def report(self, row: dict[str, Any]) -> None:
        """Write one line."""
        self.reports.write(json.dumps(row) + "\n")
        self.reports.flush()


def private_stdout() -> TextIO:
    """Reserve standard output for reports; other output goes to standard error."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return reports


def main(workload: str, side: str, folder: str) -> None:
    """Run one side until its input ends; "check", "prepare" and "measure" run once."""
    from benchmarks.workloads import WORKLOADS

    reports = private_stdout()
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

        launch.prepare()
    import_object(spec.run)(job, StepTimer(sys.stdin, reports), **spec.options)


if __name__ == "__main__":
    main(*sys.argv[1:])
