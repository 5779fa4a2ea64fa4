"""Where a verifier finds the right answer for a conversation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Unscorable, fact

Answer = str | int | float | list[str | int | float]


class Target:
    """The right answer: one constant, a fact that travels on the messages, or a file of answers.

    ``answers`` is a JSONL file (``.gz`` allowed) with one ``prompt`` and one ``answer`` per row
    (other names: ``prompt_key``, ``key``); rows are found by the last user message. Without it, the
    fact ``key`` on the conversation is used. An answer is text or a number; a list of them means
    that any one is right.

    Raises:
        UserError: both ``answer`` and ``answers``, a row without the two keys, or one prompt with
            two different answers.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        answers: str | Path | None = None,
        *,
        key: str = "answer",
        prompt_key: str = "prompt",
    ):
        if answer is not None and answers is not None:
            raise UserError("give answer (one constant) or answers (a file), not both")
        self.answer, self.key = answer, key
        self.table = _read_answers(Path(answers), prompt_key, key) if answers else None

    def of(self, conversation: Conversation) -> str:
        """The one right answer; :class:`Unscorable` if it is not known, or one of several."""
        found = self.any_of(conversation)
        if len(found) > 1:
            raise Unscorable("a list of reference answers where one is due")
        return found[0]

    def any_of(self, conversation: Conversation) -> list[str]:
        """The right answers, of which one is enough; :class:`Unscorable` if none is known."""
        found = self.answer
        if found is None:
            found = (
                fact(conversation, self.key) if self.table is None else self._lookup(conversation)
            )
        if found is None or found == []:
            raise Unscorable("no reference answer")
        return [_text(item) for item in (found if isinstance(found, list | tuple) else [found])]

    def _lookup(self, conversation: Conversation) -> Any:
        assert self.table is not None
        users = [m["content"] for m in conversation if m["role"] == "user"]
        return self.table.get(str(users[-1]).strip()) if users else None


def _text(answer: Any) -> str:
    """A number as JSON and YAML mean it: 42 is "42", and so is 42.0."""
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 1e15:
        return str(int(answer))
    if isinstance(answer, str | int | float):
        return str(answer)
    raise Unscorable(f"a reference answer that is a {type(answer).__name__}")


def _read_answers(path: Path, prompt_key: str, answer_key: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of answers at {path}")
    table: dict[str, Any] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if prompt_key not in row or answer_key not in row:
                raise UserError(f"{path}:{number} needs keys {prompt_key!r} and {answer_key!r}")
            prompt, answer = str(row[prompt_key]).strip(), row[answer_key]
            if table.setdefault(prompt, answer) != answer:
                raise UserError(f"{path}:{number} gives a second answer to the same prompt")
    return table
