"""Find stop strings, and name single tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StopStringFilter:
    """Ends a text before the first of several strings.

    Args:
        strings: The strings, which are not empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = tuple(strings), ""
        self._longest = max(map(len, strings), default=0)
        self.found = False
        """Whether the text contains one of the strings."""

    def append(self, text: str) -> str:
        """Add text; return the new text that is certainly before a stop string.

        The first stop string sets ``found`` and ends the text.
        """
        if not self._strings:
            return text
        self._held += text
        starts = [start for s in self._strings if (start := self._held.find(s)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        size = len(self._held) - self._length_of_possible_start()
        safe, self._held = self._held[:size], self._held[size:]
        return safe

    def finish(self) -> str:
        """Return the text that was withheld because it could be the start of a stop string."""
        rest, self._held = self._held, ""
        return "" if self.found else rest

    def _length_of_possible_start(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0


class TokenNames:
    """Texts and bytes of single tokens, for log-probabilities.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._byte_of = _byte_alphabet() if _is_byte_level(tokenizer) else None

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, which may be an incomplete character; b"" if unknown."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the embedding can have more rows than the vocabulary has tokens
            return b""
        if self._byte_of is not None and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    def name(self, token: int) -> str:
        r"""Return the text of a token; ``bytes:\xe2\x82`` for an incomplete character."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _is_byte_level(tokenizer: Any) -> bool:
    """Return whether each character of the vocabulary represents a byte, as in GPT-2."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and b"ByteLevel" in (
        backend.decoder.__getstate__() if backend.decoder is not None else b""
    )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte of byte-level tokenizers (Radford et al. 2019).

    Printable bytes are represented by themselves, the other bytes by the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
