"""Interface of rollout engines, which sample token ids with log-probabilities.

A collector submits one request per turn, and receives completions in any order. An engine can
sample in this process or on an inference server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Protocol, runtime_checkable

from rlhf.errors import UserError


class FinishReason(StrEnum):
    """Reason why a completion ended."""

    STOP = "stop"
    """The last token is a stop token."""
    LENGTH = "length"
    """The completion has the request's ``max_new_tokens`` tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of the distribution from which tokens are sampled."""

    temperature: float = 1.0
    """Divisor of the logits; 0 means greedy decoding."""
    top_k: int = 0
    """Number of most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Minimum total probability of the tokens to keep. The smallest set of most likely tokens with
    this total probability is kept; 1 keeps all."""
    min_p: float = 0.0
    """Minimum probability of a token to keep, as a fraction of the highest probability; 0 keeps
    all."""
    stop_ids: frozenset[int] = frozenset()
    """Ids of the tokens that end a completion. The stop token is part of the completion."""

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p can exclude a token."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    episode_id: int
    """Identifier of the episode. The prompt of each request of an episode extends the tokens of the
    previous request and its completion, so an engine can keep the KV cache."""
    prompt_ids: Sequence[int]
    """All tokens of the episode so far."""
    max_new_tokens: int
    seed: tuple[int, ...]
    """Seed of the completion's random numbers, for ``numpy.random.default_rng``."""
    sampling: SamplingParams
    request_id: int = field(default_factory=count().__next__)
    """Unique identifier of the request."""
    num_alternatives: int = 0
    """Number of most likely tokens to return at each position with their log-probabilities. Only
    the engine in this process returns them."""


Alternatives = list[tuple[int, float]]
"""Most likely tokens at one position with their log-probabilities, the most likely token first.
Tokens that the truncation excludes are omitted."""


@dataclass(frozen=True)
class Completion:
    """The result of a request."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token in nats, after temperature and truncation. With greedy
    decoding, it is the log-probability at temperature 1."""
    finish_reason: FinishReason
    policy_version: int
    """Version of the weights that sampled the completion."""
    alternatives: list[Alternatives] = field(default_factory=list)
    """Most likely tokens at each position, if the request has `num_alternatives`."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens of a completion that an engine has sampled since an earlier position."""

    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token, see `Completion.logprobs`."""
    alternatives: list[Alternatives]
    """Most likely tokens at each position, see `Completion.alternatives`."""


class EngineStopped(UserError):
    """An engine outside this process does not answer. The run stops with a checkpoint."""


class RolloutEngine(Protocol):
    """Interface for sampling completions with the current policy."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that the engine uses."""
        ...

    def update_policy(self, version: int) -> None:
        """Use the current weights of the policy from now on.

        Args:
            version: Version number of these weights. The same version always has the same weights,
                so an engine that copies weights need not copy them again.
        """
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return immediately."""
        ...

    def poll(self) -> list[Completion]:
        """Return the completions that are ready, in any order. The list may be empty."""
        ...

    def release(self, episode_id: int) -> None:
        """Free the cache of an episode, and cancel its unfinished request if there is one."""
        ...

    def reset(self) -> None:
        """Release all episodes and free the memory that sampling needs."""
        ...


@runtime_checkable
class IncrementalEngine(RolloutEngine, Protocol):
    """An engine that can return the tokens of completions that are not finished."""

    def new_tokens(self, episode_id: int, start: int) -> NewTokens:
        """Return the tokens, from index `start`, of the unfinished completion of an episode.

        The result is empty if there are no such tokens, for example because the request is still
        queued.
        """
        ...


class EngineBase:
    """Base class for rollout engines outside the toolkit; a subclass implements submit and poll."""

    policy_version = 0

    def update_policy(self, version: int) -> None:
        """Use the current weights of the policy; by default, only store the version number."""
        self.policy_version = version

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return immediately."""
        raise NotImplementedError

    def poll(self) -> list[Completion]:
        """Return the completions that are ready, in any order. The list may be empty."""
        raise NotImplementedError

    def release(self, episode_id: int) -> None:
        """Free the memory of an episode, and cancel its request; by default, do nothing."""

    def reset(self) -> None:
        """Release all episodes; by default, do nothing."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step, which are logged; by default, there are none."""
        return {}

    def close(self) -> None:
        """Release the resources of the engine; by default, do nothing."""
