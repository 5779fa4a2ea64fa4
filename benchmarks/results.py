"""Results as JSON lines: what was measured, when, on which machine, with which versions."""

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


def stamp() -> dict[str, Any]:
    """Date, commit, machine and versions."""
    told = describe_machine()
    return {
        "date": told["date"],
        "commit": told["commit"],
        "machine": {
            "processor": told["processor"],
            "cores": told["cores"],
            "memory_gib": memory_gib(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": {"python": told["python"], **told["versions"]},
    }


def memory_gib() -> float | None:
    """Memory of the machine; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Add one result to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def read(path: Path) -> list[Result]:
    """Every result, oldest first.

    Raises:
        UserError: there is no such file.
    """
    if not path.exists():
        raise UserError(f"no results in {path}: measure first (python -m benchmarks all)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def machine_of(result: Result) -> str:
    """Name of the machine that a result is from."""
    machine = result["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"


def newest(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """By machine, the last complete result of each workload; the machine measured last comes first.

    A result with fewer sides does not replace one.
    """
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if not result.get("partial"):
            machine = machine_of(result)
            found = {machine: found.pop(machine, {}), **found}
            found[machine][result["workload"]] = result
    return found
