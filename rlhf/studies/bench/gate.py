"""`rlhf bench --against BASELINE.json`: did anything get worse beyond noise?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.compare import format_estimate
from rlhf.evaluation.significance import FEWEST_SEEDS, Difference, compare_means
from rlhf.studies.bench.scores import METRIC

EVERYWHERE = "all environments"


@dataclass(frozen=True)
class Gate:
    """What was compared; ``worse`` holds the differences beyond noise."""

    compared: list[Difference]
    notes: list[str]

    @property
    def worse(self) -> list[Difference]:
        """Cells that the baseline won, the largest loss first."""
        lost = [d for d in self.compared if d.winner == d.baseline]
        return sorted(lost, key=lambda d: d.estimate.value)

    def line(self) -> str:
        """The outcome in one line."""
        seeds = self.compared[0].estimate.units
        scope = f"{len(self.compared)} comparisons over {seeds} training seeds"
        extra = f" ({'; '.join(self.notes)})" if self.notes else ""
        if not self.worse:
            return f"bench: nothing is worse beyond noise in {scope}{extra}"
        told = ", ".join(
            f"{d.method} on {d.env} by {format_estimate(d.estimate)}" for d in self.worse
        )
        return f"bench: WORSE than the baseline beyond noise: {told}; {scope}{extra}"


def gate(now: Mapping[str, Any], before: Mapping[str, Any]) -> Gate:
    """Compare two results (`bench.json`), cell by cell and row by row.

    A cell is one row in one environment; its scores pair by training seed. Each is asked at a level
    that keeps false alarms of all of them together below 5% (Bonferroni).

    Args:
        now: the present result.
        before: the baseline.

    Raises:
        UserError: too few training seeds, or no cell, in common.
    """
    seeds = common_seeds(now["seeds"], before)
    cells = _cells(now, before, seeds)
    if not cells:
        raise UserError("--against: the two results share no algorithm on any environment")
    compared = [
        compare_means(
            mine,
            theirs,
            method=row,
            baseline="the baseline",
            unit="training seeds",
            env=env,
            metric=METRIC,
            comparisons=len(cells),
        )
        for (row, env), (mine, theirs) in cells.items()
    ]
    return Gate(compared, _notes(now, before))


def common_seeds(seeds: Sequence[int], before: Mapping[str, Any]) -> list[int]:
    """Training seeds of a benchmark that an earlier result has too.

    Raises:
        UserError: too few to judge by.
    """
    common = [seed for seed in seeds if seed in before["seeds"]]
    if len(common) < FEWEST_SEEDS:
        raise UserError(
            f"--against: the two results share {len(common)} training seeds, and fewer than "
            f"{FEWEST_SEEDS} tell nothing from noise"
        )
    return common


def read_result(path: str | Path) -> dict[str, Any]:
    """A `bench.json`.

    Raises:
        UserError: it is missing or something else.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--against: {path} does not exist") from error
    except OSError as error:
        raise UserError(f"--against: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--against: {path} is not JSON") from error
    if not _is_result(tree):
        raise UserError(f"--against: {path} is no bench.json: it has no seeds and scores")
    return tree


def _is_result(tree: Any) -> bool:
    """Whether there are seeds, and scores by row and environment."""
    if not isinstance(tree, dict) or not isinstance(tree.get("seeds"), list):
        return False
    rows = tree.get("scores")
    tables = rows.values() if isinstance(rows, dict) else [None]
    return all(
        isinstance(table, dict) and all(isinstance(cell, list) for cell in table.values())
        for table in tables
    )


def _cells(
    now: Mapping[str, Any], before: Mapping[str, Any], seeds: list[int]
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(row, environment) -> scores of both by common seed; a row's mean over environments too."""
    found: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for row, table in now["scores"].items():
        shared = [env for env in table if env in before["scores"].get(row, {})]
        pairs = [
            (_values(now, row, env, seeds), _values(before, row, env, seeds)) for env in shared
        ]
        # References have one value: nobody trained them.
        kept = [(env, p) for env, p in zip(shared, pairs, strict=True) if p[0].size == len(seeds)]
        for env, pair in kept:
            found[row, env] = pair
        if len(kept) > 1:
            mine, theirs = (np.mean([pair[side] for _, pair in kept], axis=0) for side in (0, 1))
            found[row, EVERYWHERE] = (mine, theirs)
    return found


def _values(result: Mapping[str, Any], row: str, env: str, seeds: list[int]) -> np.ndarray:
    values = result["scores"][row][env]
    if len(values) < len(result["seeds"]):
        return np.array(values)
    by_seed = dict(zip(result["seeds"], values, strict=True))
    return np.array([by_seed[seed] for seed in seeds])


def _notes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What makes the comparison other than like with like."""
    notes = []
    ignored = ("output_dir", "seeds")
    ours, theirs = (
        {k: v for k, v in r.get("manifest", {}).items() if k not in ignored} for r in (now, before)
    )
    if ours != theirs:
        keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        notes.append(f"the manifests differ in {', '.join(keys)}")
    missing = sorted(before["scores"].keys() - now["scores"].keys())
    if missing:
        notes.append(f"not measured now: {', '.join(missing)}")
    return notes
