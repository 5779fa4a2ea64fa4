"""Configuration of `rlhf explain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.common.ranges import (
    AtLeastTwo,
    Fraction,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
)
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import RunConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec

AttributionMethod = Literal["gradient_x_input", "integrated_gradients", "shapley"]


@dataclass(frozen=True)
class AttributionSpec:
    """Attribution methods, and what else is computed for each pair or text."""

    methods: list[AttributionMethod] = field(
        default_factory=lambda: ["gradient_x_input", "integrated_gradients"]
    )
    """Attribution methods. The last one colors the page first and orders the words that
    counterfactual edits try."""
    tolerance: PositiveFraction = 0.01
    """Largest accepted completeness gap of integrated gradients, relative to the larger of |margin|
    and the standard deviation of the margins. Steps are added until the gap is accepted or
    max_steps is reached."""
    max_steps: PositiveInt = 600
    """Maximum number of gradients for one text."""
    orders: PositiveInt = 20
    """Number of random orders of the words of a reply; only for shapley."""
    prefix_points: NonNegativeInt = 48
    """Maximum number of points of a prefix-reward curve; 0 omits the curves."""
    other_prompts: NonNegativeInt = 8
    """Number of prompts of other pairs that replace the prompt of a pair; 0 omits the influence of
    the prompt."""
    counterfactual_words: NonNegativeInt = 6
    """Maximum number of words that a counterfactual edit deletes; 0 omits the edits."""
    neighbors: PositiveInt = 3
    """Number of nearest training pairs of each pair; only with train_pairs."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("attribution.methods is empty: give at least one method")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"attribution.methods must differ, got {', '.join(self.methods)}")
        if "shapley" in self.methods and len(self.methods) > 1:
            raise ValueError(
                "attribution.methods: shapley attributes to words and cannot be combined with "
                "methods that attribute to tokens"
            )


@dataclass(frozen=True)
class FaithfulnessSpec:
    """The deletion test of the attributions."""

    pairs: NonNegativeInt = 30
    """Maximum number of pairs from which tokens are deleted; 0 omits the test. Integrated gradients
    of many pairs take long on a CPU."""
    draws: PositiveInt = 4
    """Number of random deletions of each pair."""


@dataclass(frozen=True)
class ExplainedPolicySpec:
    """A policy whose log-ratios, entropies, values and advantages are shown."""

    model: ModelSpec
    """The policy. Values are shown if its folder contains a critic."""
    reference: ModelSpec | None = None
    """Reference policy of the log-ratios, usually the initial model of training."""
    gamma: Fraction = 1.0
    """Discount of the advantages."""
    lam: Fraction = 0.95
    """Parameter lambda of generalized advantage estimation."""


@dataclass(frozen=True)
class StageModel:
    """The model of a stage of training."""

    name: str
    """Name of the stage on the page."""
    model: ModelSpec
    """Model of the stage."""


@dataclass(frozen=True)
class ExplainConfig(RunConfig):
    """Configuration of `rlhf explain`: a reward, a policy, or stages of training, and texts."""

    pairs: list[DataSpec] = field(default_factory=list)
    """Preference pairs to explain. The policy and the stages are shown on their replies, too."""
    texts: list[DataSpec] = field(default_factory=list)
    """Single texts, or prompts with completions, whose scores are explained, for example those of a
    text classifier. The policy and the stages are shown on them, too."""
    shown: PositiveInt = 10
    """Maximum number of pairs and of texts that are explained on the page."""
    reward: str | None = None
    """Folder of a trained reward model."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards by kind, as in a training configuration; their weighted sum is explained."""
    train_pairs: list[DataSpec] = field(default_factory=list)
    """Training pairs of the reward, among which those nearest to each pair are searched."""
    attribution: AttributionSpec = field(default_factory=AttributionSpec)
    """Attributions, prefix-reward curves, influence of the prompt and counterfactual edits."""
    faithfulness: FaithfulnessSpec = field(default_factory=FaithfulnessSpec)
    """The deletion test of the attributions."""
    policy: ExplainedPolicySpec | None = None
    """A policy whose quantities are shown for each token."""
    stage_models: list[StageModel] = field(default_factory=list)
    """Stages of training in order, such as base, SFT and RL; neighboring stages are compared."""
    compared: AtLeastTwo = 50
    """Maximum number of replies on which stages are compared."""

    def __post_init__(self) -> None:
        if not (self.pairs or self.texts):
            raise ValueError("explain: there is nothing to explain; give pairs or texts")
        if self.reward is not None and self.rewards:
            raise ValueError("explain: give either --reward FOLDER or --rewards, not both")
        has_reward = self.reward is not None or bool(self.rewards)
        if not (has_reward or self.policy or self.stage_models):
            raise ValueError("explain: give a reward, a policy, or stage_models to explain")
        if len(self.stage_models) == 1:
            raise ValueError("stage_models: a comparison needs at least two stages")
        names = [stage.name for stage in self.stage_models]
        if len(set(names)) < len(names):
            raise ValueError(f"stage_models: names must differ, got {', '.join(names)}")
        if self.train_pairs and not (has_reward and self.pairs):
            raise ValueError("train_pairs has no effect without a reward and pairs")
