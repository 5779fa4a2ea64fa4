"""Implements `rlhf generate`, which samples completions from a model for prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf.common.ranges import PositiveInt, Seed
from rlhf.config.base import CommandConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec

if TYPE_CHECKING:
    from rlhf.rollout.batch import Rollout


@dataclass(frozen=True)
class GenerateConfig(CommandConfig):
    """Configuration of `rlhf generate`: a model, prompts, and the number of samples per prompt."""

    model: ModelSpec
    """Model to sample from."""
    prompt: str | None = None
    """A single prompt, as a user message; its completions are printed as text."""
    prompts: list[DataSpec] = field(default_factory=list)
    """Prompt datasets; completions are printed as JSON lines with prompt and completion."""
    samples: PositiveInt = 1
    """Number of samples for each prompt."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the most likely token; sampled uses rollout.temperature."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings, such as the temperature and the maximum number of tokens."""
    seed: Seed = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.prompts):
            raise ValueError("generate: set exactly one of --prompt and --prompts")


def generate(config: GenerateConfig) -> Iterator[str]:
    """Yield each completion: as text for a single `prompt`, as a JSON line for `prompts`."""
    from rlhf.data.load import load_and_log
    from rlhf.models.loading import load_model
    from rlhf.reward_models.chat_template import prompt_with_tools

    prompts = (
        [
            prompt_with_tools(row)
            for row in load_and_log(config.prompts, "prompt", what="prompts", seed=config.seed)
        ]
        if config.prompts
        else [[{"role": "user", "content": config.prompt or ""}]]
    )
    model, tokenizer = load_model(config.model, seed=config.seed)
    for rollout in completions(
        model,
        tokenizer,
        prompts,
        config.rollout,
        samples=config.samples,
        seed=config.seed,
        temperature=0.0 if config.decoding == "greedy" else None,
    ):
        *prompt, reply = rollout.conversation
        if config.prompt is not None:
            yield reply["content"]
        else:
            yield json.dumps({"prompt": prompt, "completion": [reply]}, ensure_ascii=False)


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    rollout: RolloutSpec,
    *,
    samples: int,
    seed: int,
    temperature: float | None = None,
) -> list[Rollout]:
    """Sample completions of prompts.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        prompts: Conversations that end with a user message.
        rollout: Sampling settings.
        samples: Number of completions of each prompt.
        seed: Random seed.
        temperature: Temperature in place of that of ``rollout``.

    Returns:
        The completions of the first prompt, then those of the second, and so on.
    """
    from rlhf.rollout.collector import Collector, EpisodeSeed

    env = EnvSpec(prompts=[DataSpec("the prompts")])  # a placeholder, which is not read
    collector = Collector.open(model, tokenizer, env, rollout, prompts=prompts)
    size = len(prompts)
    first = seed * size  # `size` consecutive seeds visit each prompt once
    starts = [EpisodeSeed(first + i, i, m) for i in range(size) for m in range(samples)]
    try:
        return collector.collect(starts, temperature=temperature)
    finally:
        collector.close()
