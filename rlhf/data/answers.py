"""Read the reference answers of prompt sets: one text, or a list of accepted texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.reward_models.notation.lexer import NotUnderstood
from rlhf.reward_models.notation.marks import last_box

Answer = str | list[str]
"""One correct answer, or a list of alternatives."""

FINAL_ANSWER_MARKER = "####"
"""Marker before the final answer of a solution in GSM8K."""


def reference_answer(value: Any) -> Answer | None:
    """Return the answer in a cell, or None if it contains none.

    - boolean: "True" or "False"
    - number: its shortest text, such as "42" for 42.0; None for nan and infinity
    - text: the part after the last `####`, or the whole text if it contains no `####`; the JSON of
      a list of texts, as in CSV cells, is read as this list
    - list: the list of the answers in its items, without repetitions; None if an item does not
      contain exactly one answer
    - object: the answer in the first of the keys `target`, `ground_truth`, `value` and `text` that
      the object has
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)):
        return _number_text(value)
    if isinstance(value, str):
        if texts := _json_texts(value):
            return reference_answer(texts)
        final = value.rpartition(FINAL_ANSWER_MARKER)[2].strip()
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


def _json_texts(value: str) -> list[str] | None:
    """Return the texts in the JSON of a list of texts; None for any other text.

    A list of numbers can be an interval or a vector, so it is not converted.
    """
    if not re.match(r"\s*\[\s*\"", value):
        return None
    try:
        texts = json.loads(value)
    except ValueError:
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \fbox{...}; None if there is none.

    The result is also None if the last box is empty or is not closed.
    """
    try:
        box = last_box(text)
    except NotUnderstood:
        return None
    return (box[2].strip() or None) if box else None


def solution_answer(value: Any) -> Answer | None:
    r"""Return the final answer in a solution, or None if it contains none.

    The answer is the content of the last \boxed{...} or \fbox{...}. Without a box, the answer is
    the text after the last `####`. Without both, it is the whole solution, provided that this is a
    single line. A value that is not a text is read by `reference_answer`.
    """
    if not isinstance(value, str):
        return reference_answer(value)
    answer = boxed_answer(value)
    if answer is not None or FINAL_ANSWER_MARKER in value:
        return answer or reference_answer(value)
    return reference_answer(value) if "\n" not in value.strip() else None


def _number_text(value: int | float) -> str | None:
    if isinstance(value, int):
        return str(int(value))
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return str(int(value)) if float(value).is_integer() else repr(value)
