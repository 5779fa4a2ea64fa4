"""The table of alarms: conditions of a run that end training, warn, or are stated in the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf.common.files import write_text
from rlhf.errors import UserError

Action = Literal["halt", "warn", "state"]
"""halt: training ends with an error; warn: a warning during training and in the report; state: only
the report states it."""
AlarmName = Literal[
    "not_finite",
    "first_ratio",
    "frozen",
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
]
BUNDLE = "halted"
"""Folder of a run that reproduces the alarm which ended it."""


@dataclass(frozen=True)
class Alarm:
    """A row of the table of alarms."""

    condition: str
    window: str
    """Data and moment of the evaluation of the condition."""
    action: Action
    """Default action."""
    before_update: bool = False
    """Whether the condition is checked before an update is applied; it can then only halt."""
    false_alarms: int = 0
    """Number of the 100 healthy runs of `benchmarks.alarm_rate` with this alarm, as measured."""


_UPDATE = "each update, before it is applied"
_LAST_5 = "the last 5 logged steps"
ALARMS: dict[AlarmName, Alarm] = {
    "not_finite": Alarm(
        "a loss, gradient norm, log-probability, reward, advantage or KL coefficient is NaN or "
        "infinite",
        _UPDATE,
        "halt",
        before_update=True,
    ),
    "first_ratio": Alarm(
        "the mean k3 estimate from the importance ratios exceeds 1e-6 (5e-3 in bfloat16)",
        "the first mini-batch of each online step and of dpo, before its update is applied",
        "halt",
        before_update=True,
    ),
    "frozen": Alarm(
        "a weight that should train requires no gradient or is not in the optimizer, or no weight "
        "has a gradient",
        _UPDATE,
        "halt",
        before_update=True,
    ),
    "nothing_scored": Alarm(
        "no episode has a score", "each step, before its update", "halt", before_update=True
    ),
    "no_updates": Alarm("no step took an update", "the whole run, at its end", "warn"),
    "metric_not_finite": Alarm("a logged metric is NaN or infinite", "each logged step", "warn"),
    "not_moved": Alarm(
        "every trained weight has its initial value, or KL and ratios show no change",
        "5 steps after the critic's warm-up",
        "warn",
    ),
    "over_optimized": Alarm(
        "the gold score fell by 1/5 of its range and four standard errors while the proxy rose",
        "the whole run",
        "warn",
    ),
    "policy_jump": Alarm(
        "an importance ratio exceeds 20, or the KL exceeds 100 nats", "each logged step", "warn"
    ),
    "negative_kl": Alarm(
        "every KL is negative, and their mean is four standard errors below 0",
        "the last 10 logged steps",
        "warn",
    ),
    "exploding_gradient": Alarm(
        "the gradient norm exceeds 20 times the largest of the 20 steps before",
        "21 logged steps",
        "warn",
    ),
    "entropy_collapse": Alarm(
        "the entropy fell to 1/20 of that of the first 5 steps, and the reward did not rise",
        _LAST_5,
        "warn",
    ),
    "repetition_collapse": Alarm(
        "at least half of the bigrams of replies repeat earlier ones, 0.3 more than in the first "
        "5 steps, and the reward did not rise",
        _LAST_5,
        "warn",
    ),
    "dead_critic": Alarm(
        "the critic explains between -0.1% and 0.1% of the variance of the returns",
        "each of the last 20 logged steps",
        "warn",
    ),
    "overfitted": Alarm(
        "the held-out loss is 5% above its minimum", "3 evaluations or more", "warn"
    ),
    "length_limited": Alarm("over 10% of replies hit the token limit", _LAST_5, "warn"),
    "truncated": Alarm("a limit truncated over 10% of episodes", _LAST_5, "warn"),
    "unscored": Alarm("an episode could not be scored", _LAST_5, "warn"),
    "invalid": Alarm("over 10% of actions were invalid", _LAST_5, "warn"),
    "evasion": Alarm(
        "truncated episodes and those with invalid replies earn more than the others",
        "each of the last 10 logged steps",
        "warn",
        false_alarms=1,
    ),
    "missing_eos": Alarm("over 10% of replies lack a stop token", _LAST_5, "warn"),
}


class Halt(UserError):
    """An alarm whose action is halt.

    Args:
        name: Name of the alarm.
        message: What was observed, and what to do.
        evidence: Tensors and numbers from which the check can be repeated.
    """

    def __init__(
        self, name: AlarmName, message: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.name: AlarmName = name
        self.evidence = dict(evidence or {})

    @property
    def repeatable(self) -> bool:
        """Whether `rlhf replay` can repeat the check; the TRL engine keeps no batch."""
        return bool(self.evidence) or not ALARMS[self.name].before_update


def check_actions(actions: Mapping[AlarmName, Action]) -> None:
    """Raise ValueError if an alarm that is checked before the update has another action."""
    for name, action in actions.items():
        if ALARMS[name].before_update and action != "halt":
            raise ValueError(
                f"alarms.{name}: {action} is refused, because the update would damage the model; "
                "only halt is possible"
            )


def action_of(name: AlarmName, config: Mapping[str, Any]) -> Action:
    """Return the action of an alarm in a run: ``alarms`` of its configuration, or the default."""
    return (config.get("alarms") or {}).get(name, ALARMS[name].action)


def write_description(directory: Path, halt: Halt, config: Mapping[str, Any]) -> None:
    """Write the alarm and the configuration to the bundle of a run that was halted.

    Args:
        directory: The run directory; its metrics are copied, because later ones may replace them.
        halt: The alarm.
        config: Configuration of the run, with its command.
    """
    bundle = directory / BUNDLE
    bundle.mkdir(exist_ok=True)
    content = {"alarm": halt.name, "message": str(halt), "config": dict(config)}
    write_text(bundle / "alarm.json", json.dumps(content, indent=2))
    if (directory / "metrics.jsonl").exists():
        shutil.copyfile(directory / "metrics.jsonl", bundle / "metrics.jsonl")


assert tuple(ALARMS) == get_args(AlarmName)
