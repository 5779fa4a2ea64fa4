"""Sample several replies of a policy to each prompt, as candidates for best-of-n."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.common.text import reason_counts_text
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.load import load_and_log
from rlhf.errors import UserError
from rlhf.evaluation.episodes import prompt_id_of
from rlhf.models.loading import load_model
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector
from rlhf.rollout.episode import EpisodeSeed
from rlhf.rollout.seeds import EVALUATION_BLOCK, evaluation_seed

log = logging.getLogger(__name__)


def play_episode_groups(
    model: ModelSpec,
    env: EnvSpec,
    rollout: RolloutSpec,
    *,
    start_seeds: Sequence[int],
    samples: int,
    seed: int,
) -> list[list[Rollout]]:
    """Collect several episodes of a model from each of several start states.

    Args:
        model: Model to load.
        env: Environment or prompt dataset.
        rollout: Sampling hyperparameters.
        start_seeds: Seed of each start state. If all are results of ``evaluation_seed``, the start
            states are from the test split of the environment, otherwise from the train split.
        samples: Number of episodes for each start state.
        seed: Seed for loading the model and the data.

    Returns:
        The episodes of each start state, in the order of ``start_seeds``. Episodes that failed
        are omitted if ``env.errors`` is "count", and with them a start state that has no other.

    Raises:
        UserError: The environment or the model cannot be loaded, every episode failed, or an
            episode failed and ``env.errors`` is "raise".
    """
    rows = load_and_log(env.prompts, "prompt", data_name="prompts", seed=seed)
    prompts = [prompt_with_tools(row) for row in rows]
    policy, tokenizer = load_model(model, seed=seed)
    held_out = all(start >= EVALUATION_BLOCK for start in start_seeds)
    collector = Collector.open(
        policy,
        tokenizer,
        env,
        rollout,
        prompts=prompts,
        split="test" if held_out else "train",
    )
    starts = [
        EpisodeSeed(start, group_index, sample_index)
        for group_index, start in enumerate(start_seeds)
        for sample_index in range(samples)
    ]
    try:
        rollouts = collector.collect(starts)
    finally:
        collector.close()
    groups: dict[int, list[Rollout]] = {}
    for episode in rollouts:
        groups.setdefault(episode.group_index, []).append(episode)
    return list(groups.values())


@dataclass(frozen=True)
class SampledReplies:
    """Conversations that a policy sampled from held-out start states."""

    groups: list[list[Any]]
    """The conversations of each start state."""
    units: list[Hashable]
    """Independent unit of each start state: its prompt, or its seed if start states are random."""


def sample_replies(
    model: ModelSpec, env: EnvSpec, rollout: RolloutSpec, *, prompts: int, samples: int, seed: int
) -> SampledReplies:
    """Sample ``samples`` conversations from each of ``prompts`` held-out start states.

    If there are fewer different prompts, start states repeat prompts. Start states of which an
    episode failed are omitted.

    Raises:
        UserError: See ``play_episode_groups``, or an episode of every start state failed.
    """
    seeds = [evaluation_seed(prompt) for prompt in range(prompts)]
    groups = play_episode_groups(model, env, rollout, start_seeds=seeds, samples=samples, seed=seed)
    complete = [group for group in groups if len(group) == samples]
    if len(complete) < prompts:
        log.warning(
            "%d of %d start states are omitted, because an episode failed",
            prompts - len(complete),
            prompts,
        )
    if not complete:
        raise UserError("an episode of every start state failed; correct the environment")
    first = [group[0] for group in complete]
    return SampledReplies(
        [[episode.scored_conversation for episode in group] for group in complete],
        [prompt_id_of(episode) or episode.seed for episode in first],
    )


def score_replies(reward: Any, groups: list[list[Any]], *, reward_name: str) -> np.ndarray:
    """Return the score of every conversation as an array [prompts, samples].

    Args:
        reward: Reward that scores conversations.
        groups: Conversations of each prompt; all prompts must have the same number.
        reward_name: Name of the reward in error messages.

    Raises:
        UserError: A reply has no score, or prompts have different numbers of replies.
    """
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise UserError(
            "every prompt needs the same number of replies, got between "
            f"{min(sizes)} and {max(sizes)}"
        )
    scores = reward.score([conversation for group in groups for conversation in group])
    if scores.unscored:
        raise UserError(
            f"{reward_name}: {scores.unscored} of {len(scores.values)} replies could not be scored "
            f"({reason_counts_text(scores.counts)})"
        )
    return np.array(scores.values, dtype=float).reshape(len(groups), -1)
