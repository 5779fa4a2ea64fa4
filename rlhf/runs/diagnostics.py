"""Find alarms in the logged metrics of a run, during training and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.common.numbers import moving_average, short_number
from rlhf.runs.alarms import AlarmName, Halt, action_of
from rlhf.runs.metric_log import RECENT, MetricLog, RunningLog, gold_keys
from rlhf.runs.renamed import metric_rows

_SHARES = {
    "rollout/length_limited": (0.1, "replies hit the token limit"),
    "rollout/invalid": (0.1, "actions were invalid"),
    "rollout/truncated": (0.1, "episodes were truncated by a limit of tokens or steps"),
    "reward/unscored": (0.0, "episodes could not be scored"),
}
"""Metric -> (largest share without a warning, description)."""

_UNSCORED = "rewards/unscored/"
"""Prefix of ``rewards/unscored/NAME/REASON``: share of episodes."""

_ALARM_NAMES: dict[str, AlarmName] = {
    "finite": "metric_not_finite",
    "train/moved": "not_moved",
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
}
"""Kind of `log_warnings` -> row of the table of alarms."""

_SIGN_STEPS = 10
"""Number of steps in which a sign must persist; the chance of this is 1 in 1,024."""
_GRADIENT_STEPS = 20
"""Number of logged steps whose largest gradient norm is the reference for an explosion."""
_GRADIENT_FACTOR = 20.0
"""Gradient norms above this multiple of the reference are explosions."""
_CRITIC_STEPS = 20
"""Number of logged steps in which a critic must explain no variance."""
_CHECKS = 50
"""A check takes time proportional to the number of rows, so the next one follows after 1/50 more
rows."""


class TrainingMonitor:
    """Generates warnings during training, each kind once.

    If the run is resumed, the monitor includes earlier rows, so create it after the log is rewound.

    Args:
        directory: The run directory; None for a run without earlier rows.
        config: Configuration of the run.
    """

    def __init__(self, directory: Path | None, config: Mapping[str, Any]) -> None:
        self.log = RunningLog(config, metric_rows(directory) if directory else ())
        self.reported: set[str] = set()
        self.next_check = 0
        self.finished = False

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Add a logged row and return new warnings.

        The checks run after every row of a short run and less often in a long one.

        Raises:
            Halt: The action of a new alarm is halt.
        """
        self.log.add({"step": step, **metrics})
        if self.log.length < self.next_check:
            return []
        self.next_check = self.log.length + max(1, self.log.length // _CHECKS)
        return self._new_warnings(step)

    def finish(self, step: int) -> list[str]:
        """Check the whole run after its last step, as `update` does."""
        self.finished = True
        return self._new_warnings(step)

    def _new_warnings(self, step: int) -> list[str]:
        warnings = []
        for kind, sentence in log_warnings(self.log, f"over the last {RECENT} logged steps"):
            if kind in self.reported or not self._has_enough_values(kind):
                continue
            self.reported.add(kind)
            name = alarm_name(kind)
            action = action_of(name, self.log.config)
            if action == "halt":
                raise Halt(name, f"alarm {name} at step {step}: {sentence}")
            if action == "warn":
                warnings.append(sentence)
        return warnings

    def _has_enough_values(self, kind: str) -> bool:
        """Return whether the metric of a warning was logged often enough during training."""
        if kind == "train/updates":
            return self.finished
        if kind.startswith(_UNSCORED):
            return self.log.length >= RECENT
        if kind == "train/moved":  # the policy is frozen during critic warm-up
            warm_up = int(self.log.config.get("critic_warmup_steps") or 0)
            online = self.log.series("train/updates")[0]
            if not online:
                return len(self.log.series(kind)[0]) > 1
            return len([step for step in online if step > warm_up]) >= RECENT
        recent = kind in _SHARES or kind.startswith("rollout/")
        return not recent or len(self.log.series(kind)[1]) >= RECENT


def check_again(directory: Path, config: Mapping[str, Any]) -> TrainingMonitor:
    """Repeat the checks of the metrics in a run directory, row by row, as during training.

    Raises:
        Halt: The action of an alarm is halt.
    """
    monitor, step = TrainingMonitor(None, config), 0
    for row in metric_rows(directory):
        step = row["step"]
        monitor.update(step, {key: row[key] for key in row.keys() - {"step", "time"}})
    monitor.finish(step)
    return monitor


def alarm_name(kind: str) -> AlarmName:
    """Return the row of `ALARMS` to which a kind of `log_warnings` belongs."""
    return "unscored" if kind.startswith(_UNSCORED) else _ALARM_NAMES[kind]


def log_warnings(log: MetricLog, when: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) of every warning about logged metrics, most serious first.

    ``when`` describes the last logged values, for example "at the end of training".
    """
    for check in _CHECKED:
        yield from check(log)
    for key, (limit, words) in _SHARES.items():
        if (share := _recent_share(log, key)) > limit:
            yield key, f"{share:.0%} of {words} {when}."
    yield from _unscored_reasons(log, when)
    gains = log.series("rollout/evasion_gain")[1][-_SIGN_STEPS:]
    if len(gains) == _SIGN_STEPS and min(gains) > 0:
        yield (
            "rollout/evasion_gain",
            f"episodes with an invalid reply, or truncated by a limit, earn {_mean(gains):.2g} "
            f"more than the others {when}: the reward favors evading the task (see "
            "rollout.invalid_reward and rollout.max_tokens).",
        )
    unstopped = _recent_mean(log, "rollout/missing_eos")
    # Truncated replies, which also lack a stop token, have a separate warning.
    if unstopped > 0.1 and unstopped > _recent_mean(log, "rollout/length_limited") + 0.02:
        yield "rollout/missing_eos", f"{unstopped:.0%} of replies lack a stop token {when}."


def gold_key(log: MetricLog) -> str | None:
    """Return the key of the gold metric; None if the run measured none."""
    # The return of a prompt set is always 0.
    return next((key for key in gold_keys(log.config) if any(log.series(key)[1])), None)


@dataclass(frozen=True)
class Peak:
    """Step at which the gold score began to fall while the proxy score kept rising."""

    step: float
    gold: tuple[float, float]
    """Smoothed gold score at the peak and at the end."""
    proxy: tuple[float, float]
    """Smoothed proxy score at the peak and at the end."""


def over_optimized(log: MetricLog) -> Peak | None:
    """Return the peak of gold (Gao et al. 2022); None if gold fell by less than 1/5 of its range.

    Both curves are smoothed first. Gold measured on training episodes is noisy and needs 20 points.
    """
    key = gold_key(log)
    steps, gold = log.series(key) if key else ([], [])
    proxy_steps, proxy = log.series("reward/mean")
    enough = 20 if (key or "").startswith("reward/") else 4
    if len(gold) < enough or len(proxy) < 4:
        return None
    gold, proxy = _smoothed(gold), _smoothed(proxy)
    best = max(range(len(gold)), key=gold.__getitem__)
    then = min(range(len(proxy)), key=lambda i: abs(proxy_steps[i] - steps[best]))
    fell = gold[best] - gold[-1] >= 0.2 * (max(gold) - min(gold)) > 0
    if not fell or proxy[-1] <= proxy[then]:
        return None
    return Peak(steps[best], (gold[best], gold[-1]), (proxy[then], proxy[-1]))


def _smoothed(values: Sequence[float]) -> list[float]:
    return moving_average(values, 2 * max(1, len(values) // 30) + 1)


def _unscored_reasons(log: MetricLog, when: str) -> Iterator[tuple[str, str]]:
    """Yield the share of unscored episodes by reward and reason; a share of 0 is not logged."""
    recent = log.recent()
    keys = dict.fromkeys(key for row in recent for key in row if key.startswith(_UNSCORED))
    for key in keys:
        name, _, reason = key.removeprefix(_UNSCORED).partition("/")
        share = _mean([float(row.get(key, 0.0)) for row in recent])
        words = reason.replace("_", " ")
        yield key, f"{share:.0%} of episodes went unscored by {name} ({words}) {when}."


def _fell_clearly(values: Sequence[float]) -> bool:
    """Return whether the last quarter's mean is 4 standard errors below the best quarter's.

    The noise is estimated from neighboring values, so a trend hardly affects it. If the check runs
    after each of 100 noisy values without a trend, about 2% of runs exceed four standard errors.
    """
    size = max(2, len(values) // 4)
    means = [math.fsum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    if not means or not squares:
        return False
    error = math.sqrt(math.fsum(squares) / len(squares) / 2) * math.sqrt(2 / size)
    return max(means) - means[-1] > 4 * error


def _recent_mean(log: MetricLog, key: str) -> float:
    """Return the mean of the last five logged values; 0 if the metric was never logged."""
    return _mean(log.series(key)[1][-RECENT:])


def _recent_share(log: MetricLog, key: str) -> float:
    """Return the recent value of a metric of `_SHARES` as a share."""
    value = _recent_mean(log, key)
    if key not in ("rollout/length_limited", "rollout/invalid"):
        return value
    # These metrics are logged as numbers per episode, and an episode may have several turns.
    return value / max(1.0, _recent_mean(log, "rollout/turns"))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _not_finite(log: MetricLog) -> Iterator[tuple[str, str]]:
    for key, step in log.not_finite().items():
        yield "finite", f"{key} is not finite from step {step} on."


def _unmoved(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find a model that training did not change (frozen, learning rate 0 or advantages of 0)."""
    steps, moved = log.series("train/moved")
    if moved and moved[-1] == 0:
        yield (
            "train/moved",
            f"training did not move the model: at step {short_number(steps[-1])} every trained "
            "weight has its initial value.",
        )
        return
    # Weights that start at 0 change with any learning rate; the policy's outputs may not.
    kl, ratio = log.series("policy/kl")[1], log.series("policy/ratio_max")[1]
    if len(kl) >= RECENT and not any(kl) and all(abs(r - 1) <= 1e-6 for r in ratio):
        yield (
            "train/moved",
            f"the policy did not move: policy/kl is 0 in all of {len(kl)} logged steps, and no "
            "importance ratio differs from 1.",
        )


def _over_optimized(log: MetricLog) -> Iterator[tuple[str, str]]:
    peak = over_optimized(log)
    if peak is None or not _fell_clearly(log.series(gold_key(log) or "")[1]):
        return
    gold, proxy = ([short_number(v) for v in pair] for pair in (peak.gold, peak.proxy))
    step = short_number(peak.step)
    yield (
        "gold",
        f"the proxy was over-optimized: gold fell from {gold[0]} at step {step} to {gold[1]} while "
        f"the proxy rose from {proxy[0]} to {proxy[1]}. Stop near step {step}.",
    )


def _diverged(log: MetricLog) -> Iterator[tuple[str, str]]:
    for key, limit in (("policy/ratio_max", 20.0), ("policy/kl", 100.0)):
        steps, values = log.series(key)
        above = [i for i, value in enumerate(values) if value > limit]
        if above:
            yield (
                key,
                f"{key} reached {short_number(max(values))} (first above {short_number(limit)} at "
                f"step {short_number(steps[above[0]])}): the policy jumped far.",
            )


def _collapsed(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find entropy collapse without a rise in reward; a solved task needs no entropy."""
    entropy, reward = log.series("policy/entropy")[1], log.series("reward/mean")[1]
    if min(len(entropy), len(reward)) < 2 * RECENT:
        return
    before, after = _mean(entropy[:RECENT]), _mean(entropy[-RECENT:])
    first, last = _mean(reward[:RECENT]), _mean(reward[-RECENT:])
    if before >= 0.1 and after <= 0.05 * before and last <= first:
        yield (
            "entropy",
            f"policy/entropy fell from {short_number(before)} to {short_number(after)} and the "
            f"reward did not rise ({short_number(first)} to {short_number(last)}): the policy "
            "repeats itself and no longer explores.",
        )


def _overfitted(log: MetricLog) -> Iterator[tuple[str, str]]:
    steps, values = log.series("eval/loss")
    if len(values) < 3:
        return
    best = min(range(len(values)), key=values.__getitem__)
    if values[-1] > 1.05 * values[best]:
        step = short_number(steps[best])
        yield (
            "eval/loss",
            f"held-out loss rose from {short_number(values[best])} at step {step} to "
            f"{short_number(values[-1])}: training ran too long; final/ contains the model of "
            f"step {step}.",
        )


def _negative_kl(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find a KL that is negative beyond noise: the sampler and the trainer disagree."""
    values = log.series("policy/kl")[1][-_SIGN_STEPS:]
    if len(values) < _SIGN_STEPS or max(values) >= 0:
        return
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    if mean < -4 * math.sqrt(variance / len(values)):
        yield (
            "negative_kl",
            f"policy/kl was negative in each of {len(values)} logged steps (mean "
            f"{short_number(mean)}): the sampled tokens do not follow the scored policy.",
        )


def _exploded(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find a gradient norm far above all norms of the window before it."""
    steps, norms = log.series("train/grad_norm")
    for i in range(_GRADIENT_STEPS, len(norms)):
        before = max(norms[i - _GRADIENT_STEPS : i])
        if norms[i] > _GRADIENT_FACTOR * before > 0:
            yield (
                "train/grad_norm",
                f"the gradient exploded: its norm was {short_number(norms[i])} at step "
                f"{short_number(steps[i])} and at most {short_number(before)} in the "
                f"{_GRADIENT_STEPS} logged steps before.",
            )
            return


def _repeated(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find replies that began to repeat themselves without a rise in reward."""
    repetition, reward = log.series("rollout/repetition")[1], log.series("reward/mean")[1]
    if min(len(repetition), len(reward)) < 2 * RECENT:
        return
    before, after = _mean(repetition[:RECENT]), _mean(repetition[-RECENT:])
    if after >= max(0.5, before + 0.3) and _mean(reward[-RECENT:]) <= _mean(reward[:RECENT]):
        yield (
            "rollout/repetition",
            f"{after:.0%} of the bigrams of replies repeat earlier ones, against {before:.0%} in "
            "the first steps, and the reward did not rise.",
        )


def _dead_critic(log: MetricLog) -> Iterator[tuple[str, str]]:
    """Find a critic whose values do not depend on the state."""
    explained = log.series("value/explained_variance")[1][-_CRITIC_STEPS:]
    if len(explained) == _CRITIC_STEPS and max(map(abs, explained)) < 1e-3:
        yield (
            "value/explained_variance",
            f"the critic explains nothing: value/explained_variance was 0 in the last "
            f"{_CRITIC_STEPS} logged steps.",
        )


def _no_updates(log: MetricLog) -> Iterator[tuple[str, str]]:
    updates = log.series("train/updates")[1]
    if updates and not any(updates):
        yield (
            "train/updates",
            f"nothing was trained: train/updates is 0 in all of {len(updates)} logged steps.",
        )


_CHECKED = (
    _not_finite,
    _no_updates,
    _unmoved,
    _over_optimized,
    _diverged,
    _negative_kl,
    _exploded,
    _collapsed,
    _repeated,
    _dead_critic,
    _overfitted,
)
