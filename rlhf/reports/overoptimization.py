"""Report section on overoptimization: scores over √KL, fitted curves and predicted peaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.common.files import read_json
from rlhf.common.text import count_text
from rlhf.evaluation.records import RunRecord
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.markup import (
    Cell,
    Table,
    capital_acronyms_html,
    interval_text,
    sentence_html,
    with_minus_signs,
)
from rlhf.reports.results import interval_from_mapping, series_with_band

RESULT_FILE = "overoptimization.json"
PROXY_NAMES = {
    "single": "a single proxy",
    "mean": "the ensemble's mean",
    "worst": "the ensemble's minimum",
    "uncertainty": "the ensemble's mean minus its weighted variance",
}
"""Way of combining the members of a proxy -> its name on pages and in verdicts."""

Result = Mapping[str, Any]


def read_overoptimization_results(runs: Sequence[RunRecord]) -> list[Result]:
    """Return the content of `overoptimization.json` of every run that has this file."""
    paths = [run.directory / RESULT_FILE for run in runs]
    return [read_json(path) for path in paths if path.is_file()]


def overoptimization_section_html(results: Sequence[Result]) -> str:
    """Return the findings, the training curves and the best-of-n curves, as HTML."""
    parts = []
    for result in results:
        items = "".join(
            f"<li>{with_minus_signs(sentence_html(line))}</li>" for line in result["verdict"]
        )
        parts.append(f'<ul class="verdicts brief">{items}</ul>')
        for row in result["rl"]:
            name = f"{result['algorithm']} against {PROXY_NAMES[row['how']]}"
            seeds = f"<small>{count_text(row['seeds'], 'training seed')}</small>"
            charts = charts_html(_charts_of_rl_runs(row, result["start"]))
            parts.append(f"<h3>{capital_acronyms_html(name)} {seeds}</h3>{charts}")
        parts.append(f"<h3>Best of n</h3>{charts_html(_best_of_n_charts(result['best_of_n']))}")
    return "".join(parts)


def overoptimization_tables(results: Sequence[Result]) -> list[Table]:
    """Return the tables of the fits and peaks, for training by RL and for best-of-n."""
    tables = []
    for result in results:
        tables += [_training_table(result["rl"])] if result["rl"] else []
        tables.append(_best_of_n_table(result["best_of_n"]))
    return tables


def _series_over_sqrt_kl(row: Result, key: str, name: str, color: str) -> Series:
    """Return a curve of `key` over sqrt(KL), with intervals.

    The points are sorted by sqrt(KL), because the KL may decrease from step to step.
    """
    x = _sqrt_kl_values(row)
    order = sorted(range(len(x)), key=x.__getitem__)
    return series_with_band(name, [x[i] for i in order], [row[key][i] for i in order], color)


def _fitted_series(fit: Result, initial_gold_score: float, color: str = "c2") -> Series:
    """Return the fitted curve; `initial_gold_score` is the gold score of the initial policy."""
    curve = fit["curve"]
    return Series("fit", curve["d"], [initial_gold_score + gain for gain in curve["gain"]], color)


def _peak_mark_and_shade(
    fit: Result,
) -> tuple[tuple[float, str] | None, tuple[float, float] | None]:
    """Return `mark` and `shade` of a `Chart` for the predicted peak and its interval.

    A value is None if it is outside the range of the data.
    """
    peak, x_max = fit["peak"], fit["furthest"]
    mean = peak["mean"]
    mark = (mean, "predicted peak") if mean is not None and mean <= x_max else None
    low, high = peak["low"], peak["high"]
    shade = (low, x_max if high is None else high) if low is not None and low < x_max else None
    return mark, shade


def _charts_of_rl_runs(row: Result, initial_gold_score: float) -> list[Chart]:
    """Return the charts of the training with one way of combining the members of the proxy.

    They show the means over training seeds: proxy and gold over sqrt(KL), and sqrt(KL) by step.
    """
    observed, fit = row["observed"], row["fit"]
    mark, shade = _peak_mark_and_shade(fit) if fit else (None, None)
    proxy = _series_over_sqrt_kl(row, "proxy_score", "proxy", "proxy")
    gold = [_series_over_sqrt_kl(row, "gold", "gold", "gold")] + (
        [_fitted_series(fit, initial_gold_score)] if fit else []
    )
    peak = interval_from_mapping(observed["distance"])
    seeds = f", range over the individual seeds {interval_text(peak)}" if row["seeds"] > 1 else ""
    note = f"Observed peak at √KL {peak.value:.2f}{seeds} (step {observed['step']})"
    inside = {True: "inside", False: "outside"}.get(observed.get("inside"), "")
    note += f", {inside} the predicted interval (shaded)." if fit else "."
    steps = [float(step) for step in row["steps"]]
    distance = Series("√KL", steps, _sqrt_kl_values(row), "c5")
    gold_peak_mark = (float(observed["step"]), "gold peaks")
    return [
        Chart("Proxy", [proxy], "Training objective.", "√KL", mark, shade, y_label="score"),
        Chart("Gold", gold, note, "√KL", mark, shade, y_label="score"),
        Chart(
            "√KL to the initial policy",
            [distance],
            "Square root of the KL to the initial policy, by step.",
            mark=gold_peak_mark,
            y_label="square root of nats",
        ),
    ]


def _best_of_n_charts(rows: Sequence[Result]) -> list[Chart]:
    """Return the charts of best-of-n.

    They show the scores of the first proxy, and the gold score with its fit. If there are several
    combinations, numbers of pairs or model sizes, a chart shows the gold score of each.
    """
    first = rows[0]
    by_combination = [row for row in rows if row["proxy"] == first["proxy"]]
    single = [row for row in rows if row["how"] == "single"]
    by_pairs = sorted(
        (row for row in single if row["parameters"] == first["parameters"]),
        key=lambda row: row["pairs"] or 0,
    )
    by_size = sorted(
        (row for row in single if row["pairs"] == first["pairs"]),
        key=lambda row: row["parameters"] or 0,
    )
    mark, shade = _peak_mark_and_shade(first["fit"])
    gold = [
        _mean_series(first, "gold", "gold"),
        _fitted_series(first["fit"], first["gold"][0]["mean"]),
    ]
    proxy = _mean_series(first, "proxy", "proxy", key="proxy_score")
    note = f"{first['advice'][:1].upper()}{first['advice'][1:]}."
    charts = [
        Chart("Proxy", [proxy], "", "√KL", mark, shade, y_label="standard deviations"),
        Chart("Gold and fit", gold, note, "√KL", mark, shade, y_label="score"),
    ]
    if len(by_combination) > 1:
        charts.append(
            _gold_chart("Gold by ensemble combination", by_combination, lambda row: row["how"])
        )
    if len(by_pairs) > 1:
        charts.append(
            _gold_chart("Gold by number of pairs", by_pairs, lambda row: f"{row['pairs']:,} pairs")
        )
    if len(by_size) > 1:
        charts.append(
            _gold_chart(
                "Gold by model size", by_size, lambda row: _parameter_count_text(row["parameters"])
            )
        )
    return charts


def _gold_chart(title: str, rows: Sequence[Result], name_of: Callable[[Result], str]) -> Chart:
    """Return a chart with the gold curve of every row; `name_of` returns the name of a curve."""
    lines = [_mean_series(row, name_of(row), f"c{k % 6 + 1}") for k, row in enumerate(rows)]
    return Chart(title, lines, x_label="√KL", y_label="score")


def _mean_series(row: Result, name: str, color: str, *, key: str = "gold") -> Series:
    """Return the line of the means of `key` over sqrt(KL), without intervals."""
    return Series(name, _sqrt_kl_values(row), [item["mean"] for item in row[key]], color)


def _sqrt_kl_values(row: Result) -> list[float]:
    """Return sqrt(KL) of each point."""
    return [math.sqrt(kl) for kl in row["kl"]]


def _parameter_count_text(parameters: int | None) -> str:
    """Return a number of parameters as text, such as "1.5M"."""
    if parameters is None:
        return "unknown size"
    return f"{parameters / 1e6:.3g}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"


def _training_table(rows: Sequence[Result]) -> Table:
    columns = ["against", "seeds", "peak at step", "√KL at peak [range over seeds]"]
    columns += ["gold at peak", "change in gold after peak", "change in proxy after peak"]
    columns += ["alpha", "beta", "predicted peak (√KL)", "peak inside predicted interval"]
    cells: list[list[Cell]] = []
    for row in rows:
        observed = row["observed"]
        line: list[Cell] = [PROXY_NAMES[row["how"]], row["seeds"], observed["step"]]
        line += [interval_from_mapping(observed["distance"]), observed["gold"]]
        line += [interval_from_mapping(observed[key]) for key in ("gold_after", "proxy_after")]
        line += [
            *_coefficient_and_peak_cells(row["fit"]),
            {True: "yes", False: "no"}.get(observed.get("inside")),
        ]
        cells.append(line)
    return Table("training", "Training", columns, cells)


def _best_of_n_table(rows: Sequence[Result]) -> Table:
    columns = ["proxy", "parameters", "pairs", "used as", "accuracy", "gold at n = 1"]
    columns += [f"gold at n = {rows[0]['ns'][-1]}", "alpha", "beta", "predicted peak (√KL)"]
    cells: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [row["proxy"], row["parameters"], row["pairs"], PROXY_NAMES[row["how"]]]
        line += [
            row["accuracy"],
            interval_from_mapping(row["gold"][0]),
            interval_from_mapping(row["gold"][-1]),
        ]
        cells.append(line + _coefficient_and_peak_cells(row["fit"]))
    return Table("best_of_n", "Best of n", columns, cells)


def _coefficient_and_peak_cells(fit: Result | None) -> list[Cell]:
    """Return the cells alpha, beta and predicted peak; empty cells without a fit.

    The peak is text if there is none or its interval is unbounded.
    """
    if fit is None:
        return [None, None, None]
    peak = fit["peak"]
    shown: Cell = interval_from_mapping(peak)
    if peak["mean"] is None:
        shown = "none"
    elif peak["high"] is None:
        shown = f"{peak['mean']:.2f} [{peak['low']:.2f}, ∞)"
    return [interval_from_mapping(fit["alpha"]), interval_from_mapping(fit["beta"]), shown]
