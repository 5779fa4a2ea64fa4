"""Encode validated rows as token ids, with the functions that sampling also uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.common.text import reason_counts_text
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.core import IGNORED
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import Piece, encode_pieces, render_or_encode_example
from rlhf.rollout.plain_text import encode_texts_and_loss_masks

Row = dict[str, Any]

EQUAL_TEXTS_REASON = "equal after max_length"
SAME_TOKENS_REASON = "replies that are rendered with the same tokens"
LONG_PROMPT_REASON = "the prompt fills max_length"
TRUNCATED = "truncated"
BLOCK_ROWS = 256
"""Maximum number of rows whose texts are tokenized in one call."""


@dataclass(frozen=True)
class Example:
    """A training example of a language model or of a reward model."""

    ids: Sequence[list[int]]
    """Token ids of each text. An example has one text, a chosen and a rejected text, or a text for
    each reply of a ranking."""
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
        self.truncated_and_dropped_counts: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}

    def __call__(self, rows: Sequence[Row], *, pairs: bool = False) -> list[Example]:
        """Encode rows. Rows that cannot be encoded are dropped and counted.

        Args:
            rows: Validated rows of a dataset.
            pairs: Whether each row has a chosen and a rejected reply.

        Raises:
            UserError: All rows were dropped, or the chat template cannot render a row.
        """
        examples = []
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            for row, (outcome, notes) in zip(block, self.encode(block, pairs), strict=True):
                if isinstance(outcome, Example):
                    examples.append(outcome)
                    self.count_outcome(None, notes, row)
                else:
                    self.count_outcome(str(outcome), notes, row)
        self.check_some_remain(examples)
        return examples

    def encode(
        self, rows: Sequence[Row], pairs: bool
    ) -> list[tuple[Example | RowDropped, frozenset[str]]]:
        """Encode rows; return an example or the reason why it is dropped, and notes, for each row.

        Raises:
            UserError: The chat template cannot render a row.
        """
        sides = ("chosen", "rejected") if pairs else ("completion",)
        rendered = [[self._render(row, row.get(side, ())) for side in sides] for row in rows]
        texts = [text for of_row in rendered for text in of_row]
        self._tokenize(texts)
        outcomes: list[tuple[Example | RowDropped, frozenset[str]]] = []
        for row, of_row in zip(rows, rendered, strict=True):
            try:
                outcomes.append(self._make_example(row, of_row))
            except RowDropped as reason:
                outcomes.append((reason, frozenset()))
            except UserError as error:
                raise UserError(f"{describe_row(row)}: {error}") from error
        return outcomes

    def count_outcome(
        self, drop_reason: str | None, notes: Iterable[str], row: Row, times: int = 1
    ) -> None:
        """Count an outcome of `encode`.

        Args:
            drop_reason: The reason why the row was dropped; None if it is an example.
            notes: Notes on the example.
            row: The row. The first row that is dropped for each reason is recorded.
            times: Number of rows with this outcome.
        """
        if drop_reason is None:
            self.truncated_and_dropped_counts += Counter(dict.fromkeys(notes, times))
        else:
            self.truncated_and_dropped_counts[f"dropped: {drop_reason}"] += times
            self.first_dropped.setdefault(drop_reason, describe_row(row))

    def check_some_remain(self, examples: Sequence[Example]) -> None:
        """Raise UserError if all rows were dropped."""
        if not examples:
            raise UserError(self._all_dropped_message())

    def truncated_and_dropped_text(self) -> str:
        """Return the counts of truncated and dropped rows as text, "" if there are none."""
        return reason_counts_text(self.truncated_and_dropped_counts)

    def _all_dropped_message(self) -> str:
        """Return the error message for rows that were all dropped."""
        first = next(iter(self.first_dropped.values()))
        dropped = self.truncated_and_dropped_text()
        if self.first_dropped.keys() <= {EQUAL_TEXTS_REASON, LONG_PROMPT_REASON}:
            return (
                f"no example fits max_length={self.max_length}: {dropped}; the first is {first}; "
                "raise max_length"
            )
        return f"all examples were dropped: {dropped}; the first is {first}"

    def _render(self, row: Row, completion: Sequence[Any]) -> _RenderedText:
        """Render a text of a row. Its error is stored; the first error of a row is raised later."""
        rendered = _RenderedText()
        try:
            if "text" in row:
                rendered.text = row["text"]
                return rendered
            result = render_or_encode_example(
                self.chat_format, prompt_with_tools(row), completion, notes=rendered.notes
            )
        except (RowDropped, UserError) as error:
            rendered.error = error
        else:
            if isinstance(result, tuple):
                rendered.encoded = result
            else:
                rendered.pieces = result
        return rendered

    def _tokenize(self, rendered: Sequence[_RenderedText]) -> None:
        """Set ``encoded`` of the rendered texts that have no error."""
        plain = [item for item in rendered if item.text is not None]
        texts = [item.text for item in plain if item.text is not None]
        found = encode_texts_and_loss_masks(self.chat_format.tokenizer, texts)
        for item, encoded in zip(plain, found, strict=True):
            item.encoded = encoded
        conversations = [item for item in rendered if item.pieces is not None]
        pieces = [item.pieces for item in conversations if item.pieces is not None]
        for item, encoded in zip(
            conversations, encode_pieces(self.chat_format, pieces), strict=True
        ):
            item.encoded = encoded

    def _make_example(
        self, row: Row, rendered: Sequence[_RenderedText]
    ) -> tuple[Example, frozenset[str]]:
        """Return the example of a row with one or two rendered texts, and notes on the example.

        Raises:
            RowDropped: The template cannot render the row, a truncated text has no token of the
                completion, or the two texts of a pair have the same tokens.
            UserError: The template cannot render the row's system message.
        """
        notes: set[str] = set()
        ids, labels = [], []
        for item in rendered:
            if item.error is not None:
                raise item.error
            of_text, is_action = self._truncate(item)
            notes |= set(item.notes)
            ids.append(of_text)
            labels.append(
                [
                    token if trained else IGNORED
                    for token, trained in zip(of_text, is_action, strict=True)
                ]
            )
        if len(ids) > 1 and ids[0] == ids[1]:
            raise RowDropped(EQUAL_TEXTS_REASON if TRUNCATED in notes else SAME_TOKENS_REASON)
        desirable = bool(row.get("label", True)) if len(ids) == 1 else True
        return Example(tuple(ids), tuple(labels), desirable=desirable), frozenset(notes)

    def _truncate(self, rendered: _RenderedText) -> tuple[list[int], list[bool]]:
        """Return the token ids and the loss mask of a text, truncated to max_length.

        A truncation is added to the notes of the text.

        Raises:
            RowDropped: The truncated text has no token of the completion.
        """
        assert rendered.encoded is not None
        ids, is_action = rendered.encoded
        if len(ids) > self.max_length:
            ids, is_action = ids[: self.max_length], is_action[: self.max_length]
            if not any(is_action):
                raise RowDropped(LONG_PROMPT_REASON)
            rendered.notes[TRUNCATED] += 1
        return ids, is_action


@dataclass
class _RenderedText:
    """A rendered text of a row, and its token ids when they are computed."""

    text: str | None = None
    """Plain text."""
    pieces: list[Piece] | None = None
    """Pieces of a rendered conversation."""
    encoded: tuple[list[int], list[bool]] | None = None
    """Token ids and loss mask."""
    error: RowDropped | UserError | None = None
    notes: Counter[str] = field(default_factory=Counter)


def describe_row(row: Row) -> str:
    """Return a description of a row: its source and the start of its prompt or text."""
    text = str(row["text"] if "text" in row else row["prompt"][-1]["content"])
    shown = text if len(text) <= 40 else text[:37] + "..."
    where = f"row of {row['source']}" if row.get("source") else "row"
    return f"the {where} with the prompt {shown!r}"
