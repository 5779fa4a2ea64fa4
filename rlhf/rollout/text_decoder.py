"""Decode tokens as they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Number of tokens before a completion that are decoded with it. Some tokenizers, such as
SentencePiece, omit the space before the first token of a text."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalTextDecoder:
    """Decodes tokens step by step. Special tokens have no text.

    A token can be a part of a character, so the text of a token may be returned with that of a
    later token. The concatenation of all returned texts is the text of all tokens.

    Args:
        tokenizer: The tokenizer.
        context: Tokens before the text. Their text is not returned.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-CONTEXT_TOKENS:])
        self._num_returned = len(self._ids)
        self._returned = self._decode(self._ids)

    def append(self, ids: Sequence[int]) -> str:
        """Add tokens; return the new text, or "" while its last character is incomplete."""
        if not ids:
            return ""
        self._ids += ids
        text = self._decode(self._ids)
        return "" if text.endswith(_REPLACEMENT) else self._take_new_text(text)

    def finish(self) -> str:
        """Return the rest of the text, with an incomplete character as U+FFFD."""
        return self._take_new_text(self._decode(self._ids))

    def _take_new_text(self, text: str) -> str:
        """Return the new part of the text of all kept tokens, and forget the older tokens."""
        new = text[len(self._returned) :]
        self._ids = self._ids[self._num_returned :] or self._ids
        self._num_returned = len(self._ids)
        self._returned = self._decode(self._ids)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class IncrementalReplyDecoder:
    """Decodes a reply as it is sampled; `ChatFormat.decode_reply` decodes a finished reply.

    The time for a token does not depend on the number of earlier tokens.

    Args:
        tokenizer: The tokenizer.
        header: Tokens that the template writes before a reply; [] if there are none. The text
            begins after the last header.
    """

    def __init__(self, tokenizer: Any, header: Sequence[int]) -> None:
        self._tokenizer, self._header = tokenizer, list(header)
        self._last: list[int] = []  # as many tokens as the header has
        self._decoder = IncrementalTextDecoder(tokenizer)
        self.text = ""
        """Text so far, without an incomplete character at its end."""

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens. Their text is added to ``text``, which is emptied at the end of a header."""
        if not self._header:
            self.text += self._decoder.append(ids)
            return
        for token in ids:
            self._last = [*self._last, token][-len(self._header) :]
            if self._last == self._header:
                self._decoder, self.text = IncrementalTextDecoder(self._tokenizer), ""
            else:
                self.text += self._decoder.append([token])
