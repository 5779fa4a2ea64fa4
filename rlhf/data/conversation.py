"""Validate conversations, and split them into a prompt and a reply.

Every row is validated with `check_turns`, in every layout. A row that cannot be used raises
`RowDropped`; the loader counts the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.conversation import Conversation, Message
from rlhf.data.messages import Notes, RowDropped, as_conversation


def check_turns(messages: Sequence[Message]) -> None:
    """Check that the roles have the order that chat templates require.

    A system turn is allowed only at the start, the first other turn has the role user, user and
    assistant alternate, and tool turns follow an assistant or a tool turn.

    Raises:
        RowDropped: The order is violated.
    """
    previous = None
    for index, turn in enumerate(messages):
        role = turn["role"]
        if role == "system":
            if index:
                raise RowDropped("system message after the start")
            continue
        if previous is None and role != "user":
            raise RowDropped("first turn is not the user's")
        if role == previous and role != "tool":
            raise RowDropped("repeated role")
        if role == "tool" and previous == "user":
            raise RowDropped("tool result without a call")
        previous = role


def is_empty_turn(turn: Message) -> bool:
    """Return whether a turn has neither text nor tool calls and is not the result of a tool."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool")


def checked_prompt(messages: Conversation) -> Conversation:
    """Return `messages` if they are a valid prompt, else raise RowDropped."""
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # the empty "\n\nAssistant:" at the end of a dialogue prompt
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise RowDropped("empty prompt")
    if any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty turn in the prompt")
    check_turns(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowDropped("prompt ends with the assistant")
    return messages


def checked_reply(messages: Conversation) -> Conversation:
    """Return `messages` if they are a valid reply, else raise RowDropped."""
    if not messages or any(is_empty_turn(turn) for turn in messages):
        raise RowDropped("empty reply")
    if any(turn["role"] not in ("assistant", "tool") for turn in messages):
        raise RowDropped("reply holds another speaker's turn")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowDropped("reply does not begin and end with the assistant")
    check_turns([{"role": "user", "content": ""}, *messages])
    return messages


def split_reply(
    prompt: Conversation, value: Any, notes: Notes
) -> tuple[Conversation, Conversation]:
    """Return (prompt, reply) from a reply cell: text, messages, or prompt and reply together.

    A system message at the start of the cell becomes part of the prompt.

    Raises:
        RowDropped: The cell begins with another prompt or another system message, or its reply is
            not valid.
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
    """Return whether two sequences of turns are equal up to white space around each turn."""
    return [_comparable_turn(turn) for turn in first] == [_comparable_turn(turn) for turn in second]


def _comparable_turn(turn: Message) -> tuple[Any, ...]:
    return turn["role"], turn["content"].strip(), turn.get("tool_calls"), reasoning_of(turn)


def reasoning_of(turn: Message) -> str:
    """Return the reasoning of a turn, or an empty text."""
    return (turn.get("reasoning_content") or "").strip()


def without_system(messages: Conversation) -> Conversation:
    """Return `messages` without a leading system turn."""
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def insert_after_system(messages: Sequence[Message], more: Sequence[Message]) -> Conversation:
    """Return `messages` with `more` inserted after a leading system turn."""
    rest = without_system(list(messages))
    return [*messages[: len(messages) - len(rest)], *more, *rest]


def labeled_conversation(row: Mapping[str, Any]) -> Conversation:
    """Return a labeled row as a conversation: its text as one message, or prompt and reply."""
    if "text" in row:
        return [{"role": "assistant", "content": row["text"]}]
    return [*row["prompt"], *row["completion"]]


def split_last_reply(messages: Conversation, notes: Notes) -> tuple[Conversation, Conversation]:
    """Return (prompt, last assistant turn); the turns after it are ignored."""
    _, last = _first_and_last_reply(messages, notes)
    check_turns(messages[: last + 1])
    return checked_prompt(messages[:last]), checked_reply(messages[last : last + 1])


def split_first_reply(messages: Conversation, notes: Notes) -> tuple[Conversation, Conversation]:
    """Return (prompt, turns from the first to the last assistant turn); later turns are ignored.

    Raises:
        RowDropped: The conversation is not valid, or all replies have weight 0.
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
    """Return the indices of the first and the last assistant turn."""
    replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise RowDropped("no assistant turn")
    if replies[-1] < len(messages) - 1:
        notes.add("turns after the last reply")
    return replies[0], replies[-1]


def split_pair(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, ...]:
    """Return (prompt, chosen, rejected) of two conversations with a common prompt.

    The prompt is the longest common prefix; assistant turns must follow it in both conversations.
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
