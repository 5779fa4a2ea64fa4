"""Show training transcripts whose tokens are shaded by a quantity, such as the advantage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.numbers import is_number
from rlhf.evaluation.records import RunRecord, has_recorded_tokens
from rlhf.reports.markup import esc
from rlhf.reports.transcripts import message_html, sample_scores_text

_ROWS_PER_STEP = 2


def token_samples_html(run: RunRecord) -> str:
    """Return up to `_ROWS_PER_STEP` samples with recorded tokens for each step, as HTML.

    The reader of the page selects the quantity that determines the color of the tokens. Pointing at
    a token shows all its quantities.
    """
    rows = [row for row in run.samples if has_recorded_tokens(row)]
    steps = sorted({int(row["step"]) for row in rows})
    rows_of = {step: [row for row in rows if row["step"] == step] for step in steps}
    cards = [_sample_html(row) for step in steps for row in rows_of[step][:_ROWS_PER_STEP]]
    names = list(dict.fromkeys(name for row in rows for name in _token_quantity_names(row)))
    first = "advantage" if "advantage" in names else next(iter(names), "")
    note = "Point at a token to see all of its values. Each card has its own scale."
    return html_with_shading_selector(names, first, note, cards)


def html_with_shading_selector(
    names: Sequence[str], selected: str, note: str, cards: Sequence[str]
) -> str:
    """Return cards with a choice of the quantity that determines the color of the tokens, as HTML.

    Args:
        names: Names of the quantities.
        selected: Name of the quantity that is selected first.
        note: Text above the cards.
        cards: HTML of each card; without cards, the result is "".
    """
    if not cards:
        return ""
    options = "".join(
        f"<option{' selected' if name == selected else ''}>{esc(name)}</option>" for name in names
    )
    return (
        f'<div class="shaded"><p class="note">Shade by <select aria-label="quantity">{options}'
        f"</select>. {esc(note)}</p>{''.join(cards)}</div>"
    )


def _token_quantity_names(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the recorded quantities of a sample's tokens."""
    return [name for name in row["tokens"] if name not in ("text", "turn")]


def _sample_html(row: Mapping[str, Any]) -> str:
    """Return a sample's conversation as HTML; its sampled replies are split into tokens."""
    table, messages = row["tokens"], row.get("messages") or []
    replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    turns = sorted(set(table["turn"]))
    sampled = replies[
        max(0, len(replies) - 1 - max(turns)) :
    ]  # Earlier replies belong to the prompt.
    turn_of = {sampled[t]: t for t in turns if t < len(sampled)}
    data = json.dumps(
        {
            name: [v if is_number(v) else None for v in table[name]]
            for name in _token_quantity_names(row)
        }
    )
    body = "".join(
        _reply_html(table, turn_of[i], message)
        if i in turn_of
        else message_html(message, show_assistant_role=True)
        for i, message in enumerate(messages)
    )
    label = f"step {row['step']} · seed {row['seed']} · {sample_scores_text(row)}"
    return (
        f'<article class="case"><header class="prompt"><small>{esc(label)}</small></header>'
        f'<div class="tokens" data-tokens="{esc(data)}">{body}</div></article>'
    )


def _reply_html(
    table: Mapping[str, Sequence[Any]], turn_number: int, message: Mapping[str, str]
) -> str:
    """Return the reply of turn `turn_number` as HTML, split into tokens."""
    pieces = [(i, table["text"][i]) for i, turn in enumerate(table["turn"]) if turn == turn_number]
    spans = "".join(f'<span data-at="{i}">{esc(piece)}</span>' for i, piece in pieces)
    missing = len(str(message.get("content", ""))) - sum(len(piece) for _, piece in pieces)
    note = f'<span class="note"> [{missing:,} characters were not saved]</span>'
    return f'<div class="turn">{spans}{note if missing > 0 else ""}</div>'
