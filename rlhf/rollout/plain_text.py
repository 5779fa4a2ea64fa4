"""Encode plain text for language modeling, without a prompt and a chat template."""

from __future__ import annotations

from typing import Any


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Encode a text, and mark the tokens to train on.

    Returns:
        Token ids [T], with the tokenizer's BOS if it adds one and with EOS at the end, and the loss
        mask [T], which is True for all tokens but the first.
    """
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids, [position > 0 for position in range(len(ids))]
