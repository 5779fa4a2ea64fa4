"""Configuration of `rlhf serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated

from annotated_types import Interval

from rlhf.common.ranges import NonNegativeInt, PositiveInt, Seconds
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import CommandConfig
from rlhf.config.engine import EngineSpec
from rlhf.config.model import ModelSpec

SERVING_ENGINES = ("local", "vllm")
"""Kinds of rollout engines with which `rlhf serve` can sample."""


@dataclass(frozen=True)
class ServedRolloutSpec:
    """The engine that samples the completions of a server."""

    parallel: PositiveInt = 16
    """Maximum number of completions that are decoded at the same time. The cache of the local
    engine has this number of rows, each as long as the longest of them."""
    engine: EngineSpec = field(default_factory=EngineSpec)
    """Rollout engine: local or vllm (docs/engines.md). vllm needs
    rollout.engine.folder."""

    def __post_init__(self) -> None:
        if self.engine.kind not in SERVING_ENGINES:
            raise ValueError(
                f"rollout.engine.kind {self.engine.kind} cannot be served; the kinds are "
                f"{' and '.join(SERVING_ENGINES)}"
            )
        if self.engine.kind == "vllm" and self.engine.folder is None:
            raise ValueError(
                "rollout.engine.folder: give a folder for the weights that vLLM loads, on a disk "
                "that its server reads under the same path"
            )


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests. A request beyond a limit is refused with the reason."""

    max_tokens: PositiveInt = 2048
    """Maximum number of tokens of a prompt with its completion. If the context length of the model
    is smaller, it is the limit."""
    completions: PositiveInt = 128
    """Maximum number of completions of one request, which has ``n`` completions for each of its
    prompts. The number is also limited to rollout.parallel + limits.queue."""
    conversations: PositiveInt = 256
    """Maximum number of conversations of one request for scores."""
    body_bytes: PositiveInt = 4 * 2**20
    """Maximum size of the body of a request, in bytes."""
    queue: NonNegativeInt = 256
    """Maximum number of completions that wait while rollout.parallel others are decoded, and of
    conversations that wait while limits.conversations others are scored. A request that exceeds it
    is refused with status 503 and the time after which it should be repeated."""
    seconds: Seconds = 600.0
    """Time limit of a request, in seconds. After it, the request ends with status 408. A connection
    is closed if the client does not read its response for this time."""
    shutdown_seconds: Seconds = 60.0
    """Time that running requests have to finish after the first signal (SIGTERM, Ctrl-C), in
    seconds."""


@dataclass(frozen=True)
class ServeConfig(CommandConfig):
    """Configuration of `rlhf serve`: a model, rewards, or both, on one address."""

    model: ModelSpec | None = None
    """Language model to serve."""
    name: str | None = None
    """Name of the model in requests; by default, the last part of model.path, or "model" without a
    path."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards to serve at /v1/score, in the format of a training configuration. The score is their
    weighted sum."""
    reward_name: str = "reward"
    """Name of the rewards in requests."""
    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach requires a key."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key: str | None = None
    """Key that every request must have, except those for /health. Other users of this machine can
    see it in the list of processes: prefer the environment variable RLHF_API_KEY. A configuration
    file must not contain it."""
    rollout: ServedRolloutSpec = field(default_factory=ServedRolloutSpec)
    """The engine that samples."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """Limits of requests."""

    def __post_init__(self) -> None:
        if "" in (self.name, self.reward_name):
            raise ValueError("name and reward_name must not be empty")
        if self.model is None and not self.rewards:
            raise ValueError("serve: give --model.path, --rewards, or both")
        if self.model is None:
            for key in ("name", "rollout"):
                default = ServedRolloutSpec() if key == "rollout" else None
                if getattr(self, key) != default:
                    raise ValueError(f"{key} has no effect without a model")
        if self.model is not None and self.model.lora is not None:
            raise ValueError(
                "model.lora adds untrained adapters; to serve trained ones, set model.path to "
                "their folder"
            )
        if not self.rewards and self.reward_name != "reward":
            raise ValueError("reward_name has no effect without rewards")
        if self.model is not None and self.rewards and self.model_name == self.reward_name:
            raise ValueError("name and reward_name must differ")

    @property
    def model_name(self) -> str:
        """Name of the language model in requests."""
        if self.name is not None:
            return self.name
        path = (self.model.path if self.model is not None else None) or ""
        name = PurePath(path).name
        if path and name in ("", ".."):  # a folder relative to the working directory
            name = Path(path).resolve().name
        return name or "model"
