"""Encode rows as examples of a reward model, and collate examples.

Texts are encoded with the functions that scoring also uses.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.common.text import reason_counts_text
from rlhf.config.reward import RewardConfig
from rlhf.data.conversation import conversation_of_labeled_row
from rlhf.data.labels import check_labels_have_one_scale
from rlhf.data.messages import RowDropped
from rlhf.data.splits import prompt_key
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import ids_and_is_truncated, with_tools
from rlhf.reward_models.core import Conversation, Unscorable
from rlhf.reward_models.losses import IGNORED
from rlhf.rollout.batch import pad_right
from rlhf.training.examples import EQUAL_TEXTS_REASON, SAME_TOKENS_REASON, Example

Row = dict[str, Any]

BOOTSTRAP_SHARE = 1 - 1 / math.e
"""Probability that a head of an ensemble is trained on a row. It equals the expected fraction of
distinct rows in a large bootstrap sample."""


class KindToEncode(Protocol):
    """The part of `rlhf.training.reward_models.base.RewardKind` that the encoder uses."""

    config: RewardConfig

    @property
    def range_columns(self) -> tuple[str, ...]: ...

    def check_columns(self, rows: Sequence[Row]) -> None: ...

    def encode(self, encoder: RewardEncoder, row: Row) -> Example: ...


class RewardEncoder:
    """Encodes rows as examples of a kind of reward model, and counts truncated and dropped rows.

    Args:
        kind: The kind of reward model.
        tokenizer: Tokenizer of the model.
        append_eos: Whether EOS is appended to every text.
    """

    def __init__(self, kind: KindToEncode, tokenizer: Any, *, append_eos: bool) -> None:
        self.kind, self.tokenizer, self.append_eos = kind, tokenizer, append_eos
        self.config = kind.config
        self.truncated_and_dropped_counts: Counter[str] = Counter()
        self.generator = np.random.default_rng()
        self.training, self.bare_texts = False, False
        self.truncated = False
        """Whether a text of the current row was truncated."""
        self.encoded_rows: dict[bool, list[Row]] = {}
        """Whether the rows are for training -> the rows that were not dropped."""
        self.dropped: dict[bool, Counter[str]] = {}
        """Whether the rows are for training -> reason -> number of dropped rows."""

    def __call__(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Encode rows, in an order in which the examples of a batch have similar lengths.

        Rows that cannot be encoded are dropped and counted.

        Args:
            rows: Validated rows.
            training: Whether the rows are for training. If so, each head of an ensemble is trained
                on a different sample of the rows.

        Raises:
            UserError: All rows were dropped, no row has the columns that the kind needs, or people
                gave the labels with different ranges of answers.
        """
        self.training, examples = training, []
        self.encoded_rows[training], self.dropped[training] = [], Counter()
        self.generator = np.random.default_rng([self.config.seed, training])
        self.bare_texts = "text" in rows[0]
        self.kind.check_columns(rows)
        for row in rows:
            self.truncated = False
            try:
                examples.append(self.kind.encode(self, row))
                self.encoded_rows[training].append(row)
                self.truncated_and_dropped_counts["truncated"] += self.truncated
            except (RowDropped, Unscorable) as reason:
                self.truncated_and_dropped_counts[f"dropped: {reason}"] += 1
                self.dropped[training][str(reason)] += 1
        if not examples:
            raise UserError(
                f"all examples were dropped: {self.truncated_and_dropped_text()}; max_length is "
                f"{self.config.max_length}"
            )
        encoded = itertools.chain(*self.encoded_rows.values())
        check_labels_have_one_scale(encoded, "data", self.kind.range_columns)
        lengths = [max(map(len, example.ids)) for example in examples]
        if training:
            order = length_grouped_order(lengths, self.config.batch_size, self.generator)
        else:
            order = np.argsort(lengths, kind="stable")
        return [examples[i] for i in order]

    def truncated_and_dropped_text(self) -> str:
        """Return the counts of truncated and dropped rows as text, "" if there are none."""
        return reason_counts_text(self.truncated_and_dropped_counts)

    def encode_conversation(
        self, conversation: Conversation, tools: list[Any] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation, and set ``truncated`` if they are truncated.

        Truncation keeps BOS and the last tokens.
        """
        ids, truncated = ids_and_is_truncated(
            self.tokenizer,
            conversation,
            tools,
            append_eos=self.append_eos,
            max_length=self.config.max_length,
        )
        self.truncated |= truncated
        return ids

    def encode_pair(self, row: Row) -> list[list[int]]:
        """Return the token ids of the prompt with the chosen and with the rejected reply.

        Raises:
            RowDropped: The two texts have the same tokens.
        """
        chosen, rejected = (
            self.encode_conversation([*row["prompt"], *row[side]], row.get("tools"))
            for side in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise RowDropped(EQUAL_TEXTS_REASON if self.truncated else SAME_TOKENS_REASON)
        return [chosen, rejected]

    def encode_labeled(self, row: Row) -> list[int]:
        """Return the token ids of the text or conversation of a labeled row."""
        return self.encode_conversation(conversation_of_labeled_row(row), row.get("tools"))

    def bootstrap_labels_for_heads(self, label: float) -> list[float]:
        """Return a label for each of the M heads.

        The label is ``label``. In training with several heads, it is IGNORED for the heads that are
        not trained on the current row.
        """
        heads = self.config.num_heads
        if heads == 1 or not self.training:
            return [label] * heads
        sampled = self.generator.random(heads) < BOOTSTRAP_SHARE
        return np.where(sampled, label, IGNORED).tolist()


def labeled_messages(row: Row) -> list[dict[str, Any]]:
    """Return the messages of a labeled row, with the row's tools."""
    return with_tools(conversation_of_labeled_row(row), row.get("tools"))


def last_message_content(row: Row) -> str:
    """Return the content of the last message of a labeled row."""
    return conversation_of_labeled_row(row)[-1]["content"]


def independent_unit_key(row: Row) -> str:
    """Return the key of a row's independent unit: its prompt, or its text if it has no prompt.

    Confidence intervals treat rows with the same key as dependent.
    """
    return prompt_key(row) if row.get("prompt") else last_message_content(row)


def length_grouped_order(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """Order rows so that the texts of a batch have similar lengths, with batches in random order.

    Rows are shuffled and sorted by length within spans of 50 batches. Then the batches are
    shuffled. The complete batch with the longest text is the first batch, so that a run that does
    not fit in memory fails at its start. An incomplete batch is at the end.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Number of rows of a batch.
        generator: Source of random numbers.

    Returns:
        The row indices in their new order.
    """
    size = np.asarray(lengths)
    order = generator.permutation(len(size))
    span = 50 * batch_size
    spans = [order[i : i + span] for i in range(0, len(order), span)]
    sorted_spans = [rows[np.argsort(-size[rows], kind="stable")] for rows in spans]
    batches = [
        rows[i : i + batch_size] for rows in sorted_spans for i in range(0, len(rows), batch_size)
    ]
    full = [batch for batch in batches if len(batch) == batch_size]
    longest = max(range(len(full)), key=lambda i: size[full[i]].max(), default=None)
    shuffled = [full[i] for i in generator.permutation(len(full)) if i != longest]
    first = [] if longest is None else [full[longest]]
    rest = [batch for batch in batches if len(batch) < batch_size]
    return np.concatenate([*first, *shuffled, *rest])


def collate_texts(examples: Sequence[Example], *, pad_id: int) -> dict[str, Tensor]:
    """Collate examples. Texts are padded on the right with ``pad_id``, labels with IGNORED.

    Returns:
        ``input_ids`` and ``attention_mask`` [N, T] of the N texts of all examples, and ``labels``
        with one row per example.
    """
    texts = [text for example in examples for text in example.ids]
    ids = pad_right(texts, pad_id)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = [example.labels for example in examples]
    is_list = isinstance(labels[0], list)
    padded = pad_right(labels, IGNORED) if is_list else torch.tensor(labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": padded}
