"""Encode plain text for language modeling. There is neither a prompt nor a chat template."""

from __future__ import annotations

from typing import Any


def encode_text_and_loss_mask(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Encode a text, and mark the tokens to train on.

    Returns:
        Token ids [T] and the loss mask [T]. The ids begin with BOS if the tokenizer adds it, and
        end with EOS. The mask is True for all tokens except the first.
    """
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids, [position > 0 for position in range(len(ids))]
