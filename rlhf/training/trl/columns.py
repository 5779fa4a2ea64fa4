"""Datasets and collators that pass the token ids of this toolkit to TRL's trainers.

TRL's DPO and KTO trainers always render and encode the text columns of a dataset. The text columns
therefore contain placeholders, and the collators in this module read additional columns with the
token ids of this toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf.reward_models.losses import IGNORED
from rlhf.training.examples import Example

Row = Mapping[str, Any]


def sft_trainer_dataset(examples: Sequence[Example]) -> Dataset:
    """Return the dataset for ``SFTTrainer``."""
    return Dataset.from_list(
        [{"input_ids": example.ids[0], "labels": example.labels[0]} for example in examples]
    )


def dpo_trainer_dataset(examples: Sequence[Example]) -> Dataset:
    """Return the dataset for ``DPOTrainer`` with ``PairCollator``."""
    return Dataset.from_list(
        [
            {
                "prompt": "?",
                "chosen": "a",
                "rejected": "b",
                "chosen_tokens": example.ids[0],
                "chosen_labels": example.labels[0],
                "rejected_tokens": example.ids[1],
                "rejected_labels": example.labels[1],
            }
            for example in examples
        ]
    )


def kto_trainer_dataset(examples: Sequence[Example]) -> Dataset:
    """Return the dataset for ``KTOTrainer`` with ``KTOCollator``."""
    return Dataset.from_list(
        [
            {
                "prompt": "?",
                "completion": "a",
                "completion_tokens": example.ids[0],
                "completion_labels": example.labels[0],
                "label": example.desirable,
            }
            for example in examples
        ]
    )


def reward_trainer_dataset(examples: Sequence[Example], *, margins: bool) -> Dataset:
    """Return the dataset for ``RewardTrainer``, with a margin column if ``margins`` is true."""
    return Dataset.from_list(
        [
            {"chosen_ids": example.ids[0], "rejected_ids": example.ids[1]}
            | ({"margin": example.labels[0]} if margins else {})
            for example in examples
        ]
    )


class PairCollator:
    """Collates pairs for ``DPOTrainer``. In a batch, all chosen rows precede all rejected rows.

    Args:
        pad_id: Id of the padding token.
        multiple: The width of a batch is padded to a multiple of this number.
    """

    def __init__(self, pad_id: int, multiple: int = 1) -> None:
        self.pad_id, self.multiple = pad_id, multiple

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        sides = ("chosen", "rejected")
        ids = [example[f"{side}_tokens"] for side in sides for example in examples]
        labels = [example[f"{side}_labels"] for side in sides for example in examples]
        batch = _padded_columns(ids, labels, self.pad_id, self.multiple)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class KTOCollator:
    """Collates labeled replies for ``KTOTrainer``.

    The KL estimate of KTO needs mismatched prompts and replies. Each prompt is combined with the
    reply of the previous example of the batch, and the first prompt with the last reply.

    Args:
        pad_id: Id of the padding token.
        max_length: Maximum number of tokens of a mismatched prompt and reply.
        multiple: The width of a batch is padded to a multiple of this number.
    """

    def __init__(self, pad_id: int, max_length: int, multiple: int = 1) -> None:
        self.pad_id, self.max_length, self.multiple = pad_id, max_length, multiple

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        ids = [example["completion_tokens"] for example in examples]
        labels = [example["completion_labels"] for example in examples]
        batch = _padded_columns(ids, labels, self.pad_id, self.multiple)
        if "KL_completion_ids" in examples[0]:
            lengths = [_prompt_length(row) for row in labels]

            def with_reply_of_previous_row(rows: list[list[int]]) -> list[list[int]]:
                """Join each prompt with the reply of the previous row, the first with the last."""
                joined = (
                    rows[i][: lengths[i]] + rows[i - 1][lengths[i - 1] :] for i in range(len(rows))
                )
                return [row[: self.max_length] for row in joined]

            columns = _padded_columns(
                with_reply_of_previous_row(ids),
                with_reply_of_previous_row(labels),
                self.pad_id,
                self.multiple,
            )
            batch |= {f"KL_{name}": column for name, column in columns.items()}
        for name in ("ref_logps", "ref_KL_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
        return batch


def _prompt_length(labels: Sequence[int]) -> int:
    """Return the number of tokens before the first trained token."""
    return next(t for t, label in enumerate(labels) if label != IGNORED)


def _padded_columns(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int, multiple: int
) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``completion_mask``, padded to [B, T].

    The completion mask is 1 for trained tokens. T is a multiple of ``multiple``.
    """
    width = max(map(len, ids))
    width += -width % multiple

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "completion_mask": (padded(labels, IGNORED) != IGNORED).long(),
    }
