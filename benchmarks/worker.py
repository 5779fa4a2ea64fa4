"""One side of a workload, in a process of its own that steps when it is told to.

    python -m benchmarks.worker WORKLOAD SIDE FOLDER

Both sides of a comparison are started once and live side by side; one steps while the other waits.
Lines of JSON go out, one word a line comes in.
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
    """What a side is asked to do; the inputs lie in ``folder``."""

    folder: Path

    @property
    def request(self) -> dict[str, Any]:
        """What the user asked for: ``model``."""
        return json.loads((self.folder / "request.json").read_text())

    @property
    def settings(self) -> dict[str, Any]:
        """Written by the workload's ``prepare``: ``model`` (a folder), ``work``, ``config``."""
        return json.loads((self.folder / "job.json").read_text())

    @property
    def model(self) -> str:
        """Folder of the model."""
        return self.settings["model"]

    @property
    def work(self) -> float:
        """Work of one step, in the workload's unit."""
        return self.settings["work"]


class Pace:
    """Lets a side step when its turn has come, and reports how long that took.

    What happens between ``done`` and the next ``start`` is not timed, and still belongs to this
    side's turn.
    """

    def __init__(self, orders: TextIO, reports: TextIO) -> None:
        self.orders, self.reports = orders, reports
        self.pending: dict[str, Any] = {"ready": True}
        self.begun = Reading.now()

    def start(self) -> None:
        """Report the last step and wait for the next turn; ends the process when none comes."""
        self.tell({**self.pending, "peak_gib": peak_gib()})
        if self.orders.readline().strip() != "go":
            raise SystemExit
        self.begun = Reading.now()

    def done(self, work: float) -> None:
        """Stop the clock: ``work`` was done since ``start``."""
        now = Reading.now()
        self.pending = {
            "seconds": now.clock - self.begun.clock,
            "others": now.others(self.begun),
            "work": work,
        }

    def loop(self, step: Callable[[], float]) -> None:
        """Take a step at every turn; it returns its work."""
        while True:
            self.start()
            self.done(step())

    def tell(self, row: dict[str, Any]) -> None:
        """Send one line."""
        self.reports.write(json.dumps(row) + "\n")
        self.reports.flush()


def private_stdout() -> TextIO:
    """Standard output for reports alone; what libraries print goes to standard error."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return reports


def main(workload: str, side: str, folder: str) -> None:
    """Run one side until it is told to stop; "check" and "prepare" run once."""
    from benchmarks.workloads import WORKLOADS

    reports = private_stdout()
    row = WORKLOADS[workload]
    job = Job(Path(folder))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if side in ("prepare", "check", "measure"):
        found = import_object(getattr(row, side))(job, **row.options)
        reports.write(json.dumps({"result": found}) + "\n")
        reports.flush()
        return
    chosen = row.sides[side]
    if chosen.allocator:
        from rlhf.runs import launch

        launch.prepare()
    import_object(chosen.run)(job, Pace(sys.stdin, reports), **chosen.options)


if __name__ == "__main__":
    main(*sys.argv[1:])
