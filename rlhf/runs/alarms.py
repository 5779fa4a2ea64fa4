"""The table of alarms: conditions of a run that end training, or cause a warning."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf.common.files import describe_write_error, find_write_error, remove, write_text
from rlhf.errors import UserError

log = logging.getLogger(__name__)

AlarmAction = Literal["halt", "warn", "state"]
"""halt: training ends with an error; warn: a warning is logged and added to the report; state: the
warning is only added to the report."""
AlarmName = Literal[
    "not_finite",
    "first_ratio",
    "frozen",
    "no_gradient",
    "nothing_scored",
    "no_updates",
    "metric_not_finite",
    "not_moved",
    "over_optimized",
    "policy_jump",
    "negative_kl",
    "exploding_gradient",
    "entropy_collapse",
    "repetition_collapse",
    "dead_critic",
    "overfitted",
    "length_limited",
    "truncated",
    "unscored",
    "invalid",
    "evasion",
    "missing_eos",
    "constant_reward",
    "saturated",
    "unsolved",
    "equal_groups",
    "dominant_reward",
    "low_effective_sample",
    "clipped",
    "length_drift",
]
HALTED_FOLDER = "halted"
"""Subfolder of a run directory with the data that `rlhf replay` needs to repeat the check that
halted the run."""


NUM_HEALTHY_RUNS = 100
"""Number of the runs of `benchmarks.alarm_rate`."""


@dataclass(frozen=True)
class Alarm:
    """A row of the table of alarms."""

    condition: str
    """Condition that raises the alarm, for the documentation."""
    window: str
    """When, and on which data, the condition is checked, for the documentation."""
    action: AlarmAction
    """Default action."""
    before_update: bool = False
    """Whether the condition is checked before an update is applied. Such an alarm always has the
    action "halt"."""
    false_alarms: int = 0
    """Measured number of healthy runs of `benchmarks.alarm_rate` with this alarm."""

    @property
    def false_alarm_interval(self) -> tuple[float, float]:
        """The 95% interval of the rate of false alarms."""
        from rlhf.stats.shares import clopper_pearson_bounds

        return clopper_pearson_bounds(self.false_alarms, NUM_HEALTHY_RUNS)


_UPDATE = "each update, before it is applied"
_LAST_5 = "the last 5 logged steps"
ALARMS: dict[AlarmName, Alarm] = {
    "not_finite": Alarm(
        "a loss, gradient norm, log-probability, reward, advantage, KL coefficient or weight is "
        "NaN or infinite",
        "each update, before it is applied; the weights before each evaluation and checkpoint",
        "halt",
        before_update=True,
    ),
    "first_ratio": Alarm(
        "the mean k3 estimate from the importance ratios exceeds 1e-6 (0.05 + 4 / number of tokens"
        " in bfloat16)",
        "the first mini-batch of each online step and of dpo, before its update is applied",
        "halt",
        before_update=True,
    ),
    "frozen": Alarm(
        "a parameter tensor to train does not require a gradient or is not in the optimizer, or"
        " no parameter tensor has a gradient",
        _UPDATE,
        "halt",
        before_update=True,
    ),
    "no_gradient": Alarm(
        "a parameter tensor that requires a gradient has no gradient, although other tensors "
        "have one; tensors of experts are ignored",
        "at least 5 logged steps; steps of the critic's warm-up are ignored",
        "warn",
    ),
    "nothing_scored": Alarm(
        "no episode has a score", "each step, before its update", "halt", before_update=True
    ),
    "no_updates": Alarm("no training step updated the weights", "the end of the run", "warn"),
    "metric_not_finite": Alarm("a logged metric is NaN or infinite", "each logged step", "warn"),
    "not_moved": Alarm(
        "every trained weight has its initial value, or every logged KL is 0 and every "
        "importance ratio is 1",
        "5 steps after the critic's warm-up",
        "warn",
    ),
    "over_optimized": Alarm(
        "the gold score fell by at least 1/5 of its range and by more than four standard "
        "errors, and the proxy score rose",
        "the whole run",
        "warn",
    ),
    "policy_jump": Alarm(
        "an importance ratio exceeds 20, or the KL exceeds 100 nats", "each logged step", "warn"
    ),
    "negative_kl": Alarm(
        "every KL is negative, and their mean is more than four standard errors below 0",
        "the last 10 logged steps",
        "warn",
    ),
    "exploding_gradient": Alarm(
        "the gradient norm exceeds 20 times the largest gradient norm of the previous 20 logged"
        " steps",
        "21 logged steps",
        "warn",
    ),
    "entropy_collapse": Alarm(
        "the entropy is at most 1/20 of its mean over the first 5 logged steps, which was at least "
        "0.1 nats, and the reward did not rise",
        _LAST_5,
        "warn",
    ),
    "repetition_collapse": Alarm(
        "the fraction of repeated bigrams in replies is at least 0.5 and has risen by at least "
        "0.3 since the first 5 logged steps, and the reward did not rise",
        _LAST_5,
        "warn",
    ),
    "dead_critic": Alarm(
        "the critic's explained variance is between -0.001 and 0.001",
        "each of the last 20 logged steps",
        "warn",
    ),
    "overfitted": Alarm(
        "the held-out loss is more than 5% above its minimum", "at least 3 evaluations", "warn"
    ),
    "length_limited": Alarm("more than 10% of replies reach the token limit", _LAST_5, "warn"),
    "truncated": Alarm(
        "more than 10% of episodes are truncated by a limit of tokens or steps", _LAST_5, "warn"
    ),
    "unscored": Alarm("an episode could not be scored", _LAST_5, "warn"),
    "invalid": Alarm("more than 10% of actions are invalid", _LAST_5, "warn"),
    "evasion": Alarm(
        "truncated episodes and episodes with invalid replies have a higher mean score than the "
        "other episodes",
        "each of the last 10 logged steps",
        "warn",
        false_alarms=1,
    ),
    "missing_eos": Alarm(
        "more than 10% of replies have no stop token, and the token limit does not explain this",
        _LAST_5,
        "warn",
    ),
    "constant_reward": Alarm(
        "all episodes of a step have the same score, and the reward did not rise",
        "each of the last 10 logged steps",
        "warn",
    ),
    "saturated": Alarm(
        "at least 95% of the episodes are solved",
        "the first 5 logged steps",
        "warn",
    ),
    "unsolved": Alarm(
        "no episode is solved, and the reward did not rise",
        "each of the last 20 logged steps",
        "warn",
    ),
    "equal_groups": Alarm(
        "the scores are equal within at least 90% of the groups, but differ between groups, and "
        "the reward did not rise",
        "the last 10 logged steps",
        "warn",
    ),
    "dominant_reward": Alarm(
        "one term of the score has at least 99% of its variance, and another term also varies",
        "each of the last 5 logged steps",
        "warn",
    ),
    "low_effective_sample": Alarm(
        "the effective sample size of the sampled tokens is below half of their number",
        _LAST_5,
        "warn",
    ),
    "clipped": Alarm(
        "the importance ratio is clipped for more than 90% of the tokens with a positive, or with"
        " a negative, advantage",
        "the last 10 logged steps",
        "warn",
    ),
    "length_drift": Alarm(
        "the mean number of sampled tokens per episode is at most half or at least twice its mean "
        "over the first 5 logged steps, and the reward did not rise",
        _LAST_5,
        "warn",
    ),
}


class Halt(UserError):
    """Error that ends training because of an alarm with the action "halt".

    Args:
        name: Name of the alarm.
        message: Description of the problem and what to do.
        evidence: Tensors and numbers with which the check can be repeated.
    """

    def __init__(
        self, name: AlarmName, message: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.name: AlarmName = name
        self.evidence = dict(evidence or {})
        self.saved = True
        """Whether the evidence is in the run directory; False if it could not be written."""

    @property
    def repeatable(self) -> bool:
        """Whether `rlhf replay` can repeat the check.

        A check that precedes an update needs the batch, which the TRL engine does not save.
        """
        has_data = bool(self.evidence) or not ALARMS[self.name].before_update
        return has_data and self.saved


def false_alarm_text(name: AlarmName) -> str:
    """Return the name of an alarm and its measured rate of false alarms, for a report."""
    alarm = ALARMS[name]
    low, high = alarm.false_alarm_interval
    return (
        f"alarm {name}: raised in {alarm.false_alarms} of {NUM_HEALTHY_RUNS} healthy runs, 95% "
        f"interval {low:.1%} to {high:.1%}"
    )


def check_alarm_actions(actions: Mapping[AlarmName, AlarmAction]) -> None:
    """Raise ValueError if an alarm that is checked before the update has an action except halt."""
    for name, action in actions.items():
        if ALARMS[name].before_update and action != "halt":
            raise ValueError(
                f"alarms.{name} must be halt, got {action}: if training continued, the update "
                "would damage the model"
            )


def alarm_action(name: AlarmName, config: Mapping[str, Any]) -> AlarmAction:
    """Return the action of an alarm in a run.

    The action is the entry in ``alarms`` of the run's configuration. Without an entry, it is the
    default action of the alarm.
    """
    return (config.get("alarms") or {}).get(name, ALARMS[name].action)


@contextlib.contextmanager
def log_halt_data_write_errors(directory: Path, halt: Halt) -> Iterator[None]:
    """Return a context manager in which an error of the file system does not hide an alarm.

    The error is logged as a warning, and the incomplete folder `HALTED_FOLDER` is removed.

    Args:
        directory: The run directory.
        halt: The error that ended training; the context sets its ``saved`` to False on an error.
    """
    try:
        yield
    except Exception as error:
        cause = find_write_error(error)
        if cause is None:
            raise
        halt.saved = False
        log.warning("the data of the alarm are not saved: %s", describe_write_error(cause))
        remove(directory / HALTED_FOLDER)


def write_alarm_description(directory: Path, halt: Halt, config: Mapping[str, Any]) -> None:
    """Write the alarm, the configuration and the metrics of a halted run to `HALTED_FOLDER`.

    Args:
        directory: The run directory. The metrics file is copied, because a resumed run may
            overwrite it.
        halt: The error that ended training.
        config: Configuration of the run, including its command.
    """
    folder = directory / HALTED_FOLDER
    folder.mkdir(exist_ok=True)
    content = {"alarm": halt.name, "message": str(halt), "config": dict(config)}
    write_text(folder / "alarm.json", json.dumps(content, indent=2))
    if (directory / "metrics.jsonl").exists():
        shutil.copyfile(directory / "metrics.jsonl", folder / "metrics.jsonl")


assert tuple(ALARMS) == get_args(AlarmName)
