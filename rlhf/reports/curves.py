"""Select the metrics of a run for the chart panels of a report.

Metrics that belong together have a common panel in `_PANELS`. A metric that no other chart or table
shows, such as that of a plug-in, has a panel of its own under "Other metrics".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf.common.numbers import short_number
from rlhf.evaluation.records import RunRecord
from rlhf.reports.charts import Chart, Series
from rlhf.reports.tables import logged_metric_names
from rlhf.runs.diagnostics import gold_metric_key, over_optimization_peak

_Panel = tuple[str, str, tuple[tuple[str, str], ...]]
"""Title, unit of the vertical axis, and (metric, name of the line) of each line of a panel."""

_PANELS: tuple[_Panel, ...] = (
    ("Loss", "nats", (("train/loss", "train"), ("eval/loss", "held out"))),
    ("Accuracy", "share", (("train/accuracy", "train"), ("eval/accuracy", "held out"))),
    (
        "Token accuracy",
        "share of tokens",
        (("train/token_accuracy", "train"), ("eval/token_accuracy", "held out")),
    ),
    (
        "Margin, chosen − rejected",
        "score",
        (("train/margin", "train"), ("eval/margin", "held out")),
    ),
    ("Entropy per token", "nats", (("policy/entropy", "entropy"),)),
    ("Reply length in tokens", "tokens", (("rollout/tokens", "length"),)),
    ("Turns", "turns per episode", (("rollout/turns", "turns"),)),
    (
        "Replies per episode",
        "replies",
        (
            ("rollout/length_limited", "length limited"),
            ("rollout/missing_eos", "no stop token"),
            ("rollout/invalid", "invalid"),
        ),
    ),
    ("Solved training episodes", "share of episodes", (("rollout/success", "solved"),)),
    (
        "Share of groups",
        "share of groups",
        (
            ("groups/equal", "equal scores"),
            ("groups/all_solved", "all solved"),
            ("groups/none_solved", "none solved"),
        ),
    ),
    ("Policy loss", "", (("policy/loss", "loss"),)),
    (
        "Clipped share",
        "share of tokens",
        (
            ("policy/clip_fraction", "all tokens"),
            ("policy/clip_fraction_positive", "advantage > 0"),
            ("policy/clip_fraction_negative", "advantage < 0"),
        ),
    ),
    ("Largest ratio", "ratio", (("policy/ratio_max", "ratio"),)),
    (
        "Critic: explained variance",
        "share of variance",
        (("value/explained_variance", "explained"),),
    ),
    ("Critic loss", "squared return", (("value/loss", "loss"),)),
    ("KL coefficient", "reward per nat", (("kl/coef", "coefficient"),)),
    ("Cost", "cost per episode", (("rollout/cost", "cost"), ("eval/cost", "held out"))),
    ("Learning rate", "", (("train/learning_rate", "rate"),)),
)
_TABLE_METRICS = ("time/", "profile/")
"""Beginnings of the metrics that the report shows in a table."""


def is_online(run: RunRecord) -> bool:
    """Return whether a run logged the rewards of training episodes, as online training does."""
    return any("reward/mean" in row for row in run.metrics)


def reward_charts(run: RunRecord) -> list[Chart]:
    """Return the panels of the proxy reward, the gold reward and the KL to the initial policy.

    The last one is omitted if the run did not log the KL.
    """
    gold = gold_metric_key(run)
    source = "held-out episodes" if (gold or "").startswith("eval/") else "training episodes"
    peak = over_optimization_peak(run)
    mark = (peak.step, "gold peaks") if peak else None
    missing = "" if gold else "No gold score and no held-out score were measured."
    kl = Series("KL", *run.series("policy/kl"), color="c5")
    charts = [
        Chart(
            "Proxy reward",
            [Series("proxy", *run.series("reward/mean"), color="proxy")],
            "Training objective (reward/mean), on training episodes.",
            mark=mark,
            y_label="score per episode",
        ),
        Chart(
            "Gold reward",
            [Series("gold", *run.series(gold), color="gold")] if gold else [],
            missing or f"Intended objective ({gold}), on {source}.",
            mark=mark,
            y_label="score per episode",
        ),
        Chart(
            "KL to the start",
            [kl],
            "Nats per episode from the initial policy.",
            mark=mark,
            y_label="nats per episode",
        ),
    ]
    return charts if kl.x else charts[:2]  # a run without a reference does not compute it


def learning_charts_and_constants(run: RunRecord) -> tuple[list[Chart], list[str]]:
    """Return charts of the metrics in `_PANELS` and of the reward components.

    Returns:
        The charts, and texts such as "Learning rate 0.0001" for panels in which every line is
        constant.
    """
    panels = list(_PANELS)
    components = _component_keys_and_names(logged_metric_names(run))
    if len(components) > 1:
        panels.append(("Reward components", "score per episode", tuple(components)))
    return _charts_and_constants(run, panels)


def metric_keys_without_panel(run: RunRecord) -> list[str]:
    """Return the metrics of a run that no other chart or table of the report shows."""
    logged = logged_metric_names(run)
    shown = {key for _, _, lines in _PANELS for key, _ in lines}
    shown |= {key for key, _ in _component_keys_and_names(logged)}
    if is_online(run):
        shown |= {"reward/mean", "policy/kl", gold_metric_key(run)}
    return [key for key in logged if key not in shown and not key.startswith(_TABLE_METRICS)]


def metric_charts_and_constants(
    run: RunRecord, keys: Iterable[str]
) -> tuple[list[Chart], list[str]]:
    """Return a chart of each metric that changes, and texts such as "train/moved 1" for others."""
    panels = [(key, "", ((key, key.rpartition("/")[2]),)) for key in keys]
    return _charts_and_constants(run, panels)


def _charts_and_constants(
    run: RunRecord, panels: Iterable[_Panel]
) -> tuple[list[Chart], list[str]]:
    charts, constant = [], []
    for title, unit, keys in panels:
        lines = _panel_series(run, keys)
        if not lines:
            continue
        if len(lines[0].x) > 1 and all(min(line.y) == max(line.y) for line in lines):
            constant.append(f"{title} {short_number(lines[0].y[0])}")
        else:
            charts.append(Chart(title, lines, y_label=unit))
    return charts, constant


def _component_keys_and_names(logged: Sequence[str]) -> list[tuple[str, str]]:
    """Return (metric key, component name) of up to six reward components among logged metrics."""
    skipped = {"reward/mean", "reward/unscored"}
    return [
        (key, key.removeprefix("reward/"))
        for key in logged
        if key.startswith("reward/") and key not in skipped
    ][:6]


def _panel_series(run: RunRecord, keys: Sequence[tuple[str, str]]) -> list[Series]:
    """Return the lines of a panel; `keys` are pairs of metric key and name of the line."""
    lines = []
    for key, name in keys:
        x, y = run.series(key)
        # Omit a line that equals an earlier line, or is always zero in a panel of several metrics.
        repeated = any(line.y == y for line in lines)
        if x and (any(y) or len(keys) == 1) and not repeated:
            lines.append(Series(name, x, y, color=f"c{len(lines) % 6 + 1}"))
    return lines
