"""Collect the completions of one request, as text with log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout.sampling.base import Alternatives, FinishReason, NewTokens
from rlhf.rollout.text_decoder import IncrementalTextDecoder
from rlhf.serving.errors import overloaded_error, timeout_error
from rlhf.serving.scheduler import Job, Overloaded, Progress, Scheduler
from rlhf.serving.text import StopStringFilter


@dataclass
class Piece:
    """A part of a choice: text with the tokens that were decoded for it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each token; None for the first token of a prompt."""
    alternatives: list[Alternatives] = field(default_factory=list)
    """Most likely tokens at each position, if the request asks for them."""
    offsets: list[int] = field(default_factory=list)
    """Number of characters before each token, in the whole text of the choice."""
    finish_reason: str | None = None
    """Reason why the choice ended, in its last piece."""
    is_prompt: bool = False
    """Whether the piece is the echoed prompt."""

    def extend(self, piece: Piece) -> None:
        """Append a later piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.alternatives += piece.alternatives
        self.offsets += piece.offsets
        self.finish_reason = piece.finish_reason or self.finish_reason


class Choice:
    """One completion of a request.

    Args:
        index: Index of the choice in the response.
        prompt_ids: Tokens of the prompt.
        decoder: Decodes the tokens of the completion.
        stop: Strings that end the completion.
        with_offsets: Whether the offsets of the tokens are needed.
        text_offset: Number of characters before the completion, for offsets.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        decoder: IncrementalTextDecoder,
        *,
        stop: Sequence[str],
        with_offsets: bool = False,
        text_offset: int = 0,
    ) -> None:
        self.index, self.prompt_ids = index, prompt_ids
        self.tokens: list[int] = []
        """Sampled tokens."""
        self.finish_reason: str | None = None
        self._decoder, self._stop, self._text_offset = decoder, StopStringFilter(stop), text_offset
        self._token_by_token = with_offsets or bool(stop)

    def receive(self, progress: Progress) -> Piece:
        """Append new tokens to ``tokens``, and return them as a piece.

        A stop string ends the choice; tokens after it are discarded.
        """
        new = progress.new_tokens
        if self._token_by_token:
            piece = self._decode_token_by_token(new)
        else:
            text = self._decoder.append(new.tokens)
            piece = Piece(text, list(new.tokens), list(new.logprobs), list(new.alternatives))
        self.tokens += piece.tokens
        if self._stop.found:
            self.finish_reason = "stop"
        elif progress.finish_reason is not None:
            piece.text += self._stop.append(self._decoder.finish()) + self._stop.finish()
            self.finish_reason = "stop" if self._stop.found else progress.finish_reason.value
        piece.finish_reason = self.finish_reason
        return piece

    def _decode_token_by_token(self, new: NewTokens) -> Piece:
        """Decode tokens up to the one that completes a stop string."""
        piece = Piece()
        for index, token in enumerate(new.tokens):
            decoded = self._decoder.append([token])
            piece.text += self._stop.append(decoded)
            piece.tokens.append(token)
            piece.logprobs.append(new.logprobs[index])
            piece.alternatives += new.alternatives[index : index + 1]
            piece.offsets.append(self._text_offset)
            self._text_offset += len(decoded)
            if self._stop.found:
                break
        return piece


def echoed_prompt_piece(
    text: str,
    ids: Sequence[int],
    prompt_logprobs: NewTokens | None,
    tokenizer: Any,
    *,
    with_alternatives: bool,
) -> Piece:
    """Return the prompt as the first piece of a choice that echoes it.

    Args:
        text: Text of the prompt.
        ids: Its tokens.
        prompt_logprobs: Log-probabilities of its tokens from the second one on. If None, the piece
            has only the text.
        tokenizer: The tokenizer.
        with_alternatives: Whether the request asks for the most likely tokens at each position.
    """
    if prompt_logprobs is None:
        return Piece(text, is_prompt=True)
    decoder, offsets, position = IncrementalTextDecoder(tokenizer), [], 0
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    for token in ids:
        offsets.append(position)
        decoded = decoder.append([token])
        name = special.get(token, "")
        if not decoded and text.startswith(name, position):
            decoded = name  # a special token that the client wrote in the text
        position += len(decoded)
    alternatives = [[], *prompt_logprobs.alternatives] if with_alternatives else []
    logprobs = [None, *prompt_logprobs.logprobs]
    return Piece(text, list(ids), logprobs, alternatives, offsets, is_prompt=True)


class Generation:
    """The running completions of one request.

    Args:
        scheduler: Samples the completions.
        time_limit: Time limit of the request in seconds.
    """

    def __init__(self, scheduler: Scheduler, *, time_limit: float) -> None:
        self._scheduler, self._time_limit = scheduler, time_limit
        self.choices: list[Choice] = []
        self._choice_of: dict[Job, Choice] = {}
        self._events: asyncio.Queue[Progress | None] = asyncio.Queue()

    def receive_progress(self, progress: Progress) -> None:
        """Receive the progress of a job."""
        self._events.put_nowait(progress)

    def start(self, choices: Sequence[Choice], jobs: Sequence[Job]) -> None:
        """Start to sample a job for each choice. Without jobs, the choices end immediately.

        Raises:
            ApiError: The queue is full.
            EngineFailed: The engine cannot be used.
        """
        try:
            self._scheduler.submit(jobs)
        except Overloaded as error:
            raise overloaded_error(error.retry_seconds) from error
        self.choices = list(choices)
        self._choice_of = dict(zip(jobs, choices, strict=False))
        for choice in self.choices[len(jobs) :]:
            choice.finish_reason = FinishReason.LENGTH.value

    def _end_at_time_limit(self) -> None:
        """End all completions at the time limit, also if no piece is taken at this time.

        A client that does not read its stream blocks the consumer of the pieces.
        """
        self.cancel()
        self._events.put_nowait(None)

    def cancel(self) -> None:
        """End all completions that are not finished."""
        for job in self._choice_of:
            self._scheduler.cancel(job)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Yield new pieces of the choices until all have ended.

        The time limit is counted from the start of the iteration. At the end of the iteration,
        unfinished completions are canceled.

        Raises:
            ApiError: The time limit is exceeded.
            EngineFailed: The engine failed.
        """
        unfinished = len(self._choice_of)
        timer = asyncio.get_running_loop().call_later(self._time_limit, self._end_at_time_limit)
        try:
            while unfinished:
                progress = await self._events.get()
                if progress is None:
                    raise timeout_error(self._time_limit)
                if progress.error is not None:
                    raise progress.error
                choice = self._choice_of[progress.job]
                if choice.finish_reason is not None:
                    continue  # tokens after a stop string
                piece = choice.receive(progress)
                if choice.finish_reason is not None:
                    unfinished -= 1
                    self._scheduler.cancel(progress.job)
                yield choice, piece
        finally:
            timer.cancel()
            self.cancel()
