"""Interface of rollout engines: they receive token ids, and return token ids and log-probs.

A collector submits one request per turn and receives completions in any order. An engine can sample
in this process or on an inference server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Protocol


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The last token is a stop token."""
    LENGTH = "length"
    """The completion has the request's ``max_new_tokens`` tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of the distribution from which tokens are sampled."""

    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Number of most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the highest probability."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a completion; the stop token is part of it."""

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p can exclude a token."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    episode_id: int
    """Each request of an episode extends the previous one, so an engine can keep the KV cache."""
    prompt_ids: Sequence[int]
    """All tokens of the episode so far."""
    max_new_tokens: int
    seed: tuple[int, ...]
    """Entropy for ``numpy.random.SeedSequence``; the completion has no other randomness."""
    sampling: SamplingParams
    request_id: int = field(default_factory=count().__next__)


@dataclass(frozen=True)
class Completion:
    """The result of a request."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token after temperature and truncation.

    With greedy decoding, it is the log-probability under the model's own distribution.
    """
    finish_reason: FinishReason
    policy_version: int
    """Version of the weights that sampled the completion."""


class RolloutEngine(Protocol):
    """Interface for sampling completions with the current policy."""

    policy_version: int
    """Version of the weights in use."""

    def update_policy(self, version: int) -> None:
        """Use the policy's present weights from now on, under this version number."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return at once."""
        ...

    def poll(self) -> list[Completion]:
        """Return the completions that are ready, in any order; the list may be empty."""
        ...

    def release(self, episode_id: int) -> None:
        """End an episode: free its cache and cancel its unfinished request, if there is one."""
        ...

    def reset(self) -> None:
        """Release all episodes and free the memory that sampling needs."""
        ...
