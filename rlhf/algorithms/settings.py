"""The settings of an algorithm. This module does not import torch."""

from dataclasses import dataclass, fields
from typing import Literal

from rlhf.common.ranges import (
    Finite,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from rlhf.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of an algorithm. Each algorithm in `rlhf.algorithms.registry` has its own defaults.

    Example:
        >>> from rlhf.plugins import Settings
        >>> Settings(advantage="group_relative", group_size=8).num_epochs
        1
    """

    advantage: str = "gae"
    """Name of the advantage estimator."""
    num_epochs: PositiveInt = 1
    """Number of epochs over one batch of rollouts."""
    num_minibatches: PositiveInt = 1
    """Number of mini-batches per epoch, each with one optimizer step."""
    group_size: PositiveInt = 1
    """Number of rollouts that start in the same state."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Reduction of the loss over tokens. "token": mean over all tokens. "sequence": mean over each
    sequence, then mean over sequences. "constant": sum over each sequence divided by the maximum
    number of tokens that can be sampled in an episode, then mean over sequences."""
    clip_low: NonNegativeFloat = 0.2
    """The importance ratio is clipped from below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The importance ratio is clipped from above at 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Upper bound c > 1 on the importance ratio of tokens with a negative advantage; 0 disables
    this bound."""
    tis_cap: NonNegativeFloat = 0.0
    """Cap of truncated importance sampling. Each advantage is multiplied by min(tis_cap, p / q),
    where p is the probability of the token under the policy at the start of the update, and q its
    probability in the sampler. 0 disables the weights."""
    sequence_mask_low: FractionBelowOne = 0.0
    """Lower bound of the sequence mask. An episode is excluded from the loss if the geometric mean
    of p / q (see tis_cap) over its tokens is below this bound. 0 disables the bound."""
    sequence_mask_high: NonNegativeFloat = 0.0
    """Upper bound of the sequence mask, e.g. 1.01. An episode is excluded from the loss if the
    geometric mean of p / q (see tis_cap) over its tokens is above this bound. 0 disables the
    bound."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """Whether the KL to the reference policy is subtracted from the reward ("reward"), added to the
    loss ("loss"), or not used ("none")."""
    kl_estimator: str = "k1"
    """Estimator of the KL per token: "k1", "k2" or "k3"."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL, in reward per nat. With `online_dpo`, this is DPO's beta."""
    gamma: Fraction = 1.0
    """Discount from one action token to the next."""
    lam: Fraction = 0.95
    """GAE's lambda from one action token to the next."""
    turn_gamma: Fraction = 1.0
    """Discount from the last token of a turn to the next turn."""
    turn_lam: Fraction = 0.95
    """GAE's lambda from the last token of a turn to the next turn."""
    whiten_advantages: bool = False
    """Whether advantages are shifted and scaled to mean 0 and variance 1 over the action tokens of
    the batch."""
    scale_by_std: bool = False
    """Whether the advantages of a group are divided by the standard deviation of its scores."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the critic's loss."""
    value_clip: NonNegativeFloat = 0.2
    """Maximum distance of the clipped value from the value at the start of the update, in the units
    of the return. The value loss is the larger of the losses of the value and of the clipped value.
    0 disables clipping."""
    pair_labels: Literal["soft", "hard"] = "soft"
    """Label of a pair: the probability that its better episode is preferred. It is
    sigmoid(score difference) with "soft", and 1 with "hard"."""
    dynamic_sampling: bool = False
    """Whether groups whose scores (before penalties) are all equal are replaced by newly sampled
    groups."""
    overlong_fraction: Fraction = 0.0
    """Length of DAPO's soft overlong range, as a fraction of a turn's token limit. The range ends
    at the limit. Within the range, the penalty of the score increases linearly from 0 to 1. 0
    disables the penalty."""
    cost_limit: Finite = 0.0
    """Upper limit of the mean cost per episode, in the units of the cost."""
    multiplier_init: PositiveFloat = 1.0
    """Initial value of the Lagrange multiplier."""
    multiplier_lr: NonNegativeFloat = 0.05
    """Step size of the updates of the logarithm of the Lagrange multiplier."""
    multiplier_max: PositiveFloat = 100.0
    """Maximum of the Lagrange multiplier."""

    def check(self) -> None:
        """Check the type and the range of each value.

        Raises:
            UserError: A value has the wrong type or is outside its range.
        """
        check_fields(self)
        dual, cap = self.dual_clip, self.tis_cap
        require_setting(dual == 0 or dual > 1, "dual_clip", "be above 1 (or 0 for off)", dual)
        require_setting(cap == 0 or cap >= 1, "tis_cap", "be at least 1 (or 0 for off)", cap)
        high = self.sequence_mask_high
        require_setting(
            high == 0 or high > 1, "sequence_mask_high", "be above 1 (or 0 for off)", high
        )

    @property
    def masks_sequences(self) -> bool:
        """Whether the geometric mean ratio of an episode can exclude it from the loss."""
        return self.sequence_mask_low > 0 or self.sequence_mask_high > 0


def require_setting(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise a UserError if the condition is false; the message states key, rule and value."""
    if not condition:
        raise UserError(f"{key} must {rule}, got {value}")


def setting_names() -> list[str]:
    """Return the names of all settings, in the order of the fields of `Settings`."""
    return [field.name for field in fields(Settings)]
