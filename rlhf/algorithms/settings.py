"""The settings of an algorithm. Imports no torch."""

from dataclasses import dataclass, fields

from rlhf.errors import UserError

_CHOICES = {
    "kl_placement": ("reward", "loss", "none"),
    "aggregation": ("token", "sequence", "constant"),
    "pair_labels": ("soft", "hard"),
}
_AT_LEAST_ONE = ("num_epochs", "num_minibatches", "group_size")
_FRACTIONS = ("gamma", "lam", "turn_gamma", "turn_lam", "overlong_fraction")
_NONNEGATIVE = ("clip_low", "clip_high", "kl_coef", "value_coef", "value_clip", "multiplier_lr")


@dataclass(frozen=True)
class Settings:
    """Settings of one algorithm; each row of the registry has its own defaults."""

    advantage: str = "gae"
    """Advantage estimator, by name."""
    num_epochs: int = 1
    """Passes over one batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    group_size: int = 1
    """Rollouts from one start state; groups share a baseline."""
    aggregation: str = "token"
    """Mean over tokens ("token"), mean over each sequence first ("sequence"), or sum divided by the
    largest number of tokens an episode can sample ("constant")."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bound c > 1 on the ratio where the advantage is negative; 0 is off."""
    tis_cap: float = 0.0
    """Truncated importance sampling: weight of a token, the trainer's over the sampler's
    probability, is at most this; 0 is off."""
    kl_placement: str = "reward"
    """Where the KL to the reference policy enters: "reward", "loss" or "none"."""
    kl_estimator: str = "k1"
    """Estimator of the KL per token: "k1", "k2" or "k3"."""
    kl_coef: float = 0.05
    """Weight of the KL, in reward per nat; the beta of DPO."""
    gamma: float = 1.0
    """Discount from one action token to the next."""
    lam: float = 0.95
    """GAE's lambda from one action token to the next."""
    turn_gamma: float = 1.0
    """Discount from the last token of a turn to the next turn."""
    turn_lam: float = 0.95
    """GAE's lambda from the last token of a turn to the next turn."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0 and variance 1 over the batch's action tokens."""
    scale_by_std: bool = False
    """Divide a group's advantages by the group's standard deviation."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    value_coef: float = 0.1
    """Weight of the critic's loss."""
    value_clip: float = 0.2
    """The value loss is clipped where the critic moves further than this from its value at rollout;
    0 is off."""
    pair_labels: str = "soft"
    """Which of two episodes is preferred: with probability sigma(score difference), or always the
    better ("hard")."""
    dynamic_sampling: bool = False
    """Replace groups whose scores, before penalties, are all equal by newly sampled ones."""
    overlong_fraction: float = 0.0
    """Final fraction of a turn's token limit over which a penalty grows from 0 to 1; 0 is off."""
    cost_limit: float = 0.0
    """Largest mean cost per episode."""
    multiplier_init: float = 1.0
    """Lagrange multiplier at the start."""
    multiplier_lr: float = 0.05
    """Step size of the logarithm of the Lagrange multiplier."""
    multiplier_max: float = 100.0
    """Largest Lagrange multiplier."""

    def check(self) -> None:
        """Check each value by itself.

        Raises:
            UserError: a value is outside its range; the message names key, rule and value.
        """
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            require(value in choices, key, f"be one of {', '.join(choices)}", repr(value))
        for key in _AT_LEAST_ONE:
            require(getattr(self, key) >= 1, key, "be at least 1", getattr(self, key))
        for key in _FRACTIONS:
            require(0 <= getattr(self, key) <= 1, key, "lie in [0, 1]", getattr(self, key))
        for key in _NONNEGATIVE:
            require(getattr(self, key) >= 0, key, "be at least 0", getattr(self, key))
        dual, cap = self.dual_clip, self.tis_cap
        require(dual == 0 or dual > 1, "dual_clip", "be above 1 (or 0 for off)", dual)
        require(cap == 0 or cap >= 1, "tis_cap", "be at least 1 (or 0 for off)", cap)


def require(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise a UserError that names key, rule and value unless the condition holds."""
    if not condition:
        raise UserError(f"{key} must {rule}, got {value}")


def setting_names() -> list[str]:
    """Return the names of all settings, in order."""
    return [field.name for field in fields(Settings)]
