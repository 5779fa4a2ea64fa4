"""Record the completions of an engine, and return recorded completions instead of sampling again.

When a run stops, it stores the replies that were not used for training yet. The resumed run plays
the same episodes again: the environments take the same steps, because their actions are the
recorded replies, and only the missing replies are sampled.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.rollout.sampling.base import Completion, FinishReason, Request, RolloutEngine

log = logging.getLogger(__name__)


class CollectionStopped(Exception):
    """The collection of a batch ends early, because its episodes are not needed."""


@dataclass(frozen=True)
class RecordedReply:
    """A completion, with the values that identify its request in another process."""

    step: int
    """Index of the training step that trains on the reply."""
    seed: tuple[int, ...]
    """Seed of the request, which differs for each turn of each training episode of a run."""
    prompt: str
    """Digest of the request's prompt."""
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    policy_version: int

    @classmethod
    def from_completion(cls, completion: Completion, step: int) -> RecordedReply:
        """Return the record of a completion."""
        return cls(
            step,
            completion.request.seed,
            prompt_digest(completion.request.prompt_ids),
            completion.tokens,
            completion.logprobs,
            completion.finish_reason,
            completion.policy_version,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RecordedReply:
        """Return the record of a row that ``to_row`` returned."""
        seed, reason = tuple(row["seed"]), FinishReason(row["finish_reason"])
        return cls(**{**row, "seed": seed, "finish_reason": reason})

    def to_row(self) -> dict[str, Any]:
        """Return the record as JSON values, which represent the log-probabilities exactly."""
        return asdict(self)

    def matches(self, request: Request) -> bool:
        """Return whether this reply fits a request: equal prompt, and at most its token limit."""
        return (
            self.prompt == prompt_digest(request.prompt_ids)
            and len(self.tokens) <= request.max_new_tokens
        )


def prompt_digest(ids: Sequence[int]) -> str:
    """Return a digest of token ids."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).hexdigest()


class RecordingEngine:
    """``RolloutEngine`` that records the completions of another engine, and can replay them.

    Args:
        engine: Engine that samples the replies for which there is no record.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.num_discarded = 0
        """Number of recorded replies that were not replayed, because they did not answer a request
        or because their policy was too old."""
        self._step = 0
        self._min_policy_version = 0
        self._recorded: list[Completion] = []
        self._to_replay: dict[tuple[int, ...], RecordedReply] = {}  # by seed
        self._ready: list[Completion] = []
        self._stop = threading.Event()

    @property
    def policy_version(self) -> int:
        """Version of the weights that sample the replies without a record."""
        return self.engine.policy_version

    def start_batch(self, step: int, *, min_policy_version: int) -> None:
        """Begin to record the replies of a training step.

        Args:
            step: Index of the training step.
            min_policy_version: Replies of earlier policies are not replayed but sampled again.
        """
        self._recorded = []
        self._step, self._min_policy_version = step, min_policy_version

    def finish_batch(self) -> list[Completion]:
        """End the batch, and return its completions.

        From now on, `replies_of_unfinished_batch` does not contain these completions. Replies to
        replay in this or an earlier step that no request asked for are dropped with a warning.
        """
        unused = [seed for seed, reply in self._to_replay.items() if reply.step <= self._step]
        for seed in unused:
            del self._to_replay[seed]
        self.num_discarded += len(unused)
        if self.num_discarded:
            log.warning(
                "step %d: %d recorded replies could not be replayed, so their turns were sampled "
                "again",
                self._step + 1,
                self.num_discarded,
            )
        recorded, self._recorded = self._recorded, []
        return recorded

    def pop_unreplayed_reply_count(self) -> int:
        """Return ``num_discarded``, and set it to 0."""
        count, self.num_discarded = self.num_discarded, 0
        return count

    def schedule_replay(self, replies: Iterable[RecordedReply]) -> None:
        """Add replies that are returned to the requests for which they were sampled."""
        self._to_replay |= {reply.seed: reply for reply in replies}

    def replies_of_unfinished_batch(self) -> list[RecordedReply]:
        """Return the replies of the unfinished batch, and those that were not replayed yet."""
        recorded = [
            RecordedReply.from_completion(completion, self._step) for completion in self._recorded
        ]
        return [*recorded, *self._to_replay.values()]

    def stop_at_next_poll(self) -> None:
        """Make the next call of ``poll`` raise `CollectionStopped`; any thread may call this."""
        self._stop.set()

    def update_policy(self, version: int) -> None:
        """Sample with the current weights of the policy from now on."""
        self.engine.update_policy(version)

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit requests to the other engine, except those for which a recorded reply is used."""
        missing = []
        for request in requests:
            reply = self._to_replay.pop(request.seed, None)
            if reply is None:
                missing.append(request)
            elif reply.policy_version < self._min_policy_version or not reply.matches(request):
                self.num_discarded += 1
                missing.append(request)
            else:
                self._ready.append(
                    Completion(
                        request,
                        reply.tokens,
                        reply.logprobs,
                        reply.finish_reason,
                        reply.policy_version,
                    )
                )
        self.engine.submit(missing)

    def poll(self) -> list[Completion]:
        """Return the replayed completions; if there are none, poll the other engine.

        Raises:
            CollectionStopped: ``stop_at_next_poll`` was called.
        """
        if self._stop.is_set():
            raise CollectionStopped
        completions, self._ready = self._ready, []
        completions = completions or self.engine.poll()
        self._recorded += completions
        return completions

    def release(self, episode_id: int) -> None:
        """Free the cache of an episode, and cancel its unfinished request if there is one."""
        self._ready = [c for c in self._ready if c.request.episode_id != episode_id]
        self.engine.release(episode_id)

    def reset(self) -> None:
        """Release all episodes and free the memory that sampling needs."""
        self._ready = []
        self.engine.reset()
