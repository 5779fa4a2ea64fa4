"""Render tokens as HTML; the script of the page shades them by a quantity.

An attribution is an example of such a quantity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from rlhf.reports.markup import esc, number_text

_MAX_TOKENS = 1_500
"""Maximum number of tokens of a prompt or of a reply on the page."""


class ShadedTokens:
    """The shaded tokens of one card, which share a color scale.

    Args:
        names: Names of the quantities.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.columns: dict[str, list[float | None]] = {name: [] for name in names}

    def append_tokens_html(
        self, tokens: Sequence[str], values: Mapping[str, Sequence[float | None]]
    ) -> str:
        """Add tokens, and return their HTML. Tokens after the first `_MAX_TOKENS` are omitted.

        Args:
            tokens: Text of each token, [T].
            values: Name of a quantity -> its value for each token, [T].
        """
        shown = min(len(tokens), _MAX_TOKENS)
        start = len(next(iter(self.columns.values())))
        for name, column in self.columns.items():
            column += [_rounded(value) for value in values[name][:shown]]
        html = "".join(
            f'<span data-at="{start + i}">{esc(token) or "▯"}</span>'
            for i, token in enumerate(tokens[:shown])
        )
        omitted = len(tokens) - shown
        note = f'<span class="note"> [{omitted:,} tokens are only in the JSON file]</span>'
        return f'<div class="turn">{html}{note if omitted else ""}</div>'

    @property
    def values_attribute_html(self) -> str:
        """The values as an HTML attribute, which the script reads."""
        return esc(json.dumps(self.columns))


def strongest_tokens_text(
    tokens: Sequence[str], values: Sequence[float], positions: Sequence[int], count: int = 6
) -> str:
    """Return up to `count` tokens with the largest absolute values as text, such as `+0.21 “wine”`.

    Tokens with the value 0 are omitted.

    Args:
        tokens: Text of each token, [T].
        values: Value of each token, [T].
        positions: Positions of the tokens that are considered.
        count: Maximum number of tokens.
    """
    top = sorted(positions, key=lambda i: -abs(values[i]))[:count]
    return ", ".join(
        f"{'+' if values[i] > 0 else ''}{number_text(values[i])} “{tokens[i].strip() or tokens[i]}”"
        for i in top
        if values[i]
    )


def _rounded(value: float | None) -> float | None:
    """Return a value with four significant digits; None if it is not finite, for valid JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
