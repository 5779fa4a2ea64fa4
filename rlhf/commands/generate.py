"""Implements `rlhf generate`, which samples completions from a model for prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rlhf.common.ranges import PositiveInt, Seed
from rlhf.config.base import CommandConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import RolloutSpec


@dataclass(frozen=True)
class GenerateConfig(CommandConfig):
    """Configuration of `rlhf generate`: a model, prompts, and the number of samples per prompt."""

    model: ModelSpec
    """Model to sample from."""
    prompt: str | None = None
    """A single prompt, as a user message; its completions are printed as text."""
    prompts: list[DataSpec] = field(default_factory=list)
    """Prompt datasets; completions are printed as JSON lines with prompt, completion and the
    reward_columns of the datasets."""
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
    from rlhf.rollout.completions import sample_completions

    prompts = (
        [
            prompt_with_tools(row)
            for row in load_and_log(config.prompts, "prompt", data_name="prompts", seed=config.seed)
        ]
        if config.prompts
        else [[{"role": "user", "content": config.prompt or ""}]]
    )
    reward_columns = {name for spec in config.prompts for name in spec.reward_columns or ()}
    model, tokenizer = load_model(config.model, seed=config.seed)
    for rollout in sample_completions(
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
            columns = {
                name: turn.pop(name) for turn in prompt for name in reward_columns if name in turn
            }
            line = {"prompt": prompt, "completion": [reply], **columns}
            yield json.dumps(line, ensure_ascii=False)
