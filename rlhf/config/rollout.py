"""What a configuration says about environments and sampling; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.config.data import DataSpec


@dataclass(frozen=True)
class EnvSpec:
    """Where episodes come from: a gymnasium environment, or a set of prompts."""

    id: str | None = None
    """Gymnasium id ("text/PreferenceBandit-v0"), or "module:Id" of your own package."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    prompts: list[DataSpec] = field(default_factory=list)
    """Prompt sets; each prompt is an episode of one turn, scored by the rewards."""
    reward: float = 1.0
    """Weight of the environment's own reward; with 0 it is measured (component "env"), not used."""
    errors: Literal["raise", "count"] = "raise"
    """An exception in the environment stops the run and names the seed, or drops the episode."""

    def __post_init__(self) -> None:
        if (self.id is None) == (not self.prompts):
            raise ValueError("env: give either env.id or env.prompts")
        if self.prompts and self.kwargs:
            raise ValueError("env.kwargs has no effect with env.prompts")
        if self.prompts and self.reward != 1.0:
            raise ValueError("env.reward has no effect with env.prompts, which have no reward")
        if self.prompts and self.errors != "raise":
            raise ValueError("env.errors has no effect with env.prompts, which cannot fail")


@dataclass(frozen=True)
class RolloutSpec:
    """How the policy is sampled."""

    max_new_tokens: int = 64
    """Tokens per turn; a longer reply is cut, which ends the turn and not the episode."""
    max_tokens: int | None = None
    """Tokens per episode, prompt included; beyond it it is truncated. None: the context."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in training alike."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0: among all. Not in training."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability; 1: all. Not in training."""
    min_p: float = 0.0
    """Draw among tokens at least this fraction as likely as the likeliest. Not in training."""
    parallel: int = 64
    """Episodes that decode together."""
    chat: bool | None = None
    """Use the model's chat template; None: where it has one."""
    separator: str = "\n"
    """Between turns of a base model."""
    stop: str | None = None
    """Text that ends a base model's reply, besides EOS."""
    system: str | None = None
    """System message, in place of the environment's or the prompt's own; None: that one."""
    invalid: Literal["end", "retry"] = "end"
    """What a reply that names no legal action does where actions are numbers. end: the episode is
    over; retry: nothing happens, and the next observation says which numbers are legal. Text
    environments judge replies themselves."""
    invalid_reward: float = 0.0
    """Reward of such a reply; below what any legal line of play earns, or such replies pay: where
    steps cost, 0 is too much (`rlhf envs check` tries it)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k must be >= 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"rollout.min_p must lie in [0, 1), got {self.min_p}")
        if self.chat and self.stop:
            raise ValueError(
                "rollout.stop has no effect with rollout.chat: the template ends turns"
            )

    @property
    def truncations(self) -> list[str]:
        """Which of top_k, top_p and min_p leave tokens out."""
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [name for name, value in neutral.items() if getattr(self, name) != value]
