"""Continuous batching in this process: rows join and leave the batch while others are decoded.

Each row keeps its keys and values from turn to turn, so the model processes every token of an
episode once. A completion is returned as soon as it ends. The next turn of its episode, or a new
episode, then joins the rows that are being decoded. Every row has its own random numbers, so a
completion does not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf.rollout.sampling.base import (
    Alternatives,
    Completion,
    FinishReason,
    NewTokens,
    Request,
    SamplingParams,
)
from rlhf.rollout.sampling.decoder import make_fastest_matching_decoder
from rlhf.rollout.sampling.draw import most_likely_tokens, sample_tokens_and_logprobs
from rlhf.rollout.sampling.protocols import forward_new_tokens

# Rows with new tokens are prefilled if their number is at least this fraction of the number of
# decoding rows. With fewer rows, the prefill waits, because a prefill of a few tokens takes as long
# as a decoding step.
PREFILL_SHARE = 1 / 8


class ContinuousEngine:
    """``RolloutEngine`` that samples from a model in this process.

    Unless ``open_ended`` is set, the number of rows is the smaller of ``max_rows`` and the number
    of requests that are queued at the first ``poll``. The cache and the decoder's copies of weights
    exist until ``reset``.

    Args:
        model: Causal model. Its weights must not change between the first ``poll`` and ``reset``.
        max_rows: Maximum number of episodes that are decoded at once. Other episodes wait for a
            free row.
        open_ended: Whether requests keep arriving, as in a server. If so, there are ``max_rows``
            rows from the start, a new request is prefilled in the next ``poll``, and the cache
            grows with the tokens in it. Otherwise, a prefill can wait for further rows, and the
            cache has room for the longest possible completion.
    """

    def __init__(self, model: Any, *, max_rows: int, open_ended: bool = False) -> None:
        self.model, self.max_rows, self.open_ended = model, max_rows, open_ended
        self.policy_version = 0
        self.prefill_tokens = 0
        self._sampler: Sampler | None = None
        self._queue: deque[Request] = deque()

    def update_policy(self, version: int) -> None:
        """Set the version of the model's current weights.

        Raises:
            RuntimeError: ``reset`` was not called. The cache would contain keys and values that
                were computed with the old weights.
        """
        if self._sampler is not None:
            raise RuntimeError("reset the engine before the policy is updated")
        self.policy_version = version

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. A request that continues an episode uses the row of the episode."""
        for request in requests:
            if self._sampler is None or request.episode_id not in self._sampler.row_of:
                self._queue.append(request)
            else:
                self._sampler.start_request(request)

    def poll(self) -> list[Completion]:
        """Run one step of the sampler, and return the completions that ended in it."""
        if self._sampler is None and self._queue:
            rows = self.max_rows if self.open_ended else min(self.max_rows, len(self._queue))
            self._sampler = Sampler(
                self.model,
                rows=rows,
                policy_version=self.policy_version,
                open_ended=self.open_ended,
            )
        if self._sampler is None:
            return []
        while self._queue and len(self._sampler.row_of) < self._sampler.rows:
            self._sampler.start_request(self._queue.popleft())
        return self._sampler.step()

    def new_tokens(self, episode_id: int, start: int) -> NewTokens:
        """Return the tokens, from index ``start``, of the unfinished completion of an episode.

        The result is empty if there is no such completion, or if its request is still queued.
        """
        if self._sampler is None or episode_id not in self._sampler.requests:
            return NewTokens([], [], [])
        return self._sampler.new_tokens(episode_id, start)

    def release(self, episode_id: int) -> None:
        """Free the row of an episode, and cancel its unfinished request if there is one."""
        self._queue = deque(r for r in self._queue if r.episode_id != episode_id)
        if self._sampler is not None and episode_id in self._sampler.row_of:
            self._sampler.release(episode_id)

    def reset(self) -> None:
        """Cancel all requests, and free the cache and the decoder."""
        if self._sampler is not None:
            self.prefill_tokens += self._sampler.prefill_tokens
        self._sampler = None
        self._queue.clear()


class Sampler:
    """Samples completions for one batch of rows, with the cache and the state of each row.

    An episode occupies a row from its first ``start_request`` to its ``release``. In every forward
    pass, the rows in use are the first rows of the cache, without gaps.

    Args:
        model: Causal model, with adapters if it is a PEFT model. Its weights must not change while
            the sampler is used.
        rows: Maximum number of episodes in the batch.
        policy_version: Version of the model's weights.
        open_ended: See `ContinuousEngine`.
    """

    def __init__(
        self, model: Any, *, rows: int, policy_version: int = 0, open_ended: bool = False
    ) -> None:
        self.rows, self.policy_version, self.open_ended = rows, policy_version, open_ended
        self.decoder, self.device = make_fastest_matching_decoder(model), model.device
        self.cache: Any = self.decoder.new_cache(rows)
        self.row_of: dict[int, int] = {}
        self.episode_ids: list[int] = []  # by row
        self.free_rows: set[int] = (
            set()
        )  # released rows; `_compact_rows` removes them before a forward pass
        self.requests: dict[int, Request] = {}  # episode id -> unfinished request
        self.unread: dict[int, list[int]] = {}  # episode id -> tokens to prefill
        self.alternatives: dict[int, list[Alternatives]] = {}  # of requests that ask for them
        self.prefill_tokens = 0
        # The rows of the arrays are the rows of the cache. The columns of two-dimensional arrays
        # are the tokens of the unfinished completion.
        self.noise = np.zeros((rows, 0))
        self.tokens = np.zeros((rows, 0), dtype=np.int64)
        self.logprobs = np.zeros((rows, 0))
        self.count = np.zeros(rows, dtype=np.int64)
        self.limit = np.zeros(rows, dtype=np.int64)
        self.last = np.zeros(rows, dtype=np.int64)  # sampled token that is not in the cache yet
        self.decoding = np.zeros(rows, dtype=bool)

    def start_request(self, request: Request) -> None:
        """Start a completion, in the row of its episode or in a free row, which must exist."""
        episode_id = request.episode_id
        if episode_id not in self.row_of:
            row = min(self.free_rows, default=len(self.episode_ids))
            self.free_rows.discard(row)
            self.episode_ids[row : row + 1] = [episode_id]
            self.row_of[episode_id] = row
            self.cache.clear(row)
        row = self.row_of[episode_id]
        self.requests[episode_id] = request
        self.unread[episode_id] = list(request.prompt_ids[self.cache.lengths[row] :])
        self.alternatives.pop(episode_id, None)
        if request.num_alternatives:
            self.alternatives[episode_id] = []
        noise = np.random.default_rng(request.seed).random(request.max_new_tokens)
        if (missing := len(noise) - self.noise.shape[1]) > 0:
            widths = ((0, 0), (0, missing))
            self.noise, self.tokens = np.pad(self.noise, widths), np.pad(self.tokens, widths)
            self.logprobs = np.pad(self.logprobs, widths)
        self.noise[row, : len(noise)] = noise
        self.count[row], self.limit[row] = 0, len(noise)

    def release(self, episode_id: int) -> None:
        """Free the row of an episode, and cancel its unfinished request if there is one."""
        row = self.row_of.pop(episode_id)
        self.requests.pop(episode_id, None)
        self.unread.pop(episode_id, None)
        self.alternatives.pop(episode_id, None)
        self.free_rows.add(row)
        self.decoding[row] = False

    def _compact_rows(self) -> None:
        """Move rows from the end into free rows before them."""
        while self.free_rows:
            last = len(self.episode_ids) - 1
            moved = self.episode_ids.pop()
            if last in self.free_rows:
                self.free_rows.discard(last)
                continue
            row = self.free_rows.pop()
            self.episode_ids[row], self.row_of[moved] = moved, row
            self.cache.copy_row(last, row)
            for store in (self.noise, self.tokens, self.logprobs, self.count, self.limit):
                store[row] = store[last]
            self.last[row], self.decoding[row] = self.last[last], self.decoding[last]
            self.decoding[last] = False

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Run a prefill of new tokens, or a decoding step of every decoding row.

        Returns:
            The completions that ended in this step.
        """
        if not self.requests:
            return []
        self._compact_rows()
        decoding = np.flatnonzero(self.decoding)
        share = 0 if self.open_ended else PREFILL_SHARE
        if self.unread and len(self.unread) >= share * len(decoding):
            rows, logits = self._prefill_unread_tokens()
        else:
            rows, logits = decoding, self._decode(decoding)
        stopped = self._sample_and_find_stops(rows, logits)
        ended = stopped | (self.count[rows] == self.limit[rows])
        self.decoding[rows] = ~ended
        return [
            self._pop_completion(row, FinishReason.STOP if stop else FinishReason.LENGTH)
            for row, stop in zip(rows[ended].tolist(), stopped[ended].tolist(), strict=True)
        ]

    def _pop_completion(self, row: int, finish_reason: FinishReason) -> Completion:
        """Return the completion in a row, and end its request. The episode keeps its row."""
        episode_id = self.episode_ids[row]
        sampled = self.new_tokens(episode_id, 0)
        return Completion(
            request=self.requests.pop(episode_id),
            tokens=sampled.tokens,
            logprobs=sampled.logprobs,
            finish_reason=finish_reason,
            policy_version=self.policy_version,
            alternatives=sampled.alternatives,
        )

    def new_tokens(self, episode_id: int, start: int) -> NewTokens:
        """Return the tokens, from index ``start``, of the completion of an episode."""
        row = self.row_of[episode_id]
        part = slice(start, self.count[row])
        alternatives = self.alternatives.get(episode_id, [])[start:]
        return NewTokens(
            self.tokens[row, part].tolist(), self.logprobs[row, part].tolist(), alternatives
        )

    def _sample_and_find_stops(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """Sample the next token of rows [n] from logits [n, V], and store it.

        Returns:
            Whether the token of each row is a stop token of its request, [n].
        """
        requests = [self.requests[self.episode_ids[row]] for row in rows.tolist()]
        groups = _indices_by_sampling_params(requests)
        numbers = torch.from_numpy(self.noise[rows, self.count[rows]]).to(self.device)
        for sampling, members in groups.items():
            part = slice(None) if len(groups) == 1 else torch.tensor(members, device=self.device)
            tokens, logprobs = sample_tokens_and_logprobs(logits[part], numbers[part], sampling)
            own = rows[members]
            self.last[own] = tokens.cpu().numpy()
            self.logprobs[own, self.count[own]] = logprobs.double().cpu().numpy()
        self.tokens[rows, self.count[rows]] = self.last[rows]
        self.count[rows] += 1
        for index, request in enumerate(requests):
            if request.num_alternatives:
                (likely,) = most_likely_tokens(
                    logits[index, None], request.sampling, request.num_alternatives
                )
                self.alternatives[request.episode_id].append(likely)
        sampled = zip(self.last[rows].tolist(), requests, strict=True)
        return np.array([token in request.sampling.stop_ids for token, request in sampled])

    def _prefill_unread_tokens(self) -> tuple[np.ndarray, torch.Tensor]:
        """Compute the forward pass of all unread tokens.

        Equal prompts of new episodes are computed once, and their cache row is copied.

        Returns:
            The rows [n] with unread tokens, and the logits [n, V] after the last token of each row.
        """
        rows = np.array(sorted(self.row_of[episode_id] for episode_id in self.unread))
        inputs = [self.unread.pop(self.episode_ids[row]) for row in rows]
        reserved = 1 if self.open_ended else self.limit[rows]
        self.cache.ensure_capacity(
            int((self.cache.lengths[rows] + [len(ids) for ids in inputs] + reserved).max())
        )
        first: dict[Any, int] = {}
        source_of = [
            first.setdefault(row if self.cache.lengths[row] else tuple(ids), index)
            for index, (row, ids) in enumerate(zip(rows.tolist(), inputs, strict=True))
        ]
        sources = list(first.values())
        new_tokens = [inputs[index] for index in sources]
        self.prefill_tokens += sum(map(len, new_tokens))
        logits = forward_new_tokens(
            self.decoder, self.cache, rows[sources], new_tokens, self.device
        )
        for index, source in enumerate(source_of):
            if source != index:
                self.cache.copy_row(int(rows[source]), int(rows[index]))
        if len(sources) < len(rows):
            logits = logits[torch.from_numpy(np.searchsorted(sources, source_of)).to(self.device)]
        return rows, logits

    def _decode(self, decoding_rows: np.ndarray) -> torch.Tensor:
        """Return the logits [n, V] after the last token of each decoding row.

        If the cache is read in place, the forward pass includes every row up to the last decoding
        row, and the logits of the other rows are discarded.
        """
        if self.open_ended:
            used = self.cache.lengths[: decoding_rows[-1] + 1]
            self.cache.ensure_capacity(int(used.max()) + 1)
        if not self.cache.in_place:
            ids = self.last[decoding_rows, None].tolist()
            return forward_new_tokens(self.decoder, self.cache, decoding_rows, ids, self.device)
        front = np.arange(decoding_rows[-1] + 1)
        self.cache.plan_forward_pass(front, np.ones_like(front))
        logits = self.decoder(torch.from_numpy(self.last[front]).to(self.device), self.cache)
        self.cache.advance(decoding_rows, np.ones_like(decoding_rows))
        return logits if len(decoding_rows) == len(front) else logits[decoding_rows]


def _indices_by_sampling_params(requests: Sequence[Request]) -> dict[SamplingParams, list[int]]:
    """Return sampling parameters -> indices of the requests that have them."""
    first = requests[0].sampling
    if all(request.sampling is first for request in requests):  # training: no hash is computed
        return {first: list(range(len(requests)))}
    groups: dict[SamplingParams, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.sampling, []).append(index)
    return groups
