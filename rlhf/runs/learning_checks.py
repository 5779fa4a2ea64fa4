"""Check the conditions of alarms about what a policy can learn from its scores and tokens.

Each function yields (kind, sentence) for the conditions that are met; see `diagnostics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf.common.numbers import is_number, short_number
from rlhf.runs.metric_log import (
    NUM_RECENT,
    MetricLog,
    first_and_last_means,
    mean_or_zero,
    reward_rose,
)

VARIANCE_SHARE_PREFIX = "rewards/variance_share/"
"""Prefix of the metrics ``rewards/variance_share/NAME``."""
WINDOW = 10
"""Number of last logged steps of a condition on equal scores, or on clipped tokens."""
_UNSOLVED_STEPS = 20
"""Number of last logged steps without a solved episode for a warning."""
_EQUAL_GROUPS = 0.9
"""Smallest proportion of groups with equal scores for a warning."""
_SATURATED = 0.95
"""Smallest proportion of solved episodes at the start of a run for a warning."""
_DOMINANT_SHARE = 0.99
"""Smallest share of the variance of the score that a dominant term of the score has."""
_LENGTH_FACTOR = 2.0
"""Smallest factor between the mean lengths at the start and at the end for a warning."""
_CLIPPED = 0.9
"""A warning is given above this proportion of clipped tokens. In GSPO, most tokens are clipped in
healthy runs."""
_EFFECTIVE_SAMPLE = 0.5
"""A warning is given below this effective sample size, as a fraction of the tokens."""


def _constant_reward_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if all episodes of each recent step have the same score, and the reward did not rise."""
    deviations = log.series("rewards/std")[1][-WINDOW:]
    rewards = log.series("reward/mean")[1]
    if len(deviations) < WINDOW or any(deviations) or not rewards or reward_rose(log):
        return
    yield (
        "rewards/std",
        f"all episodes had the same score in each of the last {WINDOW} logged steps, and the "
        f"reward did not rise (reward/mean: {short_number(rewards[-1])}): no episode is rewarded "
        "more than another.",
    )


def _equal_groups_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if most groups have equal scores, but groups differ, and the reward did not rise."""
    equal = log.series("groups/equal")[1][-WINDOW:]
    constant = not any(log.series("rewards/std")[1][-WINDOW:])
    if len(equal) < WINDOW or mean_or_zero(equal) < _EQUAL_GROUPS or constant or reward_rose(log):
        return
    sentence = (
        f"the scores were equal within {mean_or_zero(equal):.0%} of the groups over the last "
        f"{WINDOW} logged steps, and the reward did not rise: the advantages of these groups are 0."
    )
    solved, unsolved = (
        log.series(key)[1][-WINDOW:] for key in ("groups/all_solved", "groups/none_solved")
    )
    if solved and unsolved:
        sentence += (
            f" Every episode was solved in {mean_or_zero(solved):.0%} of the groups, and none in "
            f"{mean_or_zero(unsolved):.0%}."
        )
    yield "groups/equal", sentence


def _solved_before_training_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the policy solved the task before it was trained."""
    first = log.series("rollout/success")[1][:NUM_RECENT]
    if len(first) == NUM_RECENT and mean_or_zero(first) >= _SATURATED:
        yield (
            "saturated",
            f"{mean_or_zero(first):.0%} of the episodes of the first {NUM_RECENT} logged steps "
            "were solved: the policy solved the task before it was trained.",
        )


def _unsolved_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if no episode is solved and the reward did not rise."""
    success = log.series("rollout/success")[1][-_UNSOLVED_STEPS:]
    if len(success) == _UNSOLVED_STEPS and not any(success) and not reward_rose(log):
        yield (
            "unsolved",
            f"no episode was solved in any of the last {_UNSOLVED_STEPS} logged steps, and the "
            "reward did not rise.",
        )


def _dominant_reward_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if one term of the score has almost all of its variance, and another term varies too."""
    rows = [_variance_shares(row) for row in log.recent_rows()]
    if len(rows) < NUM_RECENT or not all(rows):
        return
    largest = {max(row, key=row.__getitem__) for row in rows}
    small = [
        name
        for name in rows[-1]
        if all(0 < row.get(name, 0.0) <= 1 - _DOMINANT_SHARE for row in rows)
    ]
    if len(largest) != 1 or not small:
        return
    (name,) = largest
    share = min(row[name] for row in rows)
    if share >= _DOMINANT_SHARE:
        yield (
            "dominant_reward",
            f"{name} has at least {100 * share:.4g}% of the variance of the score in each of the "
            f"last {NUM_RECENT} logged steps; {', '.join(small)} also varied, with at most "
            f"{1 - _DOMINANT_SHARE:.0%}.",
        )


def _variance_shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Return name -> share of the variance for the terms of the score in a logged row."""
    return {
        key.removeprefix(VARIANCE_SHARE_PREFIX): float(value)
        for key, value in row.items()
        if key.startswith(VARIANCE_SHARE_PREFIX) and is_number(value)
    }


def _length_drift_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the episodes became much longer or shorter, and the reward did not rise."""
    tokens = log.series("rollout/tokens")[1]
    if len(tokens) < 2 * NUM_RECENT or reward_rose(log):
        return
    before, after = first_and_last_means(tokens)
    if min(before, after) > 0 and not 1 / _LENGTH_FACTOR < after / before < _LENGTH_FACTOR:
        yield (
            "rollout/tokens",
            f"the number of sampled tokens per episode changed from {short_number(before)} in the "
            f"first {NUM_RECENT} logged steps to {short_number(after)} in the last {NUM_RECENT}, "
            "and the reward did not rise.",
        )


def _clipped_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the ratios of almost all tokens of one sign of the advantage are clipped."""
    for sign in ("positive", "negative"):
        key = f"policy/clip_fraction_{sign}"
        values = log.series(key)[1][-WINDOW:]
        if len(values) == WINDOW and mean_or_zero(values) > _CLIPPED:
            yield (
                key,
                f"the importance ratio was clipped for {mean_or_zero(values):.0%} of the tokens "
                f"with a {sign} advantage over the last {WINDOW} logged steps.",
            )


def _effective_sample_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the tokens were sampled from a policy that differs much from the trained one."""
    sizes = log.series("sampler/ess")[1][-NUM_RECENT:]
    if len(sizes) == NUM_RECENT and mean_or_zero(sizes) < _EFFECTIVE_SAMPLE:
        yield (
            "sampler/ess",
            f"the effective sample size of the sampled tokens was {mean_or_zero(sizes):.0%} of "
            f"their number over the last {NUM_RECENT} logged steps: the probabilities of the "
            "sampler and of the trainer differ.",
        )


LEARNING_CHECKS: tuple[Callable[[MetricLog], Iterator[tuple[str, str]]], ...] = (
    _constant_reward_warnings,
    _solved_before_training_warnings,
    _unsolved_warnings,
    _equal_groups_warnings,
    _dominant_reward_warnings,
    _effective_sample_warnings,
    _clipped_warnings,
    _length_drift_warnings,
)
"""Functions that check the conditions of this module, the most serious first."""
