"""Checked rows as the columns that TRL's trainers take; every row that changes is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from rlhf.data.messages import without_facts
from rlhf.errors import UserError
from rlhf.rollout.plain_text import encode_text
from rlhf.rollout.tokens import TurnFormat, encode_example

Row = dict[str, Any]


class Encoder:
    """Turns rows of one kind into a TRL data set.

    SFT rows and pairs leave here as token ids, made by the same functions that sampling uses. TRL
    encodes DPO and KTO rows itself, from messages or plain text.

    Args:
        tokenizer: of the model.
        max_length: tokens of one example.
    """

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.layout = TurnFormat(tokenizer)
        self.changed: Counter[str] = Counter()

    def __call__(self, kind: str, rows: Sequence[Row]) -> Dataset:
        """A TRL data set of ``rows``.

        Raises:
            UserError: nothing is left.
        """
        encode = getattr(self, f"_{kind}")
        made = [new for row in rows if (new := encode(row)) is not None]
        if not made:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.changed.items())
            raise UserError(f"no example fits max_length={self.max_length}: {reasons}; raise it")
        return Dataset.from_list(made)

    def _sft(self, row: Row) -> Row | None:
        if "text" in row:
            ids, is_action = encode_text(self.tokenizer, row["text"])
        else:
            ids, is_action = encode_example(self.layout, row["prompt"], row["completion"])
        if len(ids) > self.max_length:
            ids, is_action = ids[: self.max_length], is_action[: self.max_length]
            if not any(is_action):
                self.changed["dropped: the prompt fills max_length"] += 1
                return None
            self.changed["truncated"] += 1
        labels = [i if own else -100 for i, own in zip(ids, is_action, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _pair(self, row: Row) -> Row | None:
        """Both replies after their prompt, as ids; None where the prompt leaves no room."""
        made: Row = {}
        for side in ("chosen", "rejected"):
            new = self._sft({"prompt": row["prompt"], "completion": row[side]})
            if new is None:
                return None
            made |= {f"{side}_ids": new["input_ids"], f"{side}_labels": new["labels"]}
        return made

    def _dpo(self, row: Row) -> Row | None:
        return self._with_room(row, ("chosen", "rejected"))

    def _kto(self, row: Row) -> Row | None:
        new = self._with_room(row, ("completion",))
        return None if new is None else new | {"label": row["label"]}

    def _with_room(self, row: Row, replies: Sequence[str]) -> Row | None:
        """Messages, or plain text for a base model; None where the prompt leaves no room."""
        prompt = self.layout.opening(row["prompt"])
        if len(prompt) >= self.max_length:
            self.changed["dropped: the prompt fills max_length"] += 1
            return None
        longest = max(len(self.layout.reply(row[name][-1]["content"])) for name in replies)
        self.changed["truncated"] += len(prompt) + longest > self.max_length
        if self.layout.chat:
            # Answers that only rewards read have no place in TRL's columns, nor one type.
            return {name: without_facts(row[name]) for name in ("prompt", *replies)}
        text = self.layout.separator.join(message["content"] for message in row["prompt"])
        return {"prompt": text} | {name: row[name][-1]["content"] for name in replies}

    def summary(self) -> str:
        """What happened to rows, for the log; empty when nothing did."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.changed.items() if n)
