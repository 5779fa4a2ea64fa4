"""Encode validated rows as token ids, with the same functions as in sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.losses import IGNORED
from rlhf.rollout.chat_format import ChatFormat, encode_example, prompt_of
from rlhf.rollout.plain_text import encode_text

Row = dict[str, Any]

EQUAL_TEXTS_REASON = "equal after max_length"
SAME_TOKENS_REASON = "replies that are rendered with the same tokens"
LONG_PROMPT_REASON = "the prompt fills max_length"


@dataclass(frozen=True)
class Example:
    """One training example of a language model or of a reward model."""

    ids: Sequence[list[int]]
    """Token ids of each text: a single text, a chosen and a rejected one, or all candidates."""
    labels: Any
    """For a language model, the ids of each text, with IGNORED for tokens that are not trained on.

    For a reward model, the labels of its kind: a number or a list.
    """
    desirable: bool = True
    """Label of a single reply, for KTO."""


class Encoder:
    """Encodes rows as examples; counts truncated and dropped rows.

    Args:
        max_length: Maximum number of tokens of one row.
        stop_ids: Further ids at which the model stops, see ``generation_stop_ids``.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, stop_ids: Sequence[int] = ()) -> None:
        self.max_length = max_length
        self.chat_format = ChatFormat(tokenizer, stop_ids=stop_ids)
        self.changed: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}

    def __call__(self, rows: Sequence[Row], *, pairs: bool = False) -> list[Example]:
        """Encode ``rows``; with ``pairs``, each row has a chosen and a rejected reply.

        Raises:
            UserError: No example is left, or the template does not support a system message.
        """
        encode = self._pair if pairs else self._reply
        examples = []
        for row in rows:
            notes: Counter[str] = Counter()
            try:
                examples.append(encode(row, notes))
            except RowDropped as reason:
                self.changed[f"dropped: {reason}"] += 1
                self.first_dropped.setdefault(str(reason), name_of(row))
            except UserError as error:
                raise UserError(f"{name_of(row)}: {error}") from error
            else:
                self.changed += Counter(set(notes))
        if not examples:
            raise UserError(self._nothing_left(len(rows)))
        return examples

    def summary(self) -> str:
        """Return the counts of truncated and dropped rows as text; empty if there are none."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.changed.items() if n)

    def _nothing_left(self, count: int) -> str:
        first = next(iter(self.first_dropped.values()))
        if any(reason in self.first_dropped for reason in (EQUAL_TEXTS_REASON, LONG_PROMPT_REASON)):
            limit = self.max_length
            return f"no example fits max_length={limit}: {self.summary()}, first {first}; raise it"
        return f"no example is left of {count:,}: {self.summary()}, first {first}"

    def _reply(self, row: Row, notes: Counter[str]) -> Example:
        ids, labels = self._encode(row, row.get("completion", ()), notes)
        return Example((ids,), (labels,), desirable=bool(row.get("label", True)))

    def _pair(self, row: Row, notes: Counter[str]) -> Example:
        chosen, rejected = (self._encode(row, row[side], notes) for side in ("chosen", "rejected"))
        if chosen[0] == rejected[0]:
            raise RowDropped(EQUAL_TEXTS_REASON if notes["truncated"] else SAME_TOKENS_REASON)
        return Example((chosen[0], rejected[0]), (chosen[1], rejected[1]))

    def _encode(
        self, row: Row, completion: Sequence[Any], notes: Counter[str]
    ) -> tuple[list[int], list[int]]:
        """Encode one conversation; return its ids and labels, truncated to max_length.

        Raises:
            RowDropped: The template rejects the row, or no trained token is left.
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
                raise RowDropped(LONG_PROMPT_REASON)
            notes["truncated"] += 1
        return ids, [
            token if trained else IGNORED for token, trained in zip(ids, is_action, strict=True)
        ]


def name_of(row: Row) -> str:
    """Describe a row by its source and the start of its text or of its last prompt message."""
    text = str(row["text"] if "text" in row else row["prompt"][-1]["content"])
    shown = text if len(text) <= 40 else text[:37] + "..."
    where = f"row of {row['source']}" if row.get("source") else "row"
    return f"the {where} with the prompt {shown!r}"
