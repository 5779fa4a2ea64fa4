"""The settings of an algorithm. Imports no torch."""

from dataclasses import dataclass, fields
from typing import Literal

from rlhf.common.ranges import (
    Finite,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from rlhf.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of an algorithm; each row of the registry has its own defaults."""

    advantage: str = "gae"
    """Name of the advantage estimator."""
    num_epochs: PositiveInt = 1
    """Number of passes over one batch of rollouts."""
    num_minibatches: PositiveInt = 1
    """Number of optimizer steps per pass."""
    group_size: PositiveInt = 1
    """Number of rollouts from one start state, which share a baseline."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Reduction of the loss over tokens. "token": mean over all tokens. "sequence": mean of each
    sequence, then mean over sequences. "constant": sum of each sequence divided by the largest
    number of tokens of an episode, then mean over sequences."""
    clip_low: NonNegativeFloat = 0.2
    """The lower bound of the clipped ratio is 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The upper bound of the clipped ratio is 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound c > 1 on the ratio of tokens with a negative advantage; 0 disables it."""
    tis_cap: NonNegativeFloat = 0.0
    """Truncated importance sampling: upper bound on the weight of a token, which is the trainer's
    probability divided by the sampler's; 0 disables it."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """Whether the KL to the reference policy is subtracted from the reward ("reward"), added to the
    loss ("loss"), or not used ("none")."""
    kl_estimator: str = "k1"
    """Estimator of the KL per token: "k1", "k2" or "k3"."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL, in reward per nat; in DPO, beta."""
    gamma: Fraction = 1.0
    """Discount from one action token to the next."""
    lam: Fraction = 0.95
    """GAE's lambda from one action token to the next."""
    turn_gamma: Fraction = 1.0
    """Discount from the last token of a turn to the next turn."""
    turn_lam: Fraction = 0.95
    """GAE's lambda from the last token of a turn to the next turn."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0 and variance 1 over the batch's action tokens."""
    scale_by_std: bool = False
    """Divide a group's advantages by the group's standard deviation."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the critic's loss."""
    value_clip: NonNegativeFloat = 0.2
    """The value loss is clipped if a value differs from its value at rollout by more than this; 0
    disables clipping."""
    pair_labels: Literal["soft", "hard"] = "soft"
    """Labels of pairs: "soft" prefers the better episode with probability sigma(score difference),
    "hard" with probability 1."""
    dynamic_sampling: bool = False
    """Replace groups whose scores (before penalties) are all equal by newly sampled groups."""
    overlong_fraction: Fraction = 0.0
    """Length of DAPO's soft overlong range, as a fraction of a turn's token limit. In this range,
    which ends at the limit, the penalty increases from 0 to 1. 0 disables the penalty."""
    cost_limit: Finite = 0.0
    """Upper limit of the mean cost per episode."""
    multiplier_init: PositiveFloat = 1.0
    """Initial value of the Lagrange multiplier."""
    multiplier_lr: NonNegativeFloat = 0.05
    """Step size of the logarithm of the Lagrange multiplier."""
    multiplier_max: PositiveFloat = 100.0
    """Largest Lagrange multiplier."""

    def check(self) -> None:
        """Check the range of each value.

        Raises:
            UserError: a value is outside its range; the message states the key, the rule and the
                value.
        """
        check_fields(self)
        dual, cap = self.dual_clip, self.tis_cap
        require(dual == 0 or dual > 1, "dual_clip", "be above 1 (or 0 for off)", dual)
        require(cap == 0 or cap >= 1, "tis_cap", "be at least 1 (or 0 for off)", cap)


def require(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise a UserError that states the key, the rule and the value if the condition is false."""
    if not condition:
        raise UserError(f"{key} must {rule}, got {value}")


def setting_names() -> list[str]:
    """Return the names of all settings, in the order of the fields of `Settings`."""
    return [field.name for field in fields(Settings)]
