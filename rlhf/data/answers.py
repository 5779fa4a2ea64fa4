"""Reference answers of prompt sets, in the one form that rewards read: a text, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Answer = str | list[str]
"""One right answer, or several of which any is right."""

FINAL_MARK = "####"
"""What GSM8K writes before the final answer of a worked solution."""


def reference_answer(value: Any) -> Answer | None:
    """The answer that a cell states; None where it states none.

    Numbers become their shortest text (42.0 is "42"), a list becomes the list of its members, of
    which any is right. A text with `####` gives what follows the last mark. An object is read at
    `target`, `ground_truth`, `value` or `text`.
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)):
        return _number_text(value)
    if isinstance(value, str):
        final = value.rpartition(FINAL_MARK)[2].strip()
        return final or None
    if isinstance(value, Mapping):
        keys = ("target", "ground_truth", "value", "text")
        return next((reference_answer(value[key]) for key in keys if key in value), None)
    if isinstance(value, Sequence):
        members = [reference_answer(member) for member in value]
        texts = [member for member in members if isinstance(member, str)]
        distinct = list(dict.fromkeys(texts))
        return distinct if len(texts) == len(members) and distinct else None
    return None


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, its braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place].strip() or None
    return None


def solution_answer(value: Any) -> Answer | None:
    r"""The final answer of a worked solution: what is boxed, or all of it if it is one line."""
    if not isinstance(value, str):
        return reference_answer(value)
    found = boxed(value)
    if found is not None or FINAL_MARK in value:
        return found or reference_answer(value)
    return reference_answer(value) if "\n" not in value.strip() else None


def _number_text(value: int | float) -> str | None:
    if isinstance(value, int):
        return str(int(value))
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return str(int(value)) if float(value).is_integer() else repr(value)
