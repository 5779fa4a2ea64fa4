"""`rlhf bench --against BASELINE.json`: test for regressions against an earlier result."""

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

ALL_ENVIRONMENTS = "all environments"


@dataclass(frozen=True)
class Gate:
    """Comparisons with an earlier result; ``worse`` lists the significant regressions."""

    compared: list[Difference]
    notes: list[str]

    @property
    def worse(self) -> list[Difference]:
        """Comparisons that are significantly worse than the baseline, the largest loss first."""
        losses = [d for d in self.compared if d.winner == d.baseline]
        return sorted(losses, key=lambda d: d.estimate.value)

    def line(self) -> str:
        """Return the result in one line."""
        seeds = self.compared[0].estimate.units
        scope = f"{len(self.compared)} comparisons over {seeds} training seeds"
        extra = f" ({'; '.join(self.notes)})" if self.notes else ""
        if not self.worse:
            return f"bench: nothing is worse beyond noise in {scope}{extra}"
        losses = ", ".join(
            f"{d.method} on {d.env} by {format_estimate(d.estimate)}" for d in self.worse
        )
        return f"bench: WORSE than the baseline beyond noise: {losses}; {scope}{extra}"


def gate(now: Mapping[str, Any], before: Mapping[str, Any]) -> Gate:
    """Compare two results (`bench.json`) by row and environment.

    The scores of one row in one environment are paired by training seed. The level of each test
    keeps the probability of any false regression below 5% (Bonferroni).

    Raises:
        UserError: too few common training seeds, or no common row and environment.
    """
    seeds = common_seeds(now["seeds"], before)
    cells = _cells(now, before, seeds)
    if not cells:
        raise UserError("--against: the two results share no algorithm on any environment")
    compared = [
        compare_means(
            current,
            earlier,
            method=row,
            baseline="the baseline",
            unit="training seeds",
            env=env,
            metric=METRIC,
            comparisons=len(cells),
        )
        for (row, env), (current, earlier) in cells.items()
    ]
    return Gate(compared, _notes(now, before))


def common_seeds(seeds: Sequence[int], before: Mapping[str, Any]) -> list[int]:
    """Return the training seeds that a benchmark and an earlier result have in common.

    Raises:
        UserError: there are too few for a test.
    """
    common = [seed for seed in seeds if seed in before["seeds"]]
    if len(common) < FEWEST_SEEDS:
        raise UserError(
            f"--against: the two results share {len(common)} training seeds; a test needs at least "
            f"{FEWEST_SEEDS}"
        )
    return common


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a `bench.json`.

    Raises:
        UserError: the file is missing or has another format.
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
        raise UserError(f"--against: {path} is not a bench.json: it has no seeds and scores")
    return tree


def _is_result(tree: Any) -> bool:
    """Return whether `tree` has seeds, and scores by row and environment."""
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
    """Return (row, environment) -> scores of both results by common seed, with the mean."""
    cells: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for row, table in now["scores"].items():
        earlier_table = before["scores"].get(row, {})
        pairs = {
            env: (_by_seed(now, values, seeds), _by_seed(before, earlier_table[env], seeds))
            for env, values in table.items()
            # Reference policies have one value for all seeds.
            if env in earlier_table and len(values) == len(now["seeds"])
        }
        cells |= {(row, env): pair for env, pair in pairs.items()}
        if len(pairs) > 1:
            current, earlier = np.mean(list(pairs.values()), axis=0)
            cells[row, ALL_ENVIRONMENTS] = (current, earlier)
    return cells


def _by_seed(result: Mapping[str, Any], values: list[float], seeds: list[int]) -> np.ndarray:
    """Return the scores of the given training seeds."""
    by_seed = dict(zip(result["seeds"], values, strict=True))
    return np.array([by_seed[seed] for seed in seeds])


def _notes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return the differences between the two manifests and results."""
    notes = []
    ignored = ("output_dir", "seeds")
    current, earlier = now.get("manifest", {}), before.get("manifest", {})
    keys = sorted((current.keys() | earlier.keys()) - {*ignored})
    if different := [key for key in keys if current.get(key) != earlier.get(key)]:
        notes.append(f"the manifests differ in {', '.join(different)}")
    if missing := sorted(before["scores"].keys() - now["scores"].keys()):
        notes.append(f"not measured now: {', '.join(missing)}")
    return notes
