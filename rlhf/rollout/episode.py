"""The state of an episode: its start, the requests for its replies, and the record of its turns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import gymnasium as gym

from rlhf.config.rollout import RolloutSpec
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.sampling.base import Completion, FinishReason, Request, SamplingParams
from rlhf.rollout.turns import StepResult, opening_messages

# First number of the sampling seeds, which makes them different from other seeds of the run.
SAMPLING_SEED_KEY = 7

_episode_ids = count()


@dataclass(frozen=True)
class EpisodeSeed:
    """The seeds of one episode.

    The environment is reset with ``seed``, which is the same for all episodes of a group.
    ``sample_index`` distinguishes the episodes of a group, so that their sampled tokens differ.
    """

    seed: int
    group_index: int
    sample_index: int


@dataclass
class EpisodeSettings:
    """The settings that the episodes of a collector have in common."""

    spec: RolloutSpec
    """Limits. In a chat, they are replaced, and the episode continues with the new ones."""
    chat_format: ChatFormat
    """Chat format of the policy."""
    context: int
    """Token limit of an episode whose prompt is not longer than this number."""
    long_context: int
    """Token limit of the other episodes."""
    examples: list[dict[str, Any]]
    """Messages that are inserted in every conversation, after the system message."""


@dataclass
class Episode:
    """An episode in progress. ``rollout.tokens`` are the prompt of the next reply."""

    id: int
    """Identifier of the episode in requests to the engine."""
    index: int
    """Index of the episode in the ``seeds`` of ``collect``."""
    env: gym.Env
    rollout: Rollout
    budget: int
    """Maximum number of tokens in the whole episode."""
    settings: EpisodeSettings
    turn: int = 0
    """Index of the current turn."""

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that can still be appended to the episode."""
        return self.budget - len(self.rollout.tokens)

    def make_request(self, sampling: SamplingParams) -> Request:
        """Return the request for the next reply."""
        rollout = self.rollout
        return Request(
            episode_id=self.id,
            prompt_ids=list(rollout.tokens),
            max_new_tokens=min(self.settings.spec.max_new_tokens, self.remaining_tokens),
            seed=(SAMPLING_SEED_KEY, rollout.seed, rollout.sample_index, self.turn),
            sampling=sampling,
        )

    def record_turn(self, completion: Completion, text: str, result: StepResult) -> bool:
        """Append a reply and the result of the environment's step to the rollout.

        Returns:
            Whether the episode is over.

        Raises:
            UserError: The chat template cannot render the observation after the reply.
        """
        rollout = self.rollout
        observation, _, terminated, truncated, _ = result
        rollout.append(
            completion.tokens,
            turn=self.turn,
            logprobs=completion.logprobs,
            policy_version=completion.policy_version,
        )
        rollout.stopped = completion.finish_reason == FinishReason.STOP
        rollout.num_length_limited += not rollout.stopped
        rollout.record_step(text, result)
        if terminated:
            return True
        ids = self.settings.chat_format.encode_text_between_replies(
            observation,
            reply=completion.tokens,
            has_system_message=rollout.conversation[0]["role"] == "system",
        )
        rollout.truncated = truncated or len(ids) >= self.remaining_tokens
        self.turn += 1
        # The observation after the last turn is appended too, because the critic estimates the
        # value of the last state.
        rollout.append(
            ids[: self.remaining_tokens],
            turn=self.turn,
            logprobs=None,
            policy_version=completion.policy_version,
        )
        return rollout.truncated


def start_episode(
    settings: EpisodeSettings,
    env: gym.Env,
    seed: EpisodeSeed,
    observation: str,
    info: dict[str, Any],
    *,
    index: int = 0,
    policy_version: int,
) -> Episode:
    """Start an episode from the result of ``reset``.

    Args:
        settings: Settings of the collector.
        env: The environment after its reset.
        seed: Seeds of the episode.
        observation: First observation.
        info: The environment's ``info`` of the start state.
        index: Index of the episode in the ``seeds`` of ``collect``.
        policy_version: Version of the policy that samples the first reply.

    Raises:
        UserError: The prompt exceeds the token limit, or the chat template cannot render it.
    """
    spec = settings.spec
    start_info = {**info, "observation": observation}
    rollout = Rollout(seed.seed, seed.group_index, seed.sample_index, start_info=start_info)
    rollout.conversation = opening_messages(env, observation, info, spec, settings.examples)
    ids = settings.chat_format.encode_prompt(rollout.conversation)
    context = settings.context if len(ids) <= settings.context else settings.long_context
    budget = min(spec.max_tokens or context, context)
    if len(ids) >= budget:
        raise UserError(
            f"the prompt of seed {seed.seed} has {len(ids)} tokens, but with a reply, an "
            f"episode is limited to {budget} tokens (rollout.max_tokens or the model's context); "
            "shorten the prompts or raise the limit"
        )
    rollout.append(ids, turn=0, logprobs=None, policy_version=policy_version)
    return Episode(next(_episode_ids), index, env, rollout, budget, settings)
