"""Checked rows as token ids, made by the functions that sampling uses; every change is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from rlhf.data.conversation import RowDropped
from rlhf.errors import UserError
from rlhf.rollout.chat_format import ChatFormat, encode_example, prompt_of
from rlhf.rollout.plain_text import encode_text
from rlhf.training.trl.columns import IGNORED, PLACEHOLDERS

Row = dict[str, Any]

EQUAL = "equal after max_length"
FILLED = "the prompt fills max_length"


class Encoder:
    """Turns rows of one kind into a data set of token ids and labels.

    Args:
        tokenizer: of the model.
        max_length: tokens of one example.
        stop_ids: further ids at which the model stops, see ``generation_stop_ids``.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, stop_ids: Sequence[int] = ()) -> None:
        self.max_length = max_length
        self.chat_format = ChatFormat(tokenizer, stop_ids=stop_ids)
        self.changed: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}

    def __call__(self, kind: str, rows: Sequence[Row]) -> Dataset:
        """Examples of ``rows``: "sft", "pair" (our engine), "dpo" or "kto" (TRL's).

        Raises:
            UserError: nothing is left, or the template has no place for a system message.
        """
        encode = getattr(self, f"_{kind}")
        made = []
        for row in rows:
            notes: Counter[str] = Counter()
            try:
                made.append(encode(row, notes))
            except RowDropped as reason:
                self.changed[f"dropped: {reason}"] += 1
                self.first_dropped.setdefault(str(reason), name_of(row))
            except UserError as error:
                raise UserError(f"{name_of(row)}: {error}") from error
            else:
                self.changed += Counter({what: 1 for what in notes})
        if not made:
            raise UserError(self._nothing_left(len(rows)))
        return Dataset.from_list(made)

    def summary(self) -> str:
        """What happened to rows, for the log; empty when nothing did."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.changed.items() if n)

    def _nothing_left(self, count: int) -> str:
        first = next(iter(self.first_dropped.values()))
        if any(reason in self.first_dropped for reason in (EQUAL, FILLED)):
            limit = self.max_length
            return f"no example fits max_length={limit}: {self.summary()}, first {first}; raise it"
        return f"no example is left of {count:,}: {self.summary()}, first {first}"

    def _sft(self, row: Row, notes: Counter[str]) -> Row:
        ids, labels = self._encode(row, row.get("completion", ()), notes)
        return {"input_ids": ids, "labels": labels}

    def _pair(self, row: Row, notes: Counter[str]) -> Row:
        made: Row = {}
        for side in ("chosen", "rejected"):
            ids, labels = self._encode(row, row[side], notes)
            made |= {f"{side}_ids": ids, f"{side}_labels": labels}
        if made["chosen_ids"] == made["rejected_ids"]:
            raise RowDropped(EQUAL)
        return made

    def _dpo(self, row: Row, notes: Counter[str]) -> Row:
        made = self._pair(row, notes)
        tokens = {f"{side}_tokens": made.pop(f"{side}_ids") for side in ("chosen", "rejected")}
        return PLACEHOLDERS["dpo"] | made | tokens

    def _kto(self, row: Row, notes: Counter[str]) -> Row:
        ids, labels = self._encode(row, row["completion"], notes)
        made = {"completion_tokens": ids, "completion_labels": labels, "label": row["label"]}
        return PLACEHOLDERS["kto"] | made

    def _encode(
        self, row: Row, completion: Sequence[Any], notes: Counter[str]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels, cut to max_length.

        Raises:
            RowDropped: the template refuses the row, or nothing is left to learn from.
        """
        if "text" in row:
            ids, is_action = encode_text(self.chat_format.tokenizer, row["text"])
        else:
            ids, is_action = encode_example(
                self.chat_format, prompt_of(row), completion, notes=notes
            )
        if len(ids) > self.max_length:
            ids, is_action = ids[: self.max_length], is_action[: self.max_length]
            if not any(is_action):
                raise RowDropped(FILLED)
            notes["truncated"] += 1
        return ids, [i if own else IGNORED for i, own in zip(ids, is_action, strict=True)]


def name_of(row: Row) -> str:
    """A row by its source and the beginning of its text, or of its last prompt message."""
    text = str(row["text"] if "text" in row else row["prompt"][-1]["content"])
    shown = text if len(text) <= 40 else text[:37] + "..."
    where = f"row of {row['source']}" if row.get("source") else "row"
    return f"the {where} with the prompt {shown!r}"
