"""Configuration of `rlhf chat`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.common.ranges import Port, Seed
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import CommandConfig
from rlhf.config.labeling import check_annotator
from rlhf.config.rollout import EnvSpec, RolloutSpec

MAX_MODELS = 8
"""Maximum number of models side by side."""


@dataclass(frozen=True)
class ChatConfig(CommandConfig):
    """Configuration of `rlhf chat`: models, their partner, and what is recorded."""

    models: list[str] = field(default_factory=list)
    """Models that reply side by side: run directories, folders of models or adapters, GGUF files,
    short names (`rlhf models list`) or ids on the Hugging Face Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; see model.dtype of `rlhf generate --help`."""
    env: EnvSpec | None = None
    """Environment or prompt dataset that takes the place of the user: the models see its
    observations, and their replies are its actions. By default, the user is the partner."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings of all models, and the system message."""
    seed: Seed = 0
    """Random seed of sampling and of the environment. The first reply is that of `rlhf generate`
    with the same seed."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards that score every reply, in the format of a training configuration."""
    blind: bool = False
    """Hide which model gave a reply until the vote, and show the replies in random order."""
    labels: str | None = None
    """JSONL file to which votes are appended as preference pairs, for `rlhf reward` and `rlhf
    dpo`."""
    annotator: str = "anonymous"
    """Id of the person who votes, which is recorded with each pair; it may be a pseudonym."""
    interface: Literal["terminal", "page"] = "terminal"
    """terminal: this terminal; page: a page in the browser, served to this machine only."""
    port: Port = 0
    """Port of the page; 0 chooses a free one."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError(
                "chat: give at least one model, for example `rlhf chat runs/sft runs/ppo`"
            )
        if len(self.models) > MAX_MODELS:
            raise ValueError(
                f"chat: at most {MAX_MODELS} models fit side by side, got {len(self.models)}"
            )
        if self.blind and len(self.models) < 2:
            raise ValueError("blind has no effect with one model: give at least two models")
        if self.labels is not None and len(self.models) < 2:
            raise ValueError("labels: a vote compares replies, so give at least two models")
        if self.labels is not None and not self.labels.endswith(".jsonl"):
            raise ValueError(f"labels must be a file with the suffix .jsonl, got {self.labels!r}")
        if self.interface == "terminal" and self.port:
            raise ValueError("port has no effect on interface: terminal")
        check_annotator(self.annotator)
        if self.rollout.parallel != RolloutSpec.parallel:
            raise ValueError("rollout.parallel has no effect in a chat, which plays one episode")
        if self.env is not None and (self.env.errors, self.env.concurrency) != ("raise", "auto"):
            raise ValueError(
                "env.errors and env.concurrency have no effect in a chat, which plays one episode"
            )
        if self.env is not None and self.env.reward != 1.0:
            raise ValueError("env.reward has no effect in a chat, which trains nothing")
