"""Metrics of episodes: what values they can have, their independent units, and their intervals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.stats import Interval, interval

if TYPE_CHECKING:
    from rlhf.evaluation.records import Bounds

COUNTS = {"turns": 1.0, "cost": 0.0, "invalid": 0.0, "tokens": 0.0, "cut": 0.0}
"""Metrics that count something, with the smallest value of each."""

ITEM_KEYS = ("prompt_index", "item", "game")
"""Keys of `info` that name the entry of a fixed list that an episode started from."""


def metric_interval(
    metric: str,
    values: Sequence[float],
    units: Sequence[Hashable] | None = None,
    limits: Bounds | None = None,
) -> Interval:
    """The mean of a metric over episodes, with its interval over their independent units.

    Args:
        metric: name of the metric.
        values: [n] of the episodes.
        units: [n] what each episode started from, see `unit_of`; by default each is a unit.
        limits: of the environment, by which a normalized return was scaled.
    """
    if metric in COUNTS:
        least = COUNTS[metric] if min(values) >= COUNTS[metric] else -math.inf
        return interval(values, units, kind="count", bounds=(least, math.inf))
    return interval(values, units, kind="mean", bounds=outcome_range(metric, values, limits))


def outcome_range(
    metric: str, values: Sequence[float], limits: Bounds | None = None
) -> tuple[float, float] | None:
    """Smallest and largest possible value of a metric; None where they are unknown.

    An outcome that was 0 or 1 in every episode counts as one that can be nothing else, and so does
    its normalized value.
    """
    if metric == "success" or "pass@" in metric:
        return 0.0, 1.0
    if metric in COUNTS:
        return None
    low, high = 0.0, 1.0
    if metric == "normalized" and limits is not None:
        low, high = sorted((limits.normalise(0.0), limits.normalise(1.0)))
    data = np.asarray(values, dtype=float)
    return (low, high) if ((data == low) | (data == high)).all() else None


def unit_of(row: Mapping[str, Any]) -> Hashable:
    """The independent unit that an episode belongs to.

    Episodes of one prompt, or of one entry of another fixed list, are one unit: the next ones would
    be drawn from other entries. Where the environment draws each start state anew, the unit is the
    seed that it was drawn with. Samples of one seed are one unit in both.
    """
    if row.get("prompt_id") is not None:
        return str(row["prompt_id"])
    if row.get("env") == "prompts" and row.get("messages"):
        # Written before prompts had an id: one reply, after everything that was shown.
        return content_id(row["messages"][:-1])
    return int(row["seed"])


def unit_name(units: Sequence[Hashable]) -> str:
    """What the units of some episodes are called: prompts, start states or episodes."""
    if any(isinstance(unit, str) for unit in units):
        return "prompts"
    return "start states" if len(set(units)) < len(units) else "episodes"


def item_id(messages: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str | None:
    """Id of the entry of a fixed list that an episode starts from; None where there is no list.

    Equal texts are one entry, wherever they stand in the list.

    Args:
        messages: what the environment shows first.
        info: of its `reset`.
    """
    if not any(key in info for key in ITEM_KEYS):
        return None
    # Games may differ in what their first text does not tell.
    hidden = [{"game": info["game"]}] if info.get("game") is not None else []
    return content_id([*messages, *hidden])


def opening_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages before the first reply."""
    roles = [message.get("role") for message in messages]
    return list(messages[: roles.index("assistant")] if "assistant" in roles else messages)


def content_id(messages: Sequence[Mapping[str, Any]]) -> str:
    """A short digest of messages."""
    text = json.dumps([dict(message) for message in messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
