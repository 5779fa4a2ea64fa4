"""Sample completions of prompts, outside of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.config.data import DataSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector
from rlhf.rollout.episode import EpisodeSeed


def sample_completions(
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
    env = EnvSpec(prompts=[DataSpec("the prompts")])  # a placeholder, which is not read
    collector = Collector.open(model, tokenizer, env, rollout, prompts=prompts)
    size = len(prompts)
    first = seed * size  # `size` consecutive seeds visit each prompt once
    starts = [EpisodeSeed(first + i, i, m) for i in range(size) for m in range(samples)]
    try:
        rollouts = collector.collect(starts, temperature=temperature)
    finally:
        collector.close()
    # The environment visits the prompts in the order of a fixed shuffle.
    return sorted(rollouts, key=lambda r: (r.start_info["prompt_index"], r.sample_index))
