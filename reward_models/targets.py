"""Find the right answer to a conversation, for verifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.common.files import read_jsonl
from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Unscorable, fact

Answer = str | int | float | list[str | int | float]


class Target:
    """The right answer: a constant, a fact of the conversation, or a row of a file.

    An answer is text or a number; a list contains alternatives.

    Args:
        answer: The same answer for all conversations.
        answers: JSONL file (``.gz`` allowed) with a ``prompt`` and an answer per row; the row is
            selected by the last user message. Without it, the fact ``key`` is used.
        key: Key of the answer in a row or a conversation.

    Raises:
        UserError: Both ``answer`` and ``answers`` are given, a row lacks a key, or two rows have
            the same prompt and different answers.
        FileNotFoundError: The file does not exist.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        answers: str | Path | None = None,
        *,
        key: str = "answer",
    ):
        if answer is not None and answers is not None:
            raise UserError("give answer (one constant) or answers (a file), not both")
        self.answer, self.key = answer, key
        self.table = _read_answers(Path(answers), key) if answers else None

    def of(self, conversation: Conversation) -> str:
        """Return the right answer; raise :class:`Unscorable` if there is none or a list."""
        answers = self.any_of(conversation)
        if len(answers) > 1:
            raise Unscorable("a list of reference answers instead of a single one")
        return answers[0]

    def any_of(self, conversation: Conversation) -> list[str]:
        """Return the alternative right answers; raise :class:`Unscorable` for none."""
        answer: Any = self.answer
        if answer is None and self.table is not None:
            users = [m["content"] for m in conversation if m["role"] == "user"]
            answer = self.table.get(str(users[-1]).strip()) if users else None
        elif answer is None:
            answer = fact(conversation, self.key)
        if answer is None or answer == []:
            raise Unscorable("no reference answer")
        return [_text(item) for item in (answer if isinstance(answer, list | tuple) else [answer])]


def _text(answer: Any) -> str:
    """Return the text of an answer; 42 and 42.0 are both "42"."""
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 1e15:
        return str(int(answer))
    if isinstance(answer, str | int | float):
        return str(answer)
    raise Unscorable(f"a reference answer that is a {type(answer).__name__}")


def _read_answers(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of answers at {path}")
    table: dict[str, Any] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        if "prompt" not in row or key not in row:
            raise UserError(f"{path}:{number} needs keys 'prompt' and {key!r}")
        prompt, answer = str(row["prompt"]).strip(), row[key]
        if table.setdefault(prompt, answer) != answer:
            raise UserError(f"{path}:{number} gives a second answer to the same prompt")
    return table
