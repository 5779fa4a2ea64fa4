"""Record one episode, and collate episodes into one batch of tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.common.conversation import up_to_last_reply
from rlhf.rollout.turns import StepResult


@dataclass
class Rollout:
    """One episode of T tokens. Lists of numbers have length T; index t describes token t."""

    seed: int
    """Seed with which the environment was reset."""
    group_index: int
    """Index of the group; the episodes of a group have the same start state."""
    sample_index: int
    """Index of the episode in its group."""
    tokens: list[int] = field(default_factory=list)
    is_action: list[bool] = field(default_factory=list)
    """True for sampled tokens, including the stop token."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the sampler; 0 for tokens that were not sampled."""
    env_rewards: list[float] = field(default_factory=list)
    """Rewards of the environment, which do not change after collection. The reward of a turn is at
    the last sampled token of the turn."""
    rewards: list[float] = field(default_factory=list)
    """Weighted sum of all rewards that are trained on, before scaling and penalties. The list is
    empty until the rollout is scored."""
    costs: list[float] = field(default_factory=list)
    """Costs of the environment, at the last sampled token of each turn."""
    turn: list[int] = field(default_factory=list)
    """Index of the turn that a token belongs to."""
    policy_versions: list[int] = field(default_factory=list)
    """Version of the policy that sampled the token. The tokens of an observation have the version
    of the reply before it, and those of the prompt have the version of the engine at the start."""
    terminated: bool = False
    """Whether the environment terminated the episode. If so, the value of the last state is 0."""
    truncated: bool = False
    """Whether the environment truncated the episode, or the token limit ended it. If so, the critic
    estimates the last state's value."""
    num_length_limited: int = 0
    """Number of replies without a stop token, which ended at the token limit of a turn or of the
    episode."""
    stopped: bool = True
    """Whether the last reply ended with a stop token."""
    invalid: int = 0
    """Number of invalid actions."""
    success: bool | None = None
    """Whether the task was solved; None if the environment does not report it."""
    conversation: list[dict[str, Any]] = field(default_factory=list)
    """Messages of the episode, from the system message to the last reply or observation."""
    components: dict[str, float | None] = field(default_factory=dict)
    """Name of a reward component -> its value for the episode."""
    unscored: str | None = None
    """Reason why the rewards could not score the episode; None if it was scored."""
    start_info: dict[str, Any] = field(default_factory=dict)
    """The environment's ``info`` of the start state, and its first ``observation`` as text."""

    def append(
        self,
        ids: Sequence[int],
        *,
        turn: int,
        logprobs: Sequence[float] | None,
        policy_version: int = 0,
    ) -> None:
        """Append the tokens of a prompt, reply or observation.

        Args:
            ids: Token ids.
            turn: Index of the turn.
            logprobs: Log-probability of each token; None if the tokens were not sampled.
            policy_version: Version of the policy.
        """
        self.tokens += ids
        self.is_action += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs
        self.env_rewards += [0.0] * len(ids)
        self.costs += [0.0] * len(ids)
        self.turn += [turn] * len(ids)
        self.policy_versions += [policy_version] * len(ids)

    def record_step(self, reply: str, result: StepResult) -> None:
        """Add a reply, whose tokens are appended already, and the result of its step.

        The attribute ``truncated`` is not changed.
        """
        observation, reward, self.terminated, _, info = result
        self.conversation.append({"role": "assistant", "content": reply})
        if not self.terminated:
            self.conversation.append({"role": "user", "content": observation})
        self.env_rewards[-1] += reward
        self.costs[-1] += float(info.get("cost", 0.0))
        self.invalid += not info.get("valid", True)
        success = info.get("is_success")
        self.success = None if success is None else bool(success)

    @property
    def scored_conversation(self) -> list[dict[str, Any]]:
        """The conversation up to the last reply, which rewards score.

        A truncated episode ends with an observation, which is no reply.
        """
        return up_to_last_reply(self.conversation)

    @property
    def opening(self) -> list[dict[str, Any]]:
        """The messages before the first sampled reply, which can include earlier replies."""
        roles = [message["role"] for message in self.conversation]
        replies = [i for i, role in enumerate(roles) if role == "assistant"]
        return self.conversation[: replies[-self.num_turns] if self.num_turns else None]

    @property
    def turns_of_sampled_tokens(self) -> list[int]:
        """The turn of each sampled token."""
        return [turn for turn, sampled in zip(self.turn, self.is_action, strict=True) if sampled]

    @property
    def num_turns(self) -> int:
        """Number of turns with a reply. An observation after the last reply is not counted."""
        return 1 + max(self.turns_of_sampled_tokens, default=-1)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(self.is_action)

    @property
    def num_sampled_tokens_in_longest_turn(self) -> int:
        """Largest number of sampled tokens in a turn."""
        return max(Counter(self.turns_of_sampled_tokens).values(), default=0)

    @property
    def env_return(self) -> float:
        """Sum of the environment's rewards in the episode."""
        return sum(self.env_rewards)

    @property
    def score(self) -> float:
        """Sum of ``rewards``; nan if the episode could not be scored."""
        return sum(self.rewards)

    @property
    def cost(self) -> float:
        """Sum of the costs in the episode."""
        return sum(self.costs)

    def with_terminal_reward(self, rewards: Sequence[float], amount: float | None) -> list[float]:
        """Return ``rewards`` [T] with ``amount`` added at the last sampled token.

        If ``amount`` is None, nan is added.
        """
        last = max(t for t, is_action in enumerate(self.is_action) if is_action)
        added = rewards[last] + (math.nan if amount is None else amount)
        return [*rewards[:last], added, *rewards[last + 1 :]]


def pad_right(
    lists: Sequence[Sequence[Any]],
    fill: float,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> torch.Tensor:
    """Pad B lists on the right with ``fill`` to [B, T].

    By default, the dtype is inferred from the values.
    """
    width = max(map(len, lists))
    rows = [[*values, *[fill] * (width - len(values))] for values in lists]
    return torch.tensor(rows, dtype=dtype, device=device)


def collate(
    rollouts: Sequence[Rollout],
    rewards: Sequence[Sequence[float]],
    *,
    pad_id: int,
    device: torch.device,
) -> TrainingBatch:
    """Pad rollouts on the right into one batch.

    Args:
        rollouts: B episodes.
        rewards: For each episode, the training rewards of its tokens.
        pad_id: Token id of the padding.
        device: Device of the tensors.
    """
    padded = partial(pad_right, device=device)

    def to_tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return TrainingBatch(
        tokens=padded([r.tokens for r in rollouts], pad_id, torch.long),
        attention_mask=padded([[True] * len(r.tokens) for r in rollouts], False, torch.bool),
        action_mask=padded([r.is_action for r in rollouts], False, torch.bool),
        sampler_logprobs=padded([r.logprobs for r in rollouts], 0.0, torch.float32),
        rewards=padded(rewards, 0.0, torch.float32),
        costs=padded([r.costs for r in rollouts], 0.0, torch.float32),
        turns=padded([r.turn for r in rollouts], -1, torch.long),
        groups=to_tensor([r.group_index for r in rollouts], torch.long),
        truncated=to_tensor([r.truncated for r in rollouts], torch.bool),
    )
