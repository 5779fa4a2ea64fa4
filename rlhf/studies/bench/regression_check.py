"""`rlhf bench --against BASELINE.json`: test whether scores are worse than in an earlier result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.common.files import read_json
from rlhf.errors import UserError
from rlhf.evaluation.compare import format_estimate
from rlhf.evaluation.significance import FEWEST_SEEDS, Difference, compare_means
from rlhf.studies.bench.scores import SCORE_METRIC

ALL_ENVIRONMENTS = "all environments"


@dataclass(frozen=True)
class RegressionCheck:
    """The comparison of a benchmark result with an earlier result, the baseline."""

    differences: list[Difference]
    """The difference of the mean scores for each row and environment. The earlier result is the
    baseline."""
    notes: list[str]
    """Notes on keys of the manifests that differ, and on rows that were not measured again."""

    @property
    def significant_losses(self) -> list[Difference]:
        """The comparisons in which the score is significantly worse than the baseline.

        They are sorted by the estimated difference, the largest loss first.
        """
        losses = [d for d in self.differences if d.winner == d.baseline]
        return sorted(losses, key=lambda d: d.estimate.value)

    def summary_line(self) -> str:
        """Return one line that states which scores are significantly worse, if any."""
        seeds = self.differences[0].estimate.units
        scope = f"{len(self.differences)} comparisons over {seeds} training seeds"
        extra = f" ({'; '.join(self.notes)})" if self.notes else ""
        if not self.significant_losses:
            return f"bench: no score is significantly worse in {scope}{extra}"
        losses = ", ".join(
            f"{d.method} on {d.env} by {format_estimate(d.estimate)}"
            for d in self.significant_losses
        )
        return f"bench: significantly WORSE than the baseline: {losses}; {scope}{extra}"


def check_regression(now: Mapping[str, Any], before: Mapping[str, Any]) -> RegressionCheck:
    """Compare two results (contents of `bench.json`) by row and environment.

    The scores of a row in an environment are paired by training seed. The family-wise error rate of
    all comparisons is at most 5% (Bonferroni).

    Raises:
        UserError: The results have too few common training seeds, or no common row and environment.
    """
    seeds = common_seeds(now["seeds"], before)
    cells = _paired_scores(now, before, seeds)
    if not cells:
        raise UserError("--against: the two results have no common algorithm and environment")
    compared = [
        compare_means(
            current,
            earlier,
            method=row,
            baseline="the baseline",
            unit="training seeds",
            env=env,
            metric=SCORE_METRIC,
            comparisons=len(cells),
        )
        for (row, env), (current, earlier) in cells.items()
    ]
    return RegressionCheck(compared, _notes_on_differences(now, before))


def common_seeds(seeds: Sequence[int], before: Mapping[str, Any]) -> list[int]:
    """Return the training seeds that a benchmark and an earlier result have in common.

    Raises:
        UserError: There are fewer than `FEWEST_SEEDS` common seeds.
    """
    common = [seed for seed in seeds if seed in before["seeds"]]
    if len(common) < FEWEST_SEEDS:
        raise UserError(
            f"--against: the two results share {len(common)} training seeds; a test needs at least "
            f"{FEWEST_SEEDS}"
        )
    return common


def read_bench_result(path: str | Path) -> dict[str, Any]:
    """Read a `bench.json`.

    Raises:
        UserError: The file is missing, cannot be read, or does not have the format of a
            `bench.json`.
    """
    try:
        tree = read_json(Path(path))
    except FileNotFoundError as error:
        raise UserError(f"--against: {path} does not exist") from error
    except OSError as error:
        raise UserError(f"--against: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--against: {path} is not JSON") from error
    if not _is_bench_result(tree):
        raise UserError(f"--against: {path} is not a bench.json: it has no seeds or no scores")
    return tree


def _is_bench_result(tree: Any) -> bool:
    """Return whether `tree` has seeds, and scores by row and environment."""
    if not isinstance(tree, dict) or not isinstance(tree.get("seeds"), list):
        return False
    rows = tree.get("scores")
    tables = rows.values() if isinstance(rows, dict) else [None]
    return all(
        isinstance(table, dict) and all(isinstance(cell, list) for cell in table.values())
        for table in tables
    )


def _paired_scores(
    now: Mapping[str, Any], before: Mapping[str, Any], seeds: list[int]
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Return (row, environment) -> scores of the current and the earlier result, each [seeds].

    The mean of each row over all common environments, if there are several, is added as the
    environment `ALL_ENVIRONMENTS`. Rows that are not trained are omitted.
    """
    cells: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for row, table in now["scores"].items():
        earlier_table = before["scores"].get(row, {})
        pairs = {
            env: (
                _values_in_seed_order(now, values, seeds),
                _values_in_seed_order(before, earlier_table[env], seeds),
            )
            for env, values in table.items()
            # Rows that are not trained have a single value instead of one for each seed.
            if env in earlier_table and len(values) == len(now["seeds"])
        }
        cells |= {(row, env): pair for env, pair in pairs.items()}
        if len(pairs) > 1:
            current, earlier = np.mean(list(pairs.values()), axis=0)
            cells[row, ALL_ENVIRONMENTS] = (current, earlier)
    return cells


def _values_in_seed_order(
    result: Mapping[str, Any], values: list[float], seeds: list[int]
) -> np.ndarray:
    """Return the scores [seeds] of the given training seeds, in their order."""
    by_seed = dict(zip(result["seeds"], values, strict=True))
    return np.array([by_seed[seed] for seed in seeds])


def _notes_on_differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return notes on differences between the manifests and on rows that are missing now."""
    notes = []
    ignored = ("output_dir", "seeds")
    current, earlier = now.get("manifest", {}), before.get("manifest", {})
    keys = sorted((current.keys() | earlier.keys()) - {*ignored})
    if different := [key for key in keys if current.get(key) != earlier.get(key)]:
        notes.append(f"the manifests differ in {', '.join(different)}")
    if missing := sorted(before["scores"].keys() - now["scores"].keys()):
        notes.append(f"not measured now: {', '.join(missing)}")
    return notes
