"""What an algorithm may set, and which settings each of its parts reads. Imports no torch."""

from dataclasses import dataclass, fields

from rlhf.common.names import nearest
from rlhf.errors import UserError

KL_PLACEMENTS = ("reward", "loss", "none")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token", "sequence", "constant")
PAIR_LABELS = ("soft", "hard")


@dataclass(frozen=True)
class Settings:
    """The numbers of one algorithm; a row of the registry gives its own defaults.

    The training configuration has fields of the same names, where None means "as in the row".
    """

    advantage: str = "gae"
    """Credit assignment: a name in `ADVANTAGES`."""
    num_epochs: int = 1
    """Passes over one batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    group_size: int = 1
    """Rollouts from one start state; groups share a baseline."""
    aggregation: str = "token"
    """Mean over tokens, mean over each sequence first, or sum divided by the most tokens an episode
    can sample."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bound c > 1 on the ratio where the advantage is negative; 0 is off."""
    mismatch_cap: float = 0.0
    """Weigh a token by the trainer's over the sampler's probability, up to this; 0 is off."""
    kl_placement: str = "reward"
    """Where the divergence from the reference enters: "reward", "loss" or "none"."""
    kl_estimator: str = "k1"
    """Estimator of the divergence per token: "k1", "k2" or "k3"."""
    kl_coef: float = 0.05
    """Weight of the divergence, in reward per nat; the beta of DPO."""
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
    """The critic may move this far from its value at rollout; 0 is off."""
    pair_labels: str = "soft"
    """Which of two episodes is preferred: with probability sigma(score difference), or always the
    better ("hard")."""
    dynamic_sampling: bool = False
    """Replace groups whose scores, before penalties, are all equal by fresh ones."""
    overlong_fraction: float = 0.0
    """Last part of a reply's token limit over which a penalty grows from 0 to 1; 0 is off."""
    cost_limit: float = 0.0
    """Largest mean cost per episode."""
    multiplier_init: float = 1.0
    """Lagrange multiplier at the start."""
    multiplier_lr: float = 0.05
    """Step size of the logarithm of the Lagrange multiplier."""
    multiplier_max: float = 100.0
    """Largest Lagrange multiplier."""


@dataclass(frozen=True)
class Traits:
    """What one advantage function or one loss needs and reads."""

    summary: str
    reads: frozenset[str] = frozenset()
    critic: bool = False
    groups: bool = False


def _reads(*names: str) -> frozenset[str]:
    return frozenset(names)


_CRITIC = ("value_coef", "value_clip", "whiten_advantages")
_SHAPE = ("aggregation", "entropy_coef")

ADVANTAGES: dict[str, Traits] = {
    "gae": Traits("critic, token by token", _reads("gamma", "lam", *_CRITIC), critic=True),
    "turn_gae": Traits(
        "critic, other gamma and lambda between turns",
        _reads("gamma", "lam", "turn_gamma", "turn_lam", *_CRITIC),
        critic=True,
    ),
    "trajectory_return": Traits("whole return on every token", _reads("whiten_advantages")),
    "return_to_go": Traits("return from the token on", _reads("gamma", "whiten_advantages")),
    "group_relative": Traits(
        "return minus the group's mean", _reads("scale_by_std", "whiten_advantages"), groups=True
    ),
    "leave_one_out": Traits(
        "return minus the mean of the others", _reads("whiten_advantages"), groups=True
    ),
    "group_return_to_go": Traits(
        "return from the turn on minus that of the others",
        _reads("gamma", "whiten_advantages"),
        groups=True,
    ),
    "best_of_group": Traits("1 for the group's best, others left out", groups=True),
    "best_and_worst": Traits("the group's best and worst as a pair", groups=True),
}
"""Credit assignments: implemented under the same names in `rlhf.algorithms.credit`."""

LOSSES: dict[str, Traits] = {
    "clipped": Traits(
        "token ratio, clipped",
        _reads("clip_low", "clip_high", "dual_clip", "mismatch_cap", *_SHAPE),
    ),
    "clipped_sequence": Traits(
        "sequence ratio, clipped", _reads("clip_low", "clip_high", "mismatch_cap", *_SHAPE)
    ),
    "clipped_weight": Traits(
        "log-likelihood with clipped constant weight",
        _reads("clip_low", "clip_high", "mismatch_cap", *_SHAPE),
    ),
    "likelihood": Traits("weighted log-likelihood", _reads(*_SHAPE)),
    "pairwise": Traits("Bradley-Terry on pairs", _reads("pair_labels")),
}
"""Policy losses: implemented under the same names in `rlhf.algorithms.update`."""

ALWAYS = _reads("advantage", "num_epochs", "num_minibatches", "group_size", "overlong_fraction")
CONSTRAINED = _reads("cost_limit", "multiplier_init", "multiplier_lr", "multiplier_max")
RATIO = _reads("clip_low", "clip_high", "dual_clip", "value_clip")


def effective(settings: Settings, *, loss: str, constrained: bool) -> frozenset[str]:
    """Names of the settings that change anything in this combination."""
    advantage = ADVANTAGES[settings.advantage]
    names = ALWAYS | advantage.reads | LOSSES[loss].reads
    if loss == "pairwise":
        names |= {"kl_coef"}
    else:
        names |= {"kl_placement"}
        if settings.kl_placement != "none":
            names |= {"kl_coef", "kl_estimator"}
    if advantage.groups:
        names |= {"dynamic_sampling"}
    if constrained:
        names |= CONSTRAINED
    if settings.num_epochs * settings.num_minibatches == 1 and loss != "pairwise":
        names -= RATIO
    return names


def check(settings: Settings, *, name: str, loss: str) -> None:
    """Raise UserError for a value outside its range, naming key, rule and value."""
    choices = {
        "kl_placement": KL_PLACEMENTS,
        "kl_estimator": KL_ESTIMATORS,
        "aggregation": AGGREGATIONS,
        "pair_labels": PAIR_LABELS,
        "advantage": tuple(ADVANTAGES),
    }
    for key, allowed in choices.items():
        value = getattr(settings, key)
        if value not in allowed:
            raise UserError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    for key in ("num_epochs", "num_minibatches", "group_size"):
        _require(getattr(settings, key) >= 1, key, "be at least 1", getattr(settings, key))
    for key in ("gamma", "lam", "turn_gamma", "turn_lam", "overlong_fraction"):
        _require(0 <= getattr(settings, key) <= 1, key, "lie in [0, 1]", getattr(settings, key))
    nonnegative = "clip_low clip_high kl_coef value_coef value_clip multiplier_lr"
    for key in nonnegative.split():
        _require(getattr(settings, key) >= 0, key, "be at least 0", getattr(settings, key))
    dual = settings.dual_clip
    _require(dual == 0 or dual > 1, "dual_clip", "be above 1 (or 0 for off)", dual)
    cap = settings.mismatch_cap
    _require(cap == 0 or cap >= 1, "mismatch_cap", "be at least 1 (or 0 for off)", cap)
    _check_combination(settings, name, loss)


def _check_combination(settings: Settings, name: str, loss: str) -> None:
    pairs = settings.advantage == "best_and_worst"
    if pairs != (loss == "pairwise"):
        raise UserError(
            f"advantage {settings.advantage} does not go with {name}: "
            "best_and_worst belongs to the pairwise loss (online_dpo), and only to it"
        )
    if ADVANTAGES[settings.advantage].groups and settings.group_size < 2:
        raise UserError(
            f"group_size must be at least 2 with advantage {settings.advantage} "
            f"(the group is the baseline), got {settings.group_size}"
        )
    if settings.kl_placement == "loss" and settings.kl_estimator == "k1" and loss != "pairwise":
        raise UserError(
            "kl_estimator k1 with kl_placement loss has no effect (its gradient is zero in "
            "expectation): use k2 or k3, or put the divergence in the reward"
        )


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise UserError(f"{key} must {rule}, got {value}")


def unknown(key: str, known: list[str], kind: str) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    hint = nearest(key, known) or f"; known: {', '.join(known)}"
    return UserError(f"unknown {kind} {key!r}{hint}")


def setting_names() -> list[str]:
    """Names of all settings, in order."""
    return [field.name for field in fields(Settings)]
