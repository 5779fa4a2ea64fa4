"""Convert the cells of a row to the canonical row of its kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.common.conversation import Conversation
from rlhf.common.files import is_utf8_encodable
from rlhf.config.data import Kind
from rlhf.data.answers import reference_answer, solution_answer
from rlhf.data.columns import FACT_FIELDS
from rlhf.data.conversation import (
    Cells,
    check_some_reply_has_weight,
    checked_prompt,
    is_hh_dialogue,
    read_messages,
    read_prompt,
    read_prompt_and_pair,
    read_prompt_and_reply,
    same_turns,
    split_before_first_reply,
    split_last_reply,
    split_reply_from_prompt,
)
from rlhf.data.messages import (
    Notes,
    RowDropped,
    decode_if_json,
    decode_if_json_messages,
    is_filled,
    messages_of_alternating_texts,
    parse_tools,
)

_MESSAGE_FIELDS = ("prompt", "completion", "chosen", "rejected", "response_a", "response_b")
"""Fields whose cells are text or messages; in CSV files the messages are JSON."""

ROW_OF_WEIGHT_0 = "row of weight 0"
"""Reason for dropping a row whose own weight is 0."""

OPTIONAL_FIELDS = (
    "system",
    "history",
    "tools",
    "context",
    "reasoning",
    "messages",
    "margin",
    "chosen_score",
    "rejected_score",
    "answer",
    "tests",
)
"""Optional fields of a row; cells that are not used are reported as ignored."""


def canonical_row(
    cells: Mapping[str, Any],
    kind: Kind,
    *,
    system: str | None,
    notes: Notes,
    reward_cells: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert cells to a canonical row.

    Args:
        cells: Field -> cell.
        kind: Kind of row.
        system: System message of the data source, for prompts without a system message.
        notes: Set to which descriptions of ignored cells are added.
        reward_cells: Reward column of the source -> cell, for rows with a prompt.

    Raises:
        RowDropped: The row cannot be used.
    """
    rest = {f: decode_if_json_messages(c) if f in _MESSAGE_FIELDS else c for f, c in cells.items()}
    if "messages" in rest:
        rest["messages"] = messages_of_alternating_texts(rest["messages"])
    result = CONVERTERS[kind](rest, notes)
    for reply in _replies_in(result):
        check_some_reply_has_weight(reply)
    if "prompt" in result:
        tools = parse_tools(rest.pop("tools", None))
        if tools:
            result["tools"] = tools
        result["prompt"] = _with_system_message(
            result["prompt"], rest.pop("system", None), system, notes
        )
        _add_answer_and_tests(result["prompt"], rest, notes)
        if reward_cells:
            last = _last_user_index(result["prompt"])
            result["prompt"][last] = {**result["prompt"][last], **reward_cells}
    else:
        if system is not None:
            notes.add("data.system for a row without a prompt")
        notes.update(
            f"reward column {name!r} for a row without a prompt" for name in reward_cells or ()
        )
    notes.update(f"{field} column" for field in OPTIONAL_FIELDS if is_filled(rest.get(field)))
    _check_unicode(result)
    return result


def _replies_in(row: Mapping[str, Any]) -> list[Conversation]:
    """Return the replies of a canonical row."""
    names = ("completion", "chosen", "rejected")
    return [row[name] for name in names if name in row] + list(row.get("replies", ()))


def _with_system_message(
    prompt: Conversation, cell: Any, default: str | None, notes: Notes
) -> Conversation:
    """Return the prompt with a system message.

    If the prompt has no system message, the text in `cell` is added, or `default` if `cell` has no
    text.
    """
    if is_filled(cell) and not isinstance(cell, str):
        notes.add("system column that is not text")
        cell = None
    row_text = cell if isinstance(cell, str) and cell.strip() else None
    for text in (row_text, default):
        if text is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": text}, *prompt]
    if row_text is not None and prompt[0]["content"].strip() != row_text.strip():
        notes.add("system column that differs from the prompt's system message")
    return prompt


def _add_answer_and_tests(prompt: Conversation, cells: Cells, notes: Notes) -> None:
    """Add the answer and the tests of the row to the last user message of the prompt, in place.

    They are removed from `cells`. Values that the message has already are kept, and a difference is
    noted.
    """
    last_user = _last_user_index(prompt)
    facts: dict[str, Any] = {}
    if "answer" in cells:
        read = solution_answer if cells.get("answer_is_solution") else reference_answer
        answer = read(cells.pop("answer"))
        if answer is None:
            notes.add("answer cell without an answer")
        else:
            facts["answer"] = answer
    tests = cells.pop("tests", None)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str) and tests.strip():
        facts["tests"] = tests
    elif tests is not None:
        notes.add("tests cell that is not a text or a list of texts, or is empty")
    for key, value in facts.items():
        if prompt[last_user].get(key, value) != value:
            notes.add(f"{key} column that differs from the {key} of its message")
    if facts:
        prompt[last_user] = facts | prompt[last_user]  # values in the message take precedence


def _last_user_index(prompt: Conversation) -> int:
    return max(i for i, turn in enumerate(prompt) if turn["role"] == "user")


def _check_unicode(result: Mapping[str, Any]) -> None:
    """Raise RowDropped for lone surrogates, which JSON allows but tokenizers reject."""
    texts: list[str] = []
    for value in result.values():
        _add_strings_in(value, texts)
    if not is_utf8_encodable("".join(texts)):
        raise RowDropped("broken Unicode")


def _add_strings_in(value: Any, texts: list[str]) -> None:
    """Add all strings in a value: a string, or nested lists and objects of strings."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for part in value.values():
            _add_strings_in(part, texts)
    elif isinstance(value, list):
        for part in value:
            _add_strings_in(part, texts)


def _sft_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    """Return a row of prompt and completion, or of text, unless the text is an HH-RLHF dialogue."""
    if "text" in cells and not (isinstance(cells["text"], str) and is_hh_dialogue(cells["text"])):
        return _text_row(cells, notes)
    if "messages" in cells or "text" in cells:
        messages = read_messages(cells.pop("messages", cells.get("text")), notes)
        prompt, completion = split_before_first_reply(messages, notes)
    else:
        prompt, completion = read_prompt_and_reply(cells, notes)
    return {"prompt": prompt, "completion": completion}


def _labeled_reply_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    prompt, completion = read_prompt_and_reply(cells, notes)
    return {"prompt": prompt, "completion": completion, "label": _parse_boolean(cells["label"])}


def _preference_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    if "response_a" in cells:
        cells |= chosen_and_rejected_cells(cells)
    prompt, chosen, rejected = read_prompt_and_pair(cells, notes)
    row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    margin = _read_margin(cells, notes)
    return row if margin is None else row | {"margin": margin}


def _read_margin(cells: Cells, notes: Notes) -> float | None:
    """Return the margin: the margin cell, or the chosen score minus the rejected score.

    The result is None if the row has neither, or if the values are not numbers.
    """
    margin = cells.pop("margin", None)
    scores = [cells.get(f"{side}_score") for side in ("chosen", "rejected")]
    try:
        if _has_value(margin):
            return float(parse_number(margin, "margin"))
        if not all(map(_has_value, scores)):
            return None
        better, worse = (float(parse_number(score, "score")) for score in scores)
    except RowDropped as reason:
        notes.add(str(reason))
        return None
    del cells["chosen_score"], cells["rejected_score"]
    return better - worse


def _has_value(value: Any) -> bool:
    """Return whether a cell has a value: not None, nan (pandas) or an empty string (CSV)."""
    return value is not None and value != "" and value == value


FIRST_REPLY_NAMES = ("a", "model_a", "response_a", "first", "chosen_a", "left")
SECOND_REPLY_NAMES = ("b", "model_b", "response_b", "second", "chosen_b", "right")


def chosen_and_rejected_cells(cells: Cells) -> dict[str, Any]:
    """Return the cells `chosen` and `rejected` of a row with two replies and a winner or scores.

    A winner is read by `winner_is_second`. If there are scores instead, the result also has
    `margin`, the difference of the scores.

    Raises:
        RowDropped: There is a tie, or the winner or a score cannot be read.
    """
    replies = cells["response_a"], cells["response_b"]
    if "winner" in cells:
        second = winner_is_second(cells["winner"])
        margin = {}
    else:
        scores = [float(parse_number(cells[f"score_{side}"], "score")) for side in "ab"]
        if scores[0] == scores[1]:
            raise RowDropped("tie")
        second = scores[1] > scores[0]
        margin = {"margin": abs(scores[0] - scores[1])}
    return {"chosen": replies[second], "rejected": replies[not second], **margin}


def winner_is_second(value: Any) -> bool:
    """Return whether the second reply is the winner.

    Args:
        value: One of FIRST_REPLY_NAMES or SECOND_REPLY_NAMES, or 0 or 1.

    Raises:
        RowDropped: The value is a tie, or not one of these values.
    """
    spelled = str(value).strip().lower()
    if spelled in FIRST_REPLY_NAMES or spelled in ("0", "0.0"):
        return False
    if spelled in SECOND_REPLY_NAMES or spelled in ("1", "1.0"):
        return True
    if "tie" in spelled or spelled in ("both_bad", "both", "neither", "draw"):
        raise RowDropped("tie")
    raise RowDropped("winner names neither reply")


def _prompt_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    """Return a row with the prompt.

    Replies at the end of messages are omitted; their answer and tests are added to `cells`.
    """
    if "prompt" in cells:
        return {"prompt": read_prompt(cells, notes)}
    if "chosen" in cells:
        return {"prompt": split_last_reply(read_messages(cells["chosen"], notes), notes)[0]}
    if "turns" in cells:
        return {"prompt": _prompt_from_turns(cells["turns"], notes)}
    messages = read_messages(cells.pop("messages", cells.get("text")), notes)
    facts: dict[str, Any] = {}
    while messages and messages[-1]["role"] == "assistant":
        *messages, reply = messages
        facts |= {field: reply[field] for field in FACT_FIELDS if field in reply}
        notes.add("reply after the prompt")
    for field, value in facts.items():
        cells.setdefault(field, value)
    return {"prompt": checked_prompt(messages)}


def _prompt_from_turns(value: Any, notes: Notes) -> Conversation:
    """Return the prompt of MT-Bench and Arena-Hard rows: the first user turn.

    Raises:
        RowDropped: The value is not a list that begins with a text or a message.
    """
    value = decode_if_json(value)
    if not isinstance(value, list) or not value:
        raise RowDropped("turns are not a list of texts")
    first = value[0].get("content") if isinstance(value[0], Mapping) else value[0]
    if not isinstance(first, str):
        raise RowDropped("turns are not a list of texts")
    if len(value) > 1:
        notes.add("turns after the first")
    return checked_prompt([{"role": "user", "content": first}])


def _text_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    text = cells["text"]
    if text is not None and not isinstance(text, str):
        raise RowDropped("text is not a string")
    if not text or not text.strip():
        raise RowDropped("empty text")
    return {"text": text}


def _rated_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    if "text" in cells:
        return _text_row(cells, notes)
    prompt, completion = read_prompt_and_reply(cells, notes)
    return {"prompt": prompt, "completion": completion}


def _classification_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    return _rated_row(cells, notes) | {"label": parse_number(cells["label"], "label")}


def _ranking_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    prompt, replies = read_prompt(cells, notes), decode_if_json(cells["replies"])
    if not isinstance(replies, list) or len(replies) < 2:
        raise RowDropped("fewer than two replies")
    answered = [split_reply_from_prompt(prompt, reply, notes) for reply in replies]
    if not all(same_turns(other, answered[0][0]) for other, _ in answered):
        raise RowDropped("system messages differ")
    ranked = [reply for _, reply in answered]
    if any(same_turns(*pair) for pair in itertools.combinations(ranked, 2)):
        raise RowDropped("equal replies")
    return {"prompt": answered[0][0], "replies": ranked}


def _steps_row(cells: Cells, notes: Notes) -> dict[str, Any]:
    prompt = read_prompt(cells, notes)
    steps, labels = decode_if_json(cells["steps"]), decode_if_json(cells["labels"])
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise RowDropped("steps are not a list of texts")
    if not isinstance(labels, list) or len(labels) != len(steps) or not steps:
        raise RowDropped("labels are not a list with one label for each step")
    if not all(label is None or label in (0, 1) for label in labels):
        raise RowDropped("a step's label is not true, false or missing")
    return {"prompt": prompt, "steps": steps, "labels": labels}


def parse_number(value: Any, field: str) -> int | float:
    """Return the number in a cell: an int for an int, a bool or an integral text, else a float.

    Raises:
        RowDropped: The cell is neither a finite number nor the text of a finite number.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowDropped(f"{field} is not a number") from None
        value = int(value) if value.is_integer() else value
    try:
        finite = isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # the integer is too large for a float
        finite = False
    if not finite:
        raise RowDropped(f"{field} is not a number")
    return int(value) if isinstance(value, bool) else value


def check_row_has_weight(value: Any, notes: Notes) -> None:
    """Check the weight of a whole row: 1 is the default, and 0 excludes the row from training.

    Other weights are noted, because no loss weights its rows.

    Raises:
        RowDropped: The weight is 0.
    """
    try:
        weight = parse_number(value, "weight") if _has_value(value) else 1
    except RowDropped:
        weight = None
    if weight == 0:
        raise RowDropped(ROW_OF_WEIGHT_0)
    if weight != 1:
        notes.add("row weight that is neither 0 nor 1")


def _parse_boolean(value: Any) -> bool:
    spelled = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, str) and value.strip().lower() in spelled:
        return spelled[value.strip().lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowDropped("label is not true or false")


CONVERTERS: dict[Kind, Callable[[Cells, Notes], dict[str, Any]]] = {
    "sft": _sft_row,
    "preference": _preference_row,
    "label": _labeled_reply_row,
    "prompt": _prompt_row,
    "text": _text_row,
    "classification": _classification_row,
    "rated": _rated_row,
    "ranking": _ranking_row,
    "steps": _steps_row,
}
