"""Validate conversations, and split them into a prompt and a reply.

Every row is validated by `check_turns`, whatever the format of the data set. A row that cannot be
used raises `RowDropped`; the loader counts the rows by reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.conversation import Conversation, Message
from rlhf.data.messages import Notes, RowDropped, as_conversation


def check_turns(messages: Sequence[Message]) -> None:
    """Check that the roles have the order that chat templates require.

    - A system turn is allowed only at the start.
    - The first other turn is a user turn.
    - User and assistant turns alternate.
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
    """Return whether a turn has neither text nor tool calls and is not the result of a tool."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def checked_prompt(messages: Conversation) -> Conversation:
    """Return a validated prompt, without an empty assistant turn at its end.

    Raises:
        RowDropped: The prompt is empty, has an empty turn, does not end with a user or tool turn,
            or fails `check_turns`.
    """
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # the empty "\n\nAssistant:" at the end of a dialogue prompt
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise RowDropped("empty prompt")
    if any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty turn in the prompt")
    check_turns(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowDropped("prompt ends with an assistant turn")
    return messages


def checked_reply(messages: Conversation) -> Conversation:
    """Return a validated reply, which begins and ends with an assistant turn.

    Raises:
        RowDropped: The reply is empty, has an empty turn, contains a user or system turn, does not
            begin and end with an assistant turn, or fails `check_turns`.
    """
    if not messages or any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty reply")
    if any(turn["role"] not in ("assistant", "tool") for turn in messages):
        raise RowDropped("reply contains a user or system turn")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowDropped("reply does not begin and end with an assistant turn")
    check_turns([{"role": "user", "content": ""}, *messages])
    return messages


def split_reply(
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
    rest, bare = without_system(messages), without_system(prompt)
    system = messages[: len(messages) - len(rest)]
    if rest and rest[0]["role"] != "assistant":
        if not same_turns(rest[: len(bare)], bare):
            raise RowDropped("prompts differ")
        rest = rest[len(bare) :]
    if system and len(bare) < len(prompt) and not same_turns(system, prompt[:1]):
        raise RowDropped("system messages differ")
    if system and len(bare) == len(prompt):
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


def insert_after_system(messages: Sequence[Message], more: Sequence[Message]) -> Conversation:
    """Return `messages` with `more` inserted at the start, after a system turn if there is one."""
    rest = without_system(list(messages))
    return [*messages[: len(messages) - len(rest)], *more, *rest]


def labeled_conversation(row: Mapping[str, Any]) -> Conversation:
    """Return a labeled row as a conversation.

    A row of text becomes one assistant message; otherwise prompt and completion are joined.
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
    check_turns(messages[: last + 1])
    return checked_prompt(messages[:last]), checked_reply(messages[last : last + 1])


def split_first_reply(messages: Conversation, notes: Notes) -> tuple[Conversation, Conversation]:
    """Return (prompt, turns from the first to the last assistant turn); later turns are ignored.

    Raises:
        RowDropped: The conversation is not valid, has no assistant turn, or all replies have
            weight 0.
    """
    first, last = _first_and_last_reply(messages, notes)
    completion = messages[first : last + 1]
    if any(is_empty_turn(turn) for turn in completion):
        raise RowDropped("empty reply")
    check_turns(messages[: last + 1])
    check_weights(completion)
    return checked_prompt(messages[:first]), completion


def check_weights(completion: Conversation) -> None:
    """Raise RowDropped if all replies of a completion have weight 0."""
    replies = [turn for turn in completion if turn["role"] == "assistant"]
    if all(turn.get("weight", 1) == 0 for turn in replies):
        raise RowDropped("every reply has weight 0")


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


def split_pair(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, ...]:
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
        check_turns([*prompt, *rest])
    return prompt, checked_reply(rests[0]), checked_reply(rests[1])
