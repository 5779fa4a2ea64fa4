"""Plain text as token ids: no prompt, no template, every token but the first is learned."""

from __future__ import annotations

from typing import Any


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """A text as language modelling sees it: ids [T], and which of them are predicted [T].

    The ids are the tokenizer's own, with BOS where it writes one, and end with EOS. The first
    token has nothing to be predicted from.
    """
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids, [place > 0 for place in range(len(ids))]
