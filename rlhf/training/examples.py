"""Encode validated rows as token ids, with the functions that sampling also uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.losses import IGNORED
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import encode_example
from rlhf.rollout.plain_text import encode_text_and_loss_mask

Row = dict[str, Any]

EQUAL_TEXTS_REASON = "equal after max_length"
SAME_TOKENS_REASON = "replies that are rendered with the same tokens"
LONG_PROMPT_REASON = "the prompt fills max_length"


@dataclass(frozen=True)
class Example:
    """A training example of a language model or of a reward model."""

    ids: Sequence[list[int]]
    """Token ids of each text. An example has one text, a chosen and a rejected text, or all ranked
    candidates."""
    labels: Any
    """For a language model, the token ids of each text, with IGNORED instead of the ids that are
    not trained on.

    For a reward model, a number or a list, as its kind defines.
    """
    desirable: bool = True
    """Binary label of a single reply, for KTO."""


class ExampleEncoder:
    """Encodes rows as examples, and counts truncated and dropped rows.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens of a text, including its prompt.
        stop_ids: Additional ids at which the model stops, see ``generation_stop_ids``.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, stop_ids: Sequence[int] = ()) -> None:
        self.max_length = max_length
        self.chat_format = ChatFormat(tokenizer, stop_ids=stop_ids)
        self.changed: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}

    def __call__(self, rows: Sequence[Row], *, pairs: bool = False) -> list[Example]:
        """Encode rows. Rows that cannot be encoded are dropped and counted.

        Args:
            rows: Validated rows of a dataset.
            pairs: Whether each row has a chosen and a rejected reply.

        Raises:
            UserError: All rows were dropped, or the chat template cannot render a row.
        """
        encode = self._encode_pair if pairs else self._encode_reply
        examples = []
        for row in rows:
            notes: Counter[str] = Counter()
            try:
                examples.append(encode(row, notes))
            except RowDropped as reason:
                self.changed[f"dropped: {reason}"] += 1
                self.first_dropped.setdefault(str(reason), describe_row(row))
            except UserError as error:
                raise UserError(f"{describe_row(row)}: {error}") from error
            else:
                self.changed += Counter(set(notes))
        if not examples:
            raise UserError(self._all_dropped_message(len(rows)))
        return examples

    def truncated_and_dropped_text(self) -> str:
        """Return the counts of truncated and dropped rows as text, "" if there are none."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.changed.items() if n)

    def _all_dropped_message(self, count: int) -> str:
        """Return the error message for ``count`` rows, all of which were dropped."""
        first = next(iter(self.first_dropped.values()))
        if any(reason in self.first_dropped for reason in (EQUAL_TEXTS_REASON, LONG_PROMPT_REASON)):
            limit = self.max_length
            return (
                f"no example fits max_length={limit}: {self.truncated_and_dropped_text()}; "
                f"the first is {first}; raise max_length"
            )
        dropped = self.truncated_and_dropped_text()
        return f"all {count:,} examples were dropped: {dropped}; the first is {first}"

    def _encode_reply(self, row: Row, notes: Counter[str]) -> Example:
        ids, labels = self._encode_conversation(row, row.get("completion", ()), notes)
        return Example((ids,), (labels,), desirable=bool(row.get("label", True)))

    def _encode_pair(self, row: Row, notes: Counter[str]) -> Example:
        chosen, rejected = (
            self._encode_conversation(row, row[side], notes) for side in ("chosen", "rejected")
        )
        if chosen[0] == rejected[0]:
            raise RowDropped(EQUAL_TEXTS_REASON if notes["truncated"] else SAME_TOKENS_REASON)
        return Example((chosen[0], rejected[0]), (chosen[1], rejected[1]))

    def _encode_conversation(
        self, row: Row, completion: Sequence[Any], notes: Counter[str]
    ) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of a conversation, truncated to max_length.

        Raises:
            RowDropped: The template cannot render the row, or the truncated text has no token of
                the completion.
        """
        if "text" in row:
            ids, is_action = encode_text_and_loss_mask(self.chat_format.tokenizer, row["text"])
        else:
            ids, is_action = encode_example(
                self.chat_format, prompt_with_tools(row), completion, notes=notes
            )
        if len(ids) > self.max_length:
            ids, is_action = ids[: self.max_length], is_action[: self.max_length]
            if not any(is_action):
                raise RowDropped(LONG_PROMPT_REASON)
            notes["truncated"] += 1
        return ids, [
            token if trained else IGNORED for token, trained in zip(ids, is_action, strict=True)
        ]


def describe_row(row: Row) -> str:
    """Return a description of a row: its source and the start of its prompt or text."""
    text = str(row["text"] if "text" in row else row["prompt"][-1]["content"])
    shown = text if len(text) <= 40 else text[:37] + "..."
    where = f"row of {row['source']}" if row.get("source") else "row"
    return f"the {where} with the prompt {shown!r}"
