"""The kinds of reward model: one row each, from the data they take to the scorer they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config.reward import RewardConfig
from rlhf.reward_models import losses
from rlhf.training.reward_models import encoders as data
from rlhf.training.reward_models import losses as parts
from rlhf.training.stages import Row


@dataclass(frozen=True)
class RewardKind:
    """A row of the table."""

    data: str
    """Kind of the rows, see `rlhf.config.data.Kind`."""
    encode: Callable[[data.RewardEncoder, Row], Row]
    """A row as an example."""
    loss: Callable[[RewardConfig], parts.Loss]
    """The loss that a configuration asks for."""
    metrics: parts.Metrics
    report: Literal["pairs", "compare", "classes", "flags", "ratings", "candidates", "steps"]
    """What is measured on held-out rows at the end."""
    shape: Callable[..., Any] | None = None
    """How logits come to have one row per example, as labels have."""
    keep: tuple[str, ...] = ()
    """Further columns of the rows."""
    outputs: int = 1
    """Of the model in training, where neither heads nor labels decide."""
    scorer: str = "learned"
    """Kind of reward that reads the checkpoint."""


def centre(config: RewardConfig) -> float:
    """The weight of TRL's centring term, for the pair losses that TRL lacks."""
    return config.trainer.get("center_rewards_coefficient") or 0.0


def _bradley_terry(config: RewardConfig) -> parts.Loss:
    return parts.on_pairs(
        lambda chosen, rejected, margin: losses.bradley_terry(chosen, rejected, margin=margin),
        centre=centre(config),
    )


def _smoothed(config: RewardConfig) -> parts.Loss:
    return parts.on_pairs(
        lambda chosen, rejected, margin: losses.bradley_terry(
            chosen, rejected, margin=margin, label_smoothing=config.flip_rate
        ),
        centre=centre(config),
    )


def _unbiased(config: RewardConfig) -> parts.Loss:
    return parts.on_pairs(
        lambda chosen, rejected, margin: losses.unbiased_bradley_terry(
            chosen, rejected, flip_rate=config.flip_rate
        ),
        centre=centre(config),
    )


def _scaled(config: RewardConfig) -> parts.Loss:
    return parts.on_pairs(
        lambda chosen, rejected, margin: losses.scaled_bradley_terry(
            chosen, rejected, strength=margin
        ),
        centre=centre(config),
    )


def _pairs(loss: Callable[[RewardConfig], parts.Loss]) -> RewardKind:
    return RewardKind(
        "preference", data.pair, loss, parts.pair_metrics, "pairs", shape=parts.as_pairs
    )


def _candidates(per_group: Callable[..., Any], keep: tuple[str, ...] = ()) -> RewardKind:
    return RewardKind(
        "ranking",
        data.candidates,
        lambda config: parts.on_candidates(per_group),
        parts.candidate_metrics,
        "candidates",
        shape=parts.as_candidates,
        keep=keep,
    )


KINDS: dict[str, RewardKind] = {
    "preference": _pairs(_bradley_terry),
    "smoothed": _pairs(_smoothed),
    "unbiased": _pairs(_unbiased),
    "scaled": _pairs(_scaled),
    "length_debiased": RewardKind(
        "preference",
        data.sized_pair,
        lambda config: parts.length_debiased(config.length_coef),
        parts.quality_metrics,
        "pairs",
        shape=parts.as_pairs,
        outputs=2,
    ),
    "cost": RewardKind(
        "preference",
        data.cost_pair,
        lambda config: parts.cost,
        parts.cost_metrics,
        "pairs",
        shape=parts.as_pairs,
        keep=("chosen_unsafe", "rejected_unsafe"),
        scorer="cost",
    ),
    "ranking": _candidates(losses.ranking),
    "best_of": _candidates(parts.best_first, keep=("best",)),
    "pairwise": RewardKind(
        "preference",
        data.joined_pair,
        lambda config: parts.binary,
        parts.binary_metrics,
        "compare",
        scorer="pairwise",
    ),
    "regression": RewardKind(
        "rated", data.attributes, lambda config: parts.ratings, parts.rating_metrics, "ratings"
    ),
    "classification": RewardKind(
        "classification",
        data.two_classes,
        lambda config: parts.binary,
        parts.binary_metrics,
        "classes",
    ),
    "classes": RewardKind(
        "classification",
        data.many_classes,
        lambda config: parts.classes,
        parts.class_metrics,
        "classes",
    ),
    "multilabel": RewardKind(
        "rated", data.flags, lambda config: parts.binary, parts.binary_metrics, "flags"
    ),
    "process": RewardKind(
        "steps",
        data.step_labels,
        lambda config: parts.steps,
        parts.step_metrics,
        "steps",
        outputs=2,
        scorer="process",
    ),
}


def kind_of(config: RewardConfig) -> RewardKind:
    """The row of a configuration; a classification of more than two classes has its own."""
    many = config.kind == "classification" and len(config.labels) > 2
    return KINDS["classes" if many else config.kind]


def outputs_of(config: RewardConfig) -> list[str]:
    """Names of the model's outputs; one without a name is just the score."""
    if config.num_heads > 1:
        return [f"head{i}" for i in range(config.num_heads)]
    if config.kind == "process":
        return ["wrong", "right"]
    if config.kind == "length_debiased":
        return ["quality", "length"]
    if config.kind == "classification" and len(config.labels) == 2:
        return config.labels[1:]  # one output: the log-odds of class 1
    return config.labels or ["reward"]
