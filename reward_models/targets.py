"""Find the reference answer of a conversation, for rewards that verify answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf.common.files import read_jsonl
from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Unscorable, last_value_of_key

Answer = str | int | float | list[str | int | float]


class ReferenceAnswerSource:
    """Source of the reference answers of conversations.

    An answer is a text or a number, or a list of alternative answers. If neither ``answer`` nor
    ``answers`` is given, the answer is the value of ``key`` in the last message that has this key.

    Args:
        answer: The answer to all conversations.
        answers: JSON Lines file (optionally ``.gz``) whose rows have ``prompt`` and the key that
            ``key`` names. The answer is in the row whose prompt equals the last user message, up to
            white space at the ends.
        key: Key of the answer in a row or in a message.

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
            raise UserError("set answer (one constant) or answers (a file), not both")
        self.answer, self.key = answer, key
        self.table = _read_answers_by_prompt(Path(answers), key) if answers else None

    def reference_answer(self, conversation: Conversation) -> str:
        """Return the reference answer of a conversation.

        Raises:
            Unscorable: There are several alternative answers, or `reference_answers` raises it.
        """
        answers = self.reference_answers(conversation)
        if len(answers) > 1:
            raise Unscorable("several reference answers instead of a single one")
        return answers[0]

    def reference_answers(self, conversation: Conversation) -> list[str]:
        """Return the alternative reference answers of a conversation.

        Raises:
            Unscorable: There is no answer, an answer is blank or nan, or an answer is neither a
                text nor a number.
        """
        answer: Any = self.answer
        if answer is None and self.table is not None:
            users = [m["content"] for m in conversation if m["role"] == "user"]
            answer = self.table.get(str(users[-1]).strip()) if users else None
        elif answer is None:
            answer = last_value_of_key(conversation, self.key)
        answers = answer if isinstance(answer, list | tuple) else [answer]
        if not answers or any(map(_is_missing, answers)):
            raise Unscorable("no reference answer")
        return [_answer_text(item) for item in answers]


def _is_missing(answer: Any) -> bool:
    """Return whether an answer is None, nan (a missing cell of pandas) or blank text."""
    is_nan = isinstance(answer, float) and math.isnan(answer)
    return answer is None or is_nan or (isinstance(answer, str) and not answer.strip())


def _answer_text(answer: Any) -> str:
    """Convert an answer to text; 42 and 42.0 become "42".

    Raises:
        Unscorable: The answer is neither a text nor a number.
    """
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 1e15:
        return str(int(answer))
    if isinstance(answer, str | int | float):
        return str(answer)
    raise Unscorable(f"a reference answer is a {type(answer).__name__}, not a text or a number")


def _read_answers_by_prompt(path: Path, key: str) -> dict[str, Any]:
    """Read prompt -> value of ``key`` from a JSON Lines file; see `ReferenceAnswerSource`."""
    if not path.is_file():
        raise FileNotFoundError(f"the file of reference answers {path} does not exist")
    table: dict[str, Any] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        if "prompt" not in row or key not in row:
            raise UserError(f"{path}:{number} must have the keys 'prompt' and {key!r}")
        prompt, answer = str(row["prompt"]).strip(), row[key]
        if table.setdefault(prompt, answer) != answer:
            raise UserError(
                f"{path}:{number} has a prompt that an earlier row answers differently; remove one "
                "of the two rows"
            )
    return table
