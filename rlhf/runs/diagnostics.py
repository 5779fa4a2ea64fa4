"""Check the conditions of alarms that depend on logged metrics, in training and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rlhf.common.numbers import centered_moving_average, short_number
from rlhf.runs.alarms import AlarmName, Halt, alarm_action
from rlhf.runs.learning_checks import LEARNING_CHECKS
from rlhf.runs.metric_log import (
    NUM_RECENT,
    MetricLog,
    RunningMetricLog,
    first_and_last_means,
    gold_metric_keys,
    mean_or_zero,
    reward_rose,
)
from rlhf.runs.renamed import metric_rows

_FRACTION_LIMITS = {
    "rollout/length_limited": (0.1, "replies hit the token limit"),
    "rollout/invalid": (0.1, "actions were invalid"),
    "rollout/truncated": (0.1, "episodes were truncated by a limit of tokens or steps"),
    "reward/unscored": (0.0, "episodes could not be scored"),
}
"""Metric -> (largest fraction without a warning, description)."""

_UNSCORED_PREFIX = "rewards/unscored/"
"""Prefix of the metrics ``rewards/unscored/NAME/REASON``, which are fractions of episodes."""

_ALARM_NAMES: dict[str, AlarmName] = {
    "finite": "metric_not_finite",
    "train/moved": "not_moved",
    "train/no_gradient": "no_gradient",
    "train/updates": "no_updates",
    "gold": "over_optimized",
    "policy/ratio_max": "policy_jump",
    "policy/kl": "policy_jump",
    "negative_kl": "negative_kl",
    "train/grad_norm": "exploding_gradient",
    "entropy": "entropy_collapse",
    "rollout/repetition": "repetition_collapse",
    "value/explained_variance": "dead_critic",
    "eval/loss": "overfitted",
    "rollout/length_limited": "length_limited",
    "rollout/truncated": "truncated",
    "reward/unscored": "unscored",
    "rollout/invalid": "invalid",
    "rollout/evasion_gain": "evasion",
    "rollout/missing_eos": "missing_eos",
    "rewards/std": "constant_reward",
    "groups/equal": "equal_groups",
    "saturated": "saturated",
    "unsolved": "unsolved",
    "dominant_reward": "dominant_reward",
    "sampler/ess": "low_effective_sample",
    "policy/clip_fraction_positive": "clipped",
    "policy/clip_fraction_negative": "clipped",
    "rollout/tokens": "length_drift",
}
"""Kind of a warning, as yielded by `metric_warnings` -> name of the alarm."""

_SIGN_STEPS = 10
"""Number of last logged steps in which a metric must have the same sign for a warning about its
sign. If the signs are random, the probability that all of them have this sign is 1/1,024."""
_GRADIENT_STEPS = 20
"""Number of previous logged steps with whose largest gradient norm a gradient norm is compared."""
_GRADIENT_FACTOR = 20.0
"""A gradient norm above this multiple of the largest previous norm is an exploding gradient."""
_CRITIC_STEPS = 20
"""Number of last logged steps in which the explained variance must be between -0.001 and 0.001 for
a warning about the critic."""
_CHECK_INTERVAL_DIVISOR = 50
"""The next check runs after the number of rows has grown by 1/50. The time of a check is
proportional to the number of rows."""


class TrainingMonitor:
    """Checks the logged metrics during training and returns each kind of warning once.

    Warnings of alarms with the action state are not returned.

    The monitor reads the rows that a resumed run logged earlier. Create the monitor after
    `Run.rewind`, which removes invalid rows.

    Args:
        directory: The run directory; None for a run without earlier rows.
        config: Configuration of the run, as plain data.
    """

    def __init__(self, directory: Path | None, config: Mapping[str, Any]) -> None:
        self.log = RunningMetricLog(config, metric_rows(directory) if directory else ())
        self.reported: set[str] = set()
        self.next_check = 0
        self.finished = False

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Add a logged row, and return the warnings that were not returned before.

        In a short run, the checks run after every row. In a long run, they run less often.

        Raises:
            Halt: The action of a new alarm is halt.
        """
        self.log.add({"step": step, **metrics})
        if self.log.length < self.next_check:
            return []
        self.next_check = self.log.length + max(1, self.log.length // _CHECK_INTERVAL_DIVISOR)
        return self._new_warnings(step)

    def finish(self, step: int) -> list[str]:
        """Check the whole run after its last step.

        Returns:
            The warnings that were not returned before.

        Raises:
            Halt: The action of a new alarm is halt.
        """
        self.finished = True
        return self._new_warnings(step)

    def _new_warnings(self, step: int) -> list[str]:
        """Run all checks; return the warnings that were not returned before.

        Raises:
            Halt: The action of a new alarm is halt.
        """
        warnings = []
        for kind, sentence in metric_warnings(self.log, f"over the last {NUM_RECENT} logged steps"):
            if kind in self.reported or not self._has_enough_values_to_warn(kind):
                continue
            self.reported.add(kind)
            name = alarm_name(kind)
            action = alarm_action(name, self.log.config)
            if action == "halt":
                raise Halt(name, f"alarm {name} at step {step}: {sentence}")
            if action == "warn":
                warnings.append(sentence)
        return warnings

    def _has_enough_values_to_warn(self, kind: str) -> bool:
        """Return whether the metric was logged often enough for a warning of this kind."""
        if kind == "train/updates":
            return self.finished
        if kind.startswith(_UNSCORED_PREFIX):
            return self.log.length >= NUM_RECENT
        if kind == "train/moved":  # the policy is frozen during critic warm-up
            warm_up = int(self.log.config.get("critic_warmup_steps") or 0)
            online = self.log.series("train/updates")[0]
            if not online:
                return len(self.log.series(kind)[0]) > 1
            return len([step for step in online if step > warm_up]) >= NUM_RECENT
        recent = kind in _FRACTION_LIMITS or kind.startswith("rollout/")
        return not recent or len(self.log.series(kind)[1]) >= NUM_RECENT


def repeat_metric_checks(directory: Path, config: Mapping[str, Any]) -> TrainingMonitor:
    """Check the logged metrics of a run directory again, row by row, as during training.

    Returns:
        The monitor after the last row.

    Raises:
        Halt: An alarm with the action halt occurs.
    """
    monitor, step = TrainingMonitor(None, config), 0
    for row in metric_rows(directory):
        step = row["step"]
        monitor.update(step, {key: row[key] for key in row.keys() - {"step", "time"}})
    monitor.finish(step)
    return monitor


def alarm_name(kind: str) -> AlarmName:
    """Return the name of the alarm in `ALARMS` to which a kind of warning belongs."""
    return "unscored" if kind.startswith(_UNSCORED_PREFIX) else _ALARM_NAMES[kind]


def metric_warnings(log: MetricLog, when: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for every warning about logged metrics, the most serious first.

    Args:
        log: Metrics and configuration of the run.
        when: Description of the last logged values, for example "at the end of training".
    """
    for check in _WARNING_FUNCTIONS:
        yield from check(log)
    for key, (limit, words) in _FRACTION_LIMITS.items():
        if (share := _recent_fraction(log, key)) > limit:
            yield key, f"{share:.0%} of {words} {when}."
    yield from _unscored_warnings(log, when)
    gains = log.series("rollout/evasion_gain")[1][-_SIGN_STEPS:]
    if len(gains) == _SIGN_STEPS and min(gains) > 0:
        yield (
            "rollout/evasion_gain",
            f"the mean score of episodes that have an invalid reply or are truncated is "
            f"{mean_or_zero(gains):.2g} above that of the other episodes over the last "
            f"{_SIGN_STEPS} logged steps (see rollout.invalid_reward and rollout.max_tokens).",
        )
    unstopped = _recent_mean_or_zero(log, "rollout/missing_eos")
    # Replies that reach the token limit have no stop token either. They have a separate warning.
    if unstopped > 0.1 and unstopped > _recent_mean_or_zero(log, "rollout/length_limited") + 0.02:
        yield "rollout/missing_eos", f"{unstopped:.0%} of replies have no stop token {when}."


def gold_metric_key(log: MetricLog) -> str | None:
    """Return the key of the gold score in the metrics; None if every gold score is missing or 0."""
    # A score that is always 0, such as that of an unused reward, does not measure anything.
    return next((key for key in gold_metric_keys(log.config) if any(log.series(key)[1])), None)


@dataclass(frozen=True)
class OverOptimizationPeak:
    """Peak of the gold score, after which it fell while the proxy score rose."""

    step: float
    gold: tuple[float, float]
    """Smoothed gold score at the peak and at the end."""
    proxy: tuple[float, float]
    """Smoothed proxy score at the peak and at the end."""


def over_optimization_peak(log: MetricLog) -> OverOptimizationPeak | None:
    """Return the peak of the gold score, if the gold score then fell and the proxy score rose.

    Both curves are smoothed before the comparison (Gao et al. 2022).

    Returns:
        The peak. The result is None if the gold score fell by less than 1/5 of its range, or if the
        proxy score did not rise. It is also None if there are too few values. The proxy score and a
        gold score on held-out episodes need 4 values. A gold score on training episodes is noisier
        and needs 20 values.
    """
    key = gold_metric_key(log)
    steps, gold = log.series(key) if key else ([], [])
    proxy_steps, proxy = log.series("reward/mean")
    enough = 20 if (key or "").startswith("reward/") else 4
    if len(gold) < enough or len(proxy) < 4:
        return None
    gold, proxy = _smoothed(gold), _smoothed(proxy)
    best = max(range(len(gold)), key=gold.__getitem__)
    then = min(range(len(proxy)), key=lambda i: abs(proxy_steps[i] - steps[best]))
    # The smoothed values of a constant score differ by rounding errors.
    spread = max(gold) - min(gold)
    rounding = 1e-9 * max(map(abs, gold))
    fell = gold[best] - gold[-1] >= 0.2 * spread and spread > rounding
    if not fell or proxy[-1] <= proxy[then]:
        return None
    return OverOptimizationPeak(steps[best], (gold[best], gold[-1]), (proxy[then], proxy[-1]))


def _smoothed(values: Sequence[float]) -> list[float]:
    return centered_moving_average(values, 2 * max(1, len(values) // 30) + 1)


def _unscored_warnings(log: MetricLog, when: str) -> Iterator[tuple[str, str]]:
    """Yield a warning for each pair of a reward and a reason with unscored episodes.

    A warning contains the fraction of unscored episodes. A fraction of 0 is not logged, so a
    missing value counts as 0.
    """
    recent = log.recent_rows()
    keys = dict.fromkeys(key for row in recent for key in row if key.startswith(_UNSCORED_PREFIX))
    for key in keys:
        name, _, reason = key.removeprefix(_UNSCORED_PREFIX).partition("/")
        share = mean_or_zero([float(row.get(key, 0.0)) for row in recent])
        words = reason.replace("_", " ")
        yield key, f"{share:.0%} of episodes could not be scored by {name} ({words}) {when}."


def _fell_significantly(values: Sequence[float]) -> bool:
    """Return whether the mean of the last quarter is significantly below the best mean.

    The best mean is the largest mean of a window of the same length. The difference must exceed 4
    standard errors. The noise is estimated from differences between neighboring values, so
    that a trend has little influence on the estimate. If the values are noise without a trend and
    the check runs after each of 100 values, about 2% of runs exceed the threshold.
    """
    size = max(2, len(values) // 4)
    sums = list(accumulate(values, initial=0.0))
    means = [(end - start) / size for start, end in zip(sums, sums[size:], strict=False)]
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    if not means or not squares:
        return False
    error = math.sqrt(math.fsum(squares) / len(squares) / 2) * math.sqrt(2 / size)
    return max(means) - means[-1] > 4 * error


def _recent_mean_or_zero(log: MetricLog, key: str) -> float:
    """Return the mean of the last `NUM_RECENT` values, or 0 if the metric was never logged."""
    return mean_or_zero(log.series(key)[1][-NUM_RECENT:])


def _recent_fraction(log: MetricLog, key: str) -> float:
    """Return the mean of the last `NUM_RECENT` values of a metric in `_FRACTION_LIMITS`.

    The result is a fraction of replies, actions or episodes.
    """
    value = _recent_mean_or_zero(log, key)
    if key not in ("rollout/length_limited", "rollout/invalid"):
        return value
    # These metrics are logged as numbers per episode, and an episode may have several turns.
    return value / max(1.0, _recent_mean_or_zero(log, "rollout/turns"))


def _not_finite_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    for key, step in log.first_not_finite_steps().items():
        yield "finite", f"{key} is not finite, first at step {step}."


def _unchanged_model_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if training did not change the model, for example because all advantages are 0."""
    steps, moved = log.series("train/moved")
    if moved and moved[-1] == 0:
        yield (
            "train/moved",
            f"training did not change the model: at step {short_number(steps[-1])} every trained "
            "weight has its initial value.",
        )
        return
    # Weights that are initialized to 0, such as B in LoRA, change at any learning rate, even at a
    # learning rate that is too small to change the outputs of the policy.
    kl, ratio = log.series("policy/kl")[1], log.series("policy/ratio_max")[1]
    if len(kl) >= NUM_RECENT and not any(kl) and all(abs(r - 1) <= 1e-6 for r in ratio):
        yield (
            "train/moved",
            f"the policy did not change: policy/kl is 0 in all {len(kl)} logged steps, and every "
            "importance ratio is 1.",
        )


def _no_gradient_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if trainable parameters have no gradient, for example if the model does not use them."""
    counts = log.series("train/no_gradient")[1]
    if len(counts) >= NUM_RECENT:
        yield (
            "train/no_gradient",
            f"{counts[-1]:.0f} of the parameter tensors have no gradient, so they are not trained, "
            "although others are. Either the model does not use them, or they are detached from "
            "the graph. The log contains the names of some of them.",
        )


def _over_optimized_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    peak = over_optimization_peak(log)
    if peak is None or not _fell_significantly(log.series(gold_metric_key(log) or "")[1]):
        return
    gold, proxy = ([short_number(v) for v in pair] for pair in (peak.gold, peak.proxy))
    step = short_number(peak.step)
    yield (
        "gold",
        f"the gold score fell from {gold[0]} at step {step} to {gold[1]}, and the proxy score rose "
        f"from {proxy[0]} to {proxy[1]}. Stop training near step {step}.",
    )


def _policy_jump_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    for key, limit in (("policy/ratio_max", 20.0), ("policy/kl", 100.0)):
        steps, values = log.series(key)
        above = [i for i, value in enumerate(values) if value > limit]
        if above:
            yield (
                key,
                f"{key} reached {short_number(max(values))} (first above {short_number(limit)} at "
                f"step {short_number(steps[above[0]])}).",
            )


def _entropy_collapse_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the entropy collapsed and the reward did not rise.

    A low entropy with a higher reward is normal for a solved task, so it is not reported.
    """
    entropy, reward = log.series("policy/entropy")[1], log.series("reward/mean")[1]
    if min(len(entropy), len(reward)) < 2 * NUM_RECENT:
        return
    before, after = first_and_last_means(entropy)
    if before >= 0.1 and after <= 0.05 * before and not reward_rose(log):
        first, last = first_and_last_means(reward)
        yield (
            "entropy",
            f"policy/entropy fell from {short_number(before)} to {short_number(after)} and the "
            f"reward did not rise ({short_number(first)} to {short_number(last)}): the policy is "
            "almost deterministic.",
        )


def _overfitted_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    steps, values = log.series("eval/loss")
    if len(values) < 3:
        return
    best = min(range(len(values)), key=values.__getitem__)
    if values[-1] > 1.05 * values[best]:
        # The initial model, which is evaluated at step 0, is never saved as final/.
        trained = [i for i, step in enumerate(steps) if step > 0]
        saved_index = min(trained, key=values.__getitem__, default=best)
        yield (
            "eval/loss",
            f"the held-out loss rose from {short_number(values[best])} at step "
            f"{short_number(steps[best])} to {short_number(values[-1])}; final/ contains the model "
            f"of step {short_number(steps[saved_index])}.",
        )


def _negative_kl_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the estimate of the KL is significantly negative.

    A negative estimate shows that the sampler and the trainer compute different log-probabilities.
    """
    values = log.series("policy/kl")[1][-_SIGN_STEPS:]
    if len(values) < _SIGN_STEPS or max(values) >= 0:
        return
    mean = mean_or_zero(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    if mean < -4 * math.sqrt(variance / len(values)):
        yield (
            "negative_kl",
            f"policy/kl was negative in each of the last {len(values)} logged steps (mean "
            f"{short_number(mean)}): the tokens were not sampled from the policy whose "
            "log-probabilities the trainer computes.",
        )


def _exploding_gradient_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if a gradient norm is far above the norms of the previous logged steps."""
    steps, norms = log.series("train/grad_norm")
    for i in range(_GRADIENT_STEPS, len(norms)):
        before = max(norms[i - _GRADIENT_STEPS : i])
        if norms[i] > _GRADIENT_FACTOR * before > 0:
            yield (
                "train/grad_norm",
                f"the gradient exploded: its norm was {short_number(norms[i])} at step "
                f"{short_number(steps[i])} and at most {short_number(before)} in the previous "
                f"{_GRADIENT_STEPS} logged steps.",
            )
            return


def _repetition_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the repetition in replies rose and the reward did not rise."""
    repetition, reward = log.series("rollout/repetition")[1], log.series("reward/mean")[1]
    if min(len(repetition), len(reward)) < 2 * NUM_RECENT:
        return
    before, after = first_and_last_means(repetition)
    if after >= max(0.5, before + 0.3) and not reward_rose(log):
        yield (
            "rollout/repetition",
            f"the fraction of repeated bigrams in replies rose from {before:.0%} in the first "
            f"{NUM_RECENT} logged steps to {after:.0%}, and the reward did not rise.",
        )


def _dead_critic_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Warn if the critic's values are unrelated to the returns."""
    explained = log.series("value/explained_variance")[1][-_CRITIC_STEPS:]
    if len(explained) == _CRITIC_STEPS and max(map(abs, explained)) < 1e-3:
        yield (
            "value/explained_variance",
            f"the critic does not predict the returns: value/explained_variance was between -0.001 "
            f"and 0.001 in each of the last {_CRITIC_STEPS} logged steps.",
        )


def _no_updates_warnings(log: MetricLog) -> Iterator[tuple[str, str]]:
    updates = log.series("train/updates")[1]
    if updates and not any(updates):
        yield (
            "train/updates",
            f"nothing was trained: train/updates is 0 in all {len(updates)} logged steps.",
        )


_WARNING_FUNCTIONS = (
    _not_finite_warnings,
    _no_updates_warnings,
    _unchanged_model_warnings,
    _no_gradient_warnings,
    _over_optimized_warnings,
    _policy_jump_warnings,
    _negative_kl_warnings,
    _exploding_gradient_warnings,
    _entropy_collapse_warnings,
    _repetition_warnings,
    _dead_critic_warnings,
    *LEARNING_CHECKS,
    _overfitted_warnings,
)
