"""JSON of completions in the format of the OpenAI API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.serving.generation import Choice, Piece
from rlhf.serving.text import TokenNames


@dataclass(frozen=True)
class CompletionJson:
    """Builds the JSON of the response to one request; a subclass defines the format of a route.

    Args:
        model_name: Name of the model.
        names: Converts token ids to texts and bytes.
        samples: Number of completions of each prompt.
        with_logprobs: Whether the request asks for log-probabilities.
        with_token_ids: Whether the request asks for token ids.
    """

    model_name: str
    names: TokenNames
    samples: int
    with_logprobs: bool
    with_token_ids: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def complete_response(self, choices: Sequence[tuple[Choice, Piece]]) -> dict[str, Any]:
        """Return the response with all choices."""
        return {
            **self._shared_fields(is_chunk=False),
            "choices": [
                {
                    "index": choice.index,
                    **self._content(piece),
                    "finish_reason": piece.finish_reason,
                    **self._token_id_fields(choice.tokens, choice.prompt_ids),
                }
                for choice, piece in choices
            ],
            "usage": self._usage([choice for choice, _ in choices]),
        }

    def chunk(self, choice: Choice, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """Return a part of a stream; ``is_first`` is true for the first part of the choice."""
        tokens = [] if piece.is_prompt else piece.tokens
        body = {
            "index": choice.index,
            **self._content_of_chunk(piece, is_first=is_first),
            "finish_reason": piece.finish_reason,
            **self._token_id_fields(tokens, choice.prompt_ids if is_first else None),
        }
        return {**self._shared_fields(is_chunk=True), "choices": [body]}

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the last part of a stream, with the numbers of tokens."""
        return {**self._shared_fields(is_chunk=True), "choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the numbers of tokens. A prompt with several samples is counted once."""
        prompt = sum(len(choice.prompt_ids) for choice in choices[:: self.samples])
        completion = sum(len(choice.tokens) for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _token_id_fields(
        self, tokens: Sequence[int], prompt_ids: Sequence[int] | None
    ) -> dict[str, Any]:
        """Return the token ids of a choice, if the request asks for them."""
        if not self.with_token_ids:
            return {}
        prompt = {} if prompt_ids is None else {"prompt_token_ids": list(prompt_ids)}
        return {"token_ids": list(tokens), **prompt}

    def _shared_fields(self, *, is_chunk: bool) -> dict[str, Any]:
        """Return the fields that all parts of a response share."""
        raise NotImplementedError

    def _content(self, piece: Piece) -> dict[str, Any]:
        """Return the text and the log-probabilities of a choice."""
        raise NotImplementedError

    def _content_of_chunk(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """Return the text and the log-probabilities of a part of a choice."""
        raise NotImplementedError


class TextCompletionJson(CompletionJson):
    """Format of ``/v1/completions``."""

    def _shared_fields(self, *, is_chunk: bool) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model_name,
        }

    def _content(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(piece)}

    def _content_of_chunk(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        return self._content(piece)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        likely = [
            # Of two tokens with the same text, the more likely one is listed.
            {self.names.name(token): logprob for token, logprob in reversed(pairs)} or None
            for pairs in piece.alternatives
        ]
        return {
            "tokens": [self.names.name(token) for token in piece.tokens],
            "token_logprobs": piece.logprobs,
            "top_logprobs": likely or None,
            "text_offset": piece.offsets,
        }


class ChatCompletionJson(CompletionJson):
    """Format of ``/v1/chat/completions``."""

    def _shared_fields(self, *, is_chunk: bool) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": "chat.completion.chunk" if is_chunk else "chat.completion",
            "created": self.created,
            "model": self.model_name,
        }

    def _content(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(piece)}

    def _content_of_chunk(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": piece.text}, "logprobs": self._logprobs(piece)}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        likely = piece.alternatives or [[] for _ in piece.tokens]
        rows = zip(piece.tokens, piece.logprobs, likely, strict=True)
        content = [
            {
                **self._token_json(token, logprob),
                "top_logprobs": [self._token_json(*pair) for pair in pairs],
            }
            for token, logprob, pairs in rows
        ]
        return {"content": content, "refusal": None}

    def _token_json(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = list(self.names.bytes_of(token))
        return {"token": self.names.name(token), "logprob": logprob, "bytes": content}
