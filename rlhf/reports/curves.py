"""Which metrics of a run become which panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.evaluation.records import RunRecord
from rlhf.reports.charts import Chart, Series, short, smoothed

GOLD_KEYS = ("eval/gold", "reward/gold", "eval/return", "eval/env", "reward/env")
"""Looked for in this order; `eval/return` and `reward/env` are the environment's own reward."""

_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("train/loss", "train"), ("eval/loss", "held out"))),
    ("Accuracy", (("train/accuracy", "train"), ("eval/accuracy", "held out"))),
    ("Token accuracy", (("train/token_accuracy", "train"), ("eval/token_accuracy", "held out"))),
    ("Margin, chosen − rejected", (("train/margin", "train"), ("eval/margin", "held out"))),
    ("Entropy per token", (("policy/entropy", "entropy"),)),
    ("Reply length in tokens", (("rollout/length", "length"),)),
    ("Turns", (("rollout/turns", "turns"),)),
    (
        "Share of replies",
        (
            ("rollout/cut", "cut"),
            ("rollout/missing_eos", "no stop token"),
            ("rollout/invalid", "invalid"),
        ),
    ),
    ("Policy loss", (("policy/loss", "loss"),)),
    ("Clipped share", (("policy/clip_fraction", "clipped"),)),
    ("Largest ratio", (("policy/ratio_max", "ratio"),)),
    ("Critic: explained variance", (("critic/explained_variance", "explained"),)),
    ("Critic loss", (("critic/loss", "loss"),)),
    ("KL coefficient", (("kl/coef", "coefficient"),)),
    ("Cost", (("rollout/cost", "cost"), ("eval/cost", "held out"))),
    ("Learning rate", (("train/learning_rate", "rate"),)),
)


def is_online(run: RunRecord) -> bool:
    """Whether a run logged a reward of its own rollouts."""
    return any("reward/mean" in row for row in run.metrics)


def gold_key(run: RunRecord) -> str | None:
    """The metric that tells what the proxy cannot; None when the run measured none."""
    specs = run.config.get("gold") or []
    names = [str(spec.get("name") or spec.get("kind")) for spec in specs]
    own = [f"{split}/{name}" for split in ("eval", "reward") for name in names]
    # A prompt set has no reward of its own: its return is 0 throughout and judges nothing.
    return next((key for key in (*own, *GOLD_KEYS) if any(run.series(key)[1])), None)


@dataclass(frozen=True)
class Peak:
    """Where the gold score turned while the proxy went on rising."""

    step: float
    gold: tuple[float, float]
    """At the peak and at the end."""
    proxy: tuple[float, float]


def over_optimized(run: RunRecord) -> Peak | None:
    """The turning point of Gao et al. (2022), or None while gold holds within a fifth of its range.

    Both curves are smoothed first. Gold measured on training episodes needs 20 points, for noise.
    """
    key = gold_key(run)
    steps, gold = run.series(key) if key else ([], [])
    proxy_steps, proxy = run.series("reward/mean")
    enough = 20 if (key or "").startswith("reward/") else 4
    if len(gold) < enough or len(proxy) < 4:
        return None
    gold, proxy = smoothed(gold), smoothed(proxy)
    best = max(range(len(gold)), key=gold.__getitem__)
    then = min(range(len(proxy)), key=lambda i: abs(proxy_steps[i] - steps[best]))
    fell = gold[best] - gold[-1] >= 0.2 * (max(gold) - min(gold)) > 0
    if not fell or proxy[-1] <= proxy[then]:
        return None
    return Peak(steps[best], (gold[best], gold[-1]), (proxy[then], proxy[-1]))


def reward_charts(run: RunRecord) -> list[Chart]:
    """The proxy that was trained on, the gold score beside it, and the distance traveled."""
    gold = gold_key(run)
    where = "held-out episodes" if (gold or "").startswith("eval/") else "training episodes"
    peak = over_optimized(run)
    mark = (peak.step, "gold peaks") if peak else None
    missing = "" if gold else "No gold or held-out score was measured: the proxy stands alone."
    return [
        Chart(
            "Proxy reward",
            [Series("proxy", *run.series("reward/mean"), color="proxy")],
            "What training maximizes (reward/mean), on training episodes.",
            mark=mark,
        ),
        Chart(
            "Gold reward",
            [Series("gold", *run.series(gold), color="gold")] if gold else [],
            missing or f"What was wanted ({gold}), on {where}.",
            mark=mark,
        ),
        Chart(
            "KL to the start",
            [Series("KL", *run.series("policy/kl"), color="c5")],
            "Nats per episode from the policy that training began with.",
            mark=mark,
        ),
    ]


def learning_charts(run: RunRecord) -> tuple[list[Chart], list[str]]:
    """Every panel for which the run logged something; what never moved is told in words."""
    panels = [(title, _lines(run, keys)) for title, keys in _PANELS]
    components = _components(run)
    if len(components) > 1:
        panels.append(("Reward components", _lines(run, components)))
    charts, constant = [], []
    for title, lines in panels:
        if not lines:
            continue
        if len(lines[0].x) > 1 and all(min(line.y) == max(line.y) for line in lines):
            constant.append(f"{title} {short(lines[0].y[0])}")
        else:
            charts.append(Chart(title, lines))
    return charts, constant


def _components(run: RunRecord) -> list[tuple[str, str]]:
    logged = dict.fromkeys(key for row in run.metrics for key in row)
    skipped = {"reward/mean", "reward/unscored", "reward/std"}
    return [
        (key, key.removeprefix("reward/"))
        for key in logged
        if key.startswith("reward/") and key not in skipped
    ][:6]


def _lines(run: RunRecord, keys: Sequence[tuple[str, str]]) -> list[Series]:
    lines = []
    for key, name in keys:
        x, y = run.series(key)
        # A share that never left zero, or repeats the line before it, says nothing.
        repeated = any(line.y == y for line in lines)
        if x and (any(y) or len(keys) == 1) and not repeated:
            lines.append(Series(name, x, y, color=f"c{len(lines) % 6 + 1}"))
    return lines
