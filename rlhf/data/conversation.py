"""Read conversations from cells, validate them, and split them into a prompt and its replies.

`check_role_order` validates the messages of every dataset format. A row that cannot be used raises
`RowDropped`; the loader counts these rows by reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.conversation import Conversation, Message
from rlhf.data.messages import (
    ROLES,
    Notes,
    RowDropped,
    add_reasoning,
    decode_if_json,
    is_message,
    parse_messages,
)

Cells = dict[str, Any]
"""Field -> cell of the row. A function that uses an optional cell removes it from the mapping."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_NEMO_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")

REPLY_OF_WEIGHT_0 = "every reply has weight 0"
"""Reason for dropping a row with a reply whose messages all have weight 0."""
MIN_PASSAGE_WORDS = 5
"""Minimum number of words of a context that may match a part of a line of a prompt."""


def as_conversation(value: Any, notes: Notes) -> Conversation:
    """Convert text, a dialogue, one message, or a list of messages to a conversation.

    Plain text becomes one user turn. None becomes an empty conversation.

    Raises:
        RowDropped: The value is of another type, or a message cannot be converted.
    """
    if isinstance(value, str):
        return _conversation_from_text(value)
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value] if is_message(value) else None
    if not isinstance(value, Sequence):
        raise RowDropped("neither text nor messages")
    return parse_messages(value, notes)


def _conversation_from_text(text: str) -> Conversation:
    if is_hh_dialogue(text):
        return parse_hh_dialogue(text)
    # Prompts of NVIDIA's datasets can contain several turns; the first is a user turn.
    first, *rest = _NEMO_TURN.split(text)
    turns: Conversation = [{"role": "user", "content": first}]
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": ROLES[speaker.lower()], "content": content})
    return turns


def is_hh_dialogue(text: str) -> bool:
    r"""Return whether `text` starts with "Human:" and contains "\n\nAssistant:" (HH-RLHF)."""
    return _HH_START.match(text) is not None


def parse_hh_dialogue(text: str) -> Conversation:
    r"""Return the messages of an HH-RLHF dialogue ("\n\nHuman: ...\n\nAssistant: ...").

    A turn begins with "Human:" or "Assistant:" after a blank line. The contents are stripped and
    may be empty, as after "\n\nAssistant:" at the end of a prompt.
    """
    pieces = _HH_TURN.split("\n\n" + text.lstrip())
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def read_messages(value: Any, notes: Notes) -> Conversation:
    """Convert a cell with text, a dialogue, messages, or the JSON of messages to a conversation."""
    return as_conversation(decode_if_json(value), notes)


def check_role_order(messages: Sequence[Message]) -> None:
    """Check that the roles have the order that chat templates require.

    - A system turn is allowed only at the start.
    - The first other turn is a user turn.
    - Consecutive turns have different roles, except tool turns.
    - A tool turn follows an assistant turn or another tool turn.

    Raises:
        RowDropped: The turns violate one of these rules.
    """
    previous = None
    for index, turn in enumerate(messages):
        role = turn["role"]
        if role == "system":
            if index:
                raise RowDropped("system message after the start")
            continue
        if previous is None and role != "user":
            raise RowDropped("first turn is not a user turn")
        if role == previous and role != "tool":
            raise RowDropped("consecutive turns with the same role")
        if role == "tool" and previous == "user":
            raise RowDropped("tool result without a call")
        previous = role


def is_empty_turn(turn: Message) -> bool:
    """Return whether a turn has neither text nor tool calls; a tool result is never empty."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def checked_prompt(messages: Conversation) -> Conversation:
    """Return a validated prompt, without an empty assistant turn at its end.

    Raises:
        RowDropped: The prompt has no user turn with text, has an empty turn, does not end with a
            user or tool turn, or fails `check_role_order`.
    """
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # the empty "\n\nAssistant:" at the end of a dialogue prompt
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise RowDropped("empty prompt")
    if any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty turn in the prompt")
    check_role_order(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowDropped("prompt ends with an assistant turn")
    return messages


def checked_reply(messages: Conversation) -> Conversation:
    """Return a validated reply, which begins and ends with an assistant turn.

    Raises:
        RowDropped: The reply is empty, has an empty turn, contains a user or system turn, does not
            begin and end with an assistant turn, or fails `check_role_order`.
    """
    if not messages or any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty reply")
    if any(turn["role"] not in ("assistant", "tool") for turn in messages):
        raise RowDropped("reply contains a user or system turn")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowDropped("reply does not begin and end with an assistant turn")
    check_role_order([{"role": "user", "content": ""}, *messages])
    return messages


def split_reply_from_prompt(
    prompt: Conversation, value: Any, notes: Notes
) -> tuple[Conversation, Conversation]:
    """Split the value of a reply column into (prompt, reply).

    Args:
        prompt: Prompt of the row.
        value: Reply text, a list of reply messages, or a whole conversation that begins with the
            prompt. A system message at its start becomes part of the prompt.
        notes: Descriptions of ignored parts, changed in place.

    Raises:
        RowDropped: The prompt or the system message in `value` differs from that in `prompt`, or
            the reply is not valid.
    """
    if isinstance(value, str):
        return prompt, checked_reply([{"role": "assistant", "content": value}])
    messages = as_conversation(value, notes)
    rest, prompt_turns = without_system(messages), without_system(prompt)
    system = messages[: len(messages) - len(rest)]
    if rest and rest[0]["role"] != "assistant":
        if not same_turns(rest[: len(prompt_turns)], prompt_turns):
            raise RowDropped("prompts differ")
        rest = rest[len(prompt_turns) :]
    if system and len(prompt_turns) < len(prompt) and not same_turns(system, prompt[:1]):
        raise RowDropped("system messages differ")
    if system and len(prompt_turns) == len(prompt):
        prompt = [*system, *prompt]
    return prompt, checked_reply(rest)


def same_turns(first: Sequence[Message], second: Sequence[Message]) -> bool:
    """Return whether two lists of turns are equal except for white space around each turn.

    Roles, contents, tool calls and reasoning are compared.
    """
    return [_comparable_turn(turn) for turn in first] == [_comparable_turn(turn) for turn in second]


def _comparable_turn(turn: Message) -> tuple[Any, ...]:
    return turn["role"], turn["content"].strip(), turn.get("tool_calls"), reasoning_of(turn)


def reasoning_of(turn: Message) -> str:
    """Return the reasoning of a turn, or an empty string."""
    return (turn.get("reasoning_content") or "").strip()


def without_system(messages: Conversation) -> Conversation:
    """Return `messages` without a system turn at the start."""
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def insert_after_system(messages: Sequence[Message], inserted: Sequence[Message]) -> Conversation:
    """Insert turns at the start of `messages`, after a system turn if there is one."""
    rest = without_system(list(messages))
    return [*messages[: len(messages) - len(rest)], *inserted, *rest]


def conversation_of_labeled_row(row: Mapping[str, Any]) -> Conversation:
    """Return a labeled row as a conversation.

    A row of text becomes one assistant message. In other rows, the completion is appended to the
    prompt.
    """
    if "text" in row:
        return [{"role": "assistant", "content": row["text"]}]
    return [*row["prompt"], *row["completion"]]


def split_last_reply(messages: Conversation, notes: Notes) -> tuple[Conversation, Conversation]:
    """Return (prompt, last assistant turn); the turns after the last assistant turn are ignored.

    Raises:
        RowDropped: The conversation is not valid, or has no assistant turn.
    """
    _, last = _first_and_last_reply(messages, notes)
    check_role_order(messages[: last + 1])
    return checked_prompt(messages[:last]), checked_reply(messages[last : last + 1])


def split_before_first_reply(
    messages: Conversation, notes: Notes
) -> tuple[Conversation, Conversation]:
    """Return (prompt, turns from the first to the last assistant turn); later turns are ignored.

    Raises:
        RowDropped: The conversation is not valid, or has no assistant turn.
    """
    first, last = _first_and_last_reply(messages, notes)
    completion = messages[first : last + 1]
    if any(is_empty_turn(turn) for turn in completion):
        raise RowDropped("empty reply")
    check_role_order(messages[: last + 1])
    return checked_prompt(messages[:first]), completion


def check_some_reply_has_weight(completion: Conversation) -> None:
    """Raise RowDropped if all replies of a completion have weight 0."""
    replies = [turn for turn in completion if turn["role"] == "assistant"]
    if all(turn.get("weight", 1) == 0 for turn in replies):
        raise RowDropped(REPLY_OF_WEIGHT_0)


def _first_and_last_reply(messages: Conversation, notes: Notes) -> tuple[int, int]:
    """Return the indices of the first and the last assistant turn.

    Raises:
        RowDropped: There is no assistant turn.
    """
    replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise RowDropped("no assistant turn")
    if replies[-1] < len(messages) - 1:
        notes.add("turns after the last reply")
    return replies[0], replies[-1]


def split_pair_at_shared_prompt(
    chosen: Conversation, rejected: Conversation
) -> tuple[Conversation, ...]:
    """Return (prompt, chosen, rejected) of two conversations with a common prompt.

    The prompt is the longest common prefix of turns. In both conversations, only assistant and tool
    turns may follow it.

    Raises:
        RowDropped: The conversations are equal or have different prompts, or the prompt or a reply
            is not valid.
    """
    if same_turns(chosen, rejected):
        raise RowDropped("chosen equals rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)):
        if not same_turns(chosen[shared : shared + 1], rejected[shared : shared + 1]):
            break
        shared += 1
    rests = chosen[shared:], rejected[shared:]
    if any(turn["role"] in ("user", "system") for rest in rests for turn in rest) or not all(rests):
        raise RowDropped("prompts differ")
    prompt = checked_prompt(chosen[:shared])
    for rest in rests:
        check_role_order([*prompt, *rest])
    return prompt, checked_reply(rests[0]), checked_reply(rests[1])


def read_prompt(cells: Cells, notes: Notes) -> Conversation:
    """Return the validated prompt of a row, from its prompt, context and history cells.

    Args:
        cells: Cells of the row; the optional cells that are used are removed.
        notes: Descriptions of ignored parts, changed in place.

    Raises:
        RowDropped: The prompt or the history is not valid.
    """
    value, context = cells["prompt"], cells.get("context")
    if isinstance(value, str) and isinstance(context, str):
        cells.pop("context")
        if context.strip() and not _contains_passage(value, context.strip()):
            value = f"{value}\n\n{context}" if value.strip() else context
    messages = as_conversation(value, notes)
    earlier = _read_history(cells.pop("history", None), notes)
    return checked_prompt(insert_after_system(messages, earlier))


def _contains_passage(text: str, context: str) -> bool:
    """Return whether a text contains a context.

    A context of fewer than MIN_PASSAGE_WORDS words must match whole lines of the text, because a
    short context can occur in an instruction by chance, such as "12" in "multiply 12 by:".
    """
    start, end = (
        (r"^[ \t]*", r"[ \t]*$")
        if len(context.split()) < MIN_PASSAGE_WORDS
        else (r"(?<!\w)", r"(?!\w)")
    )
    pattern = start + re.escape(context) + end
    return re.search(pattern, text, re.MULTILINE) is not None


def _read_history(value: Any, notes: Notes) -> Conversation:
    """Convert a history column, a list of [question, answer] pairs or messages, to messages.

    Raises:
        RowDropped: The column is neither empty nor such a list.
    """
    value = decode_if_json(value)
    if value in (None, "", []):
        return []
    if not isinstance(value, list):
        raise RowDropped("history is not a list of turns")
    if not all(isinstance(pair, (list, tuple)) for pair in value):
        return as_conversation(value, notes)
    messages: Conversation = []
    for pair in value:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowDropped("history is not a list of turns")
        roles = zip(("user", "assistant"), pair, strict=True)
        messages += [{"role": role, "content": text} for role, text in roles]
    return messages


def _read_prompt_and_reply_cell(
    cells: Cells, field: str, prompt: Conversation, notes: Notes
) -> tuple[Conversation, Conversation]:
    """Return (prompt, reply) from the reply column `field`.

    The reasoning column of a completion is added to the last turn of the completion if this turn
    has no reasoning. A system message in the reply column is moved to the prompt.

    Raises:
        RowDropped: The reply is not valid, or its prompt or system message differs from the prompt.
    """
    value, cell = cells[field], cells.get("prompt")
    if isinstance(value, str) and isinstance(cell, str) and is_hh_dialogue(cell):
        value = value.removeprefix(cell)
        if is_hh_dialogue(value):
            return split_reply_from_prompt(prompt, parse_hh_dialogue(value), notes)
        if "\n\nHuman:" in value:
            raise RowDropped("reply contains a user or system turn")
        value = value.strip()
    prompt, reply = split_reply_from_prompt(prompt, value, notes)
    reasoning = cells.get("reasoning")
    if field == "completion" and isinstance(reasoning, str) and not reasoning_of(reply[-1]):
        cells.pop("reasoning")
        if reasoning.strip():
            last = dict(reply[-1])
            add_reasoning(last, reasoning, notes)
            reply = [*reply[:-1], last]
    return prompt, reply


def _begins_with_user_turn(value: Any) -> bool:
    """Return whether a cell is a list of messages that begins with a user turn.

    A system turn may precede the user turn.
    """
    if not isinstance(value, list):
        return False
    roles = [_role_of(turn) for turn in value[:2]]
    return next((role for role in roles if role != "system"), None) == "user"


def _role_of(turn: Any) -> str | None:
    """Return the canonical role of a message that is not converted yet; None if it has none."""
    if not isinstance(turn, Mapping):
        return None
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _without_final_replies(messages: Any) -> Any:
    """Return a list of messages without the assistant turns at its end."""
    messages = decode_if_json(messages)
    while isinstance(messages, list) and messages and _role_of(messages[-1]) == "assistant":
        messages = messages[:-1]
    return messages


def _split_pair_after_checking_prompt(
    cells: Cells, sides: list[Any], notes: Notes
) -> tuple[Conversation, ...]:
    """Return (prompt, chosen, rejected) of two conversations that begin with the row's prompt.

    Args:
        cells: Cells of the row.
        sides: The chosen and the rejected conversation.
        notes: Descriptions of ignored parts, changed in place.

    Raises:
        RowDropped: The prompts or system messages differ, or the conversations are not valid.
    """
    cell_prompt = read_prompt(cells, notes)
    prompt, chosen, rejected = split_pair_at_shared_prompt(
        *(read_messages(value, notes) for value in sides)
    )
    expected, turns = without_system(cell_prompt), without_system(prompt)
    if not same_turns(turns[: len(expected)], expected):
        raise RowDropped("prompts differ")
    if len(expected) < len(cell_prompt):
        if len(turns) < len(prompt) and not same_turns(prompt[:1], cell_prompt[:1]):
            raise RowDropped("system messages differ")
        prompt = [cell_prompt[0], *turns]
    return prompt, chosen, rejected


def read_prompt_and_reply(cells: Cells, notes: Notes) -> tuple[Conversation, Conversation]:
    """Return (prompt, reply) of a row with a messages cell, or with prompt and completion cells.

    Raises:
        RowDropped: The prompt or the reply is not valid.
    """
    if "messages" in cells:
        return split_last_reply(read_messages(cells.pop("messages"), notes), notes)
    return _read_prompt_and_reply_cell(cells, "completion", read_prompt(cells, notes), notes)


def read_prompt_and_pair(cells: Cells, notes: Notes) -> tuple[Conversation, ...]:
    """Return (prompt, chosen, rejected) from the cells of a row with a chosen and a rejected reply.

    If both replies are lists of messages that begin with a user turn, the prompt consists of the
    turns that both begin with; the turns of a prompt cell must be the first of these. Otherwise,
    the prompt comes from the prompt cell, or without this cell from the messages cell. Without both
    cells, the replies are conversations, and the prompt consists of the turns that both begin with.

    Raises:
        RowDropped: The replies are equal, the prompts differ, or the prompt or a reply is not
            valid.
    """
    sides = [cells["chosen"], cells["rejected"]]
    have_prompt = all(_begins_with_user_turn(value) for value in sides)
    if cells.get("prompt") is None and cells.get("messages") is not None and not have_prompt:
        cells["prompt"] = _without_final_replies(cells.pop("messages"))
    if cells.get("prompt") is None:
        if any(isinstance(value, str) and not is_hh_dialogue(value) for value in sides):
            raise RowDropped("plain text without a prompt column")
        return split_pair_at_shared_prompt(*(read_messages(value, notes) for value in sides))
    if have_prompt:
        prompt, chosen, rejected = _split_pair_after_checking_prompt(cells, sides, notes)
    else:
        cell_prompt = read_prompt(cells, notes)
        prompt, chosen = _read_prompt_and_reply_cell(cells, "chosen", cell_prompt, notes)
        other_prompt, rejected = _read_prompt_and_reply_cell(cells, "rejected", cell_prompt, notes)
        if not same_turns(prompt, other_prompt):
            raise RowDropped("system messages differ")
    if same_turns(chosen, rejected):
        raise RowDropped("chosen equals rejected")
    return prompt, chosen, rejected
