"""Compare learning curves of two implementations, by paired differences and in a figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rlhf.stats import difference, interval

CURVE_END_STEPS = 5
"""Number of last steps over which the end of a curve is averaged."""


def read_reward_curve(run: Path) -> list[float]:
    """Return the mean reward of each step of a run directory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["reward/mean"] for line in lines]


def curve_comparison_table(curves_by_algorithm: dict[str, dict[str, np.ndarray]]) -> str:
    """Return a Markdown table with the means and the ends of curves, and their paired differences.

    Args:
        curves_by_algorithm: algorithm -> name of the implementation or setting -> curves [seeds,
            steps]. All algorithms have the same two implementations or settings.
    """
    first, second = next(iter(curves_by_algorithm.values()))
    lines = [
        f"| algorithm | measure | {first} | {second} | {first} − {second}, paired by seed |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for algorithm, sides in curves_by_algorithm.items():
        for name, part in (
            ("mean over all steps", slice(None)),
            (f"last {CURVE_END_STEPS}", slice(-CURVE_END_STEPS, None)),
        ):
            one, other = (rows[:, part].mean(1) for rows in sides.values())
            intervals = [interval(column, kind="mean") for column in (one, other)]
            gap = difference(one, other, kind="mean")
            cells = [f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in intervals]
            cells.append(f"{gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}]")
            lines.append(f"| {algorithm} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_curves(curves_by_algorithm: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plot the mean curves with 95% intervals over seeds, and write the figure to ``path``.

    ``curves_by_algorithm`` has the form that `curve_comparison_table` describes.
    """
    from matplotlib.figure import Figure

    rows = -(-len(curves_by_algorithm) // 2)
    figure = Figure(figsize=(8, 3 * rows), layout="constrained")
    # Each panel has its own scale, because the ranges of returns differ between tasks.
    every_axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis, (algorithm, sides) in zip(every_axes, curves_by_algorithm.items(), strict=False):
        for side, curves in sides.items():
            intervals = [interval(column, kind="mean") for column in curves.T]
            steps = np.arange(1, len(intervals) + 1)
            axis.plot(steps, [x.value for x in intervals], label=side)
            axis.fill_between(
                steps, [x.low for x in intervals], [x.high for x in intervals], alpha=0.2
            )
        axis.set(title=algorithm, xlabel="step", ylabel="mean reward of a batch")
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=90)
