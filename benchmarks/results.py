"""Store results as JSON Lines, with date, machine and package versions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs.machine import describe_machine

Result = dict[str, Any]


def describe_measurement() -> dict[str, Any]:
    """Return the date, commit, machine and package versions that are stored with a result."""
    description = describe_machine()
    return {
        "date": description["date"],
        "commit": description["commit"],
        "machine": {
            "processor": description["processor"],
            "cores": description["cores"],
            "memory_gib": machine_memory_gib(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": {"python": description["python"], **description["versions"]},
    }


def machine_memory_gib() -> float | None:
    """Return the memory of the machine in GiB, or None if the system does not report it."""
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Append a result to the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def read_results(path: Path) -> list[Result]:
    """Return all results in the results file, the oldest first.

    Raises:
        UserError: the file does not exist.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: first run python -m benchmarks all")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def machine_name(result: Result) -> str:
    """Return text that identifies the machine of a result."""
    machine = result["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"


def newest_results(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """Return machine -> workload -> newest result.

    The machine with the most recent result is first. Results without some of the sides are ignored.
    """
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if not result.get("partial"):
            machine = machine_name(result)
            found = {machine: found.pop(machine, {}), **found}
            found[machine][result["workload"]] = result
    return found
