"""Detect prompts of a test set in a training set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.splits import prompt_key, prompt_text

NGRAM_SIZE = 13
"""Number of consecutive words that count as overlap (Brown et al. 2020, appendix C)."""

_WORD = re.compile(r"\w+")


def indices_of_shared_prompts(
    rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Return the indices of `rows` whose prompt is also a prompt of `against`, by `prompt_key`."""
    known = {prompt_key(row) for row in against}
    return [index for index, row in enumerate(rows) if prompt_key(row) in known]


def indices_with_shared_prompt_ngrams(
    rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Return the indices of `rows` that share 13 consecutive prompt words with a row of `against`.

    Punctuation and case are ignored. Prompts of fewer than 13 words never overlap.
    """
    known = {gram for row in against for gram in _prompt_ngram_hashes(row)}
    return [i for i, row in enumerate(rows) if not known.isdisjoint(_prompt_ngram_hashes(row))]


def ngram_hashes(text: str, size: int = NGRAM_SIZE) -> set[int]:
    """Return the hashes of all sequences of `size` consecutive words of a text.

    The hashes of different processes differ.
    """
    words = _WORD.findall(text.casefold())
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


def _prompt_ngram_hashes(row: Mapping[str, Any]) -> set[int]:
    return ngram_hashes(
        prompt_text(row, with_role_names=False)
    )  # Role names are omitted, because they are not words of the prompt.
