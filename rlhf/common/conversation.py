"""Types of conversations and of functions that score them, and comparison of their texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf.common.guards import is_mapping, is_sequence
from rlhf.errors import UserError

Message = dict[str, Any]
"""One turn in the Hugging Face chat format, with at least the keys ``role`` and ``content``."""
Conversation = list[Message]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "train", "training", "loss")
READ_KEYS = frozenset(
    {
        "role",
        "from",
        "content",
        "value",
        "name",
        "tool_calls",
        "function_call",
        "tool_call_id",
        *REASONING_KEYS,
        *WEIGHT_KEYS,
        "answer",
        "tests",
    }
)
"""Keys that are read from the messages of a dataset."""
RESERVED_KEYS = READ_KEYS | {"tools"}
"""Keys of a message that have a meaning of their own, so that no column of a dataset can become the
key of this name. `tools` are attached to a message for the chat template."""
_MODEL_KEYS = RESERVED_KEYS - {"answer", "tests", *WEIGHT_KEYS}
Score = float | None
"""A score, or None if the conversation could not be scored."""
RewardFunction = Callable[[list[Conversation]], Sequence[Score]]
"""Function that returns a score for each conversation of a batch."""


def messages_for_models(messages: Iterable[Mapping[str, Any]]) -> Conversation:
    """Return messages without the keys that models do not read, such as a reference answer.

    Prompts are compared and counted by these messages, so that the columns that a reward reads do
    not change which prompts are equal.
    """
    return [
        {key: value for key, value in message.items() if key in _MODEL_KEYS} for message in messages
    ]


def check_conversations(conversations: Iterable[Any], what: str) -> None:
    """Check that the items of a list are conversations.

    Args:
        conversations: The list. A value that is read only once, such as a generator, is not read.
        what: What takes the list, for the message.

    Raises:
        UserError: An item is not a list of messages, as if a single conversation were given.
    """
    for item in conversations if is_sequence(conversations) else ():
        if not is_sequence(item) or not all(map(is_mapping, item)):
            raise UserError(
                f"{what}: expected a list of conversations, each a list of messages with role and "
                f"content, got a list of {type(item).__name__}"
            )


def up_to_last_reply(conversation: Sequence[Message]) -> Conversation:
    """Return the messages up to the last assistant message; all messages if there is none.

    A truncated episode ends with an observation, which is no reply.
    """
    replies = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    return list(conversation[: replies[-1] + 1 if replies else None])


def comparable_text(text: str) -> str:
    """Return a text without differences of case, white space and Unicode forms (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
