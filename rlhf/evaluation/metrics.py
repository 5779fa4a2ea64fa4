"""Determine the possible values, the independent units and the intervals of episode metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf.common.conversation import messages_for_models
from rlhf.evaluation.metric_limits import MetricLimits
from rlhf.stats import Interval, interval
from rlhf.stats.samples import pass_at_k
from rlhf.stats.shares import two_frequent_values

UnitName = Literal["prompts", "start states", "episodes"]

_BINARY_KINDS: dict[str, tuple[float, float]] = {
    kind: (0.0, 1.0)
    for kind in ("exact_match", "number", "math", "code", "regex", "format", "refusal")
}
"""Outcomes of rewards by name, for summaries of earlier versions, which have no `outcomes`."""

COUNT_METRICS = {"cost": 0.0, "turns": 1.0, "invalid": 0.0, "tokens": 0.0, "length_limited": 0.0}
"""Name of a metric that is a count -> its smallest possible value."""

_COUNTS_OF_TURNS = frozenset({"turns", "invalid", "length_limited"})
"""Metrics that count turns, so that the turn limit of the environment is their largest value."""

ITEM_KEYS = ("prompt_index", "item", "game")
"""Keys of `info` that identify the entry of a fixed list with which an episode starts."""


def metric_interval(
    metric: str,
    values: Sequence[float],
    units: Sequence[Hashable] | None = None,
    limits: MetricLimits | None = None,
) -> Interval:
    """Return the mean of a metric over episodes, with its interval over their independent units.

    Args:
        metric: Name of the metric.
        values: Value of each episode, [n].
        units: Unit of each episode, [n], see `independent_unit_of`; by default each episode is one.
        limits: Known limits of the metrics. The returns are used for the metrics "return" and
            "normalized", the turn limit for metrics that count turns, and the outcomes for rewards.
    """
    turns = limits.turn_limit if limits else None
    if metric not in COUNT_METRICS:
        return interval(values, units, kind="mean", bounds=binary_values(metric, values, limits))
    least = COUNT_METRICS[metric] if min(values) >= COUNT_METRICS[metric] else -math.inf
    most = math.inf
    # The counts may exceed the limit in a file that was edited.
    if turns is not None and metric in _COUNTS_OF_TURNS and max(values) <= turns:
        most = float(turns)
    return interval(values, units, kind="count", bounds=(least, most))


def binary_values(
    metric: str, values: Sequence[float], limits: MetricLimits | None = None
) -> tuple[float, float] | None:
    """Return the two possible values of a binary metric, the smaller first; None for other metrics.

    For `success` and pass@k, the values are 0 and 1. For a reward, they are its declared outcomes
    if every value is one of them. For the return, they are 0 and 1 if every value is 0 or 1 and the
    known returns are in [0, 1]. The normalized return has the normalized values of 0 and 1. In
    every other case, except for counts, the result is that of `two_frequent_values`.
    """
    if metric == "success" or "pass@" in metric:
        return 0.0, 1.0
    if metric in COUNT_METRICS:
        return None
    returns, outcomes = (limits.reference_returns, limits.outcomes) if limits else (None, None)
    if outcomes is None:
        outcomes = _BINARY_KINDS
    declared = outcomes.get(metric)
    if metric in ("return", "normalized"):
        declared = (0.0, 1.0) if returns and returns.within(0.0, 1.0) else None
        if declared and returns and metric == "normalized":
            declared = returns.normalize(0.0), returns.normalize(1.0)
    if declared and np.isin(values, declared).all():
        return declared
    return two_frequent_values(values)


def pass_at_k_by_seed(
    values_by_metric_and_seed: Mapping[str, Mapping[Hashable, Sequence[float]]],
) -> dict[str, dict[Hashable, float]]:
    """Return pass@k of each seed, for every binary metric for which a seed has several samples.

    Args:
        values_by_metric_and_seed: Metric -> seed -> value of the metric for each sample.

    Returns:
        Name -> seed -> pass@k. The name is `pass@k` for `success` and `METRIC/pass@k` for other
        metrics. k is 1, 2, 4, ... and the largest number of samples. A seed is omitted for every k
        that exceeds its number of scored samples. Returns and counts are omitted.
    """
    columns: dict[str, dict[Hashable, float]] = {}
    for name, seeds in values_by_metric_and_seed.items():
        most = max(len(values) for values in seeds.values())
        binary = all(value in (0.0, 1.0) for values in seeds.values() for value in values)
        if most == 1 or not binary or name in COUNT_METRICS or name in ("return", "normalized"):
            continue
        prefix = "" if name == "success" else f"{name}/"
        for k in sorted({2**i for i in range(most.bit_length())} | {most}):
            columns[f"{prefix}pass@{k}"] = {
                seed: pass_at_k(k, correct=int(sum(values)), drawn=len(values))
                for seed, values in seeds.items()
                if len(values) >= k
            }
    return columns


def independent_unit_of(row: Mapping[str, Any]) -> Hashable:
    """Return the independent unit of an episode.

    If episodes start from entries of a fixed list, such as prompts, the unit is the entry,
    represented by its `prompt_id`. If the environment draws each start state at random, the unit is
    the seed. In both cases, all samples of one seed belong to the same unit.
    """
    if row.get("prompt_id") is not None:
        return str(row["prompt_id"])
    if row.get("env") == "prompts" and row.get("messages"):
        # Files of version 0.1.0 have no prompt id. The last message is the reply, and the other
        # messages are the prompt.
        return messages_digest(row["messages"][:-1])
    return int(row["seed"])


def unit_name(units: Sequence[Hashable]) -> UnitName:
    """Return the name of the units of a list of episodes, given the unit of each episode.

    Entries of a fixed list are called "prompts". Seeds are called "start states" if a seed has
    several episodes, and "episodes" otherwise.
    """
    if any(isinstance(unit, str) for unit in units):
        return "prompts"
    return "start states" if len(set(units)) < len(units) else "episodes"


def start_entry_id(messages: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str | None:
    """Return the id of the entry of a fixed list with which an episode starts.

    Entries with equal texts and equal `game` have the same id. The result is None if the
    environment has no list, that is, if `info` has none of `ITEM_KEYS`.

    Args:
        messages: Messages before the first reply.
        info: `info` that the environment's `reset` returned.
    """
    if not any(key in info for key in ITEM_KEYS):
        return None
    # Different games may have the same first text.
    hidden = [{"game": info["game"]}] if info.get("game") is not None else []
    return _digest_of_all_keys([*messages_for_models(messages), *hidden])


def messages_before_first_reply(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages before the first reply; all messages if there is no reply."""
    roles = [message.get("role") for message in messages]
    return list(messages[: roles.index("assistant")] if "assistant" in roles else messages)


def messages_digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of messages: the first 16 hexadecimal digits of their SHA-256.

    Keys that only rewards read do not change it.
    """
    return _digest_of_all_keys(messages_for_models(messages))


def _digest_of_all_keys(messages: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([dict(message) for message in messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
