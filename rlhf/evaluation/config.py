"""The configuration of `rlhf evaluate`; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.data.spec import DataSpec
from rlhf.models.spec import ModelSpec
from rlhf.rollout.spec import EnvSpec, RolloutSpec


@dataclass(frozen=True)
class PolicySpec:
    """A policy under a name: a model, or the environment's own random or expert policy."""

    name: str
    """Its name in tables and folders; without a model, "random" or "expert"."""
    model: ModelSpec | None = None
    """The model that plays."""

    def __post_init__(self) -> None:
        if self.model is None and self.name not in ("random", "expert"):
            raise ValueError(
                f"policies: {self.name!r} has no model; only random and expert need none"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, of whom. At least one of env, text and pairs."""

    output_dir: str
    """The run directory; every policy gets a folder in its evaluation/."""
    policies: list[PolicySpec] = field(default_factory=list)
    """Who plays, or whose text loss is measured."""
    env: EnvSpec | None = None
    """Episodes on a gymnasium environment or on prompts."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Rewards measured on the episodes, or on pairs."""
    text: list[DataSpec] = field(default_factory=list)
    """Prompts with completions: loss per completion token, perplexity."""
    pairs: list[DataSpec] = field(default_factory=list)
    """Preference pairs: accuracy of the rewards, beside trivial baselines."""
    pairs_train: list[DataSpec] = field(default_factory=list)
    """Pairs that the trained baselines (bag of words) may learn from."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """How policies are sampled."""
    episodes: int = 256
    """Episodes of each policy, on the same seeds."""
    first_episode: int = 0
    """Number of the first one: a choice made on some episodes is judged on others."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the likeliest token; sampled uses rollout.temperature."""
    max_length: int = 512
    """Tokens of one text example."""
    seed: int = 0
    """Of shuffles and limits of data sets."""
    resume: bool = False
    """Measure what is still missing in output_dir."""
    overwrite: bool = False
    """Replace an existing output_dir."""

    def __post_init__(self) -> None:
        if not (self.env or self.text or self.pairs):
            raise ValueError("evaluate: nothing to do; give env, text or pairs")
        if (self.env or self.text) and not self.policies:
            raise ValueError("policies: the list is empty; name at least one")
        if self.pairs and not self.rewards:
            raise ValueError("rewards: pairs need at least one reward to judge them")
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"policies: names must differ, got {', '.join(names)}")
        if self.first_episode < 0:
            raise ValueError(f"first_episode must be >= 0, got {self.first_episode}")
        if self.episodes < 2:
            raise ValueError(f"episodes must be >= 2 (an interval needs two), got {self.episodes}")
