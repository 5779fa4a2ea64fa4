"""Our token ids in TRL's DPO and KTO trainers.

Both trainers render and encode the text columns of a data set themselves, and have no option to
leave that out. So the text columns hold a placeholder, and the collator, which is theirs to be
given, takes the ids that every other part of the toolkit trains on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.batch import pad_right

Row = Mapping[str, Any]

IGNORED = -100

PLACEHOLDERS = {
    "dpo": {"prompt": "?", "chosen": "a", "rejected": "b"},
    "kto": {"prompt": "?", "completion": "a"},
}
"""Text columns that TRL encodes and the collators below do not read."""


class PairCollator:
    """Batch of pairs as ``DPOTrainer`` takes it: chosen rows first, then the rejected ones.

    Args:
        pad_id: Of the tokenizer.
        multiple: Widths are padded to a multiple of it; None: as long as the longest row.
    """

    def __init__(self, pad_id: int, multiple: int | None = None) -> None:
        self.pad_id, self.multiple = pad_id, multiple or 1

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        sides = ("chosen", "rejected")
        ids = [example[f"{side}_tokens"] for side in sides for example in examples]
        labels = [example[f"{side}_labels"] for side in sides for example in examples]
        batch = _columns(ids, labels, self.pad_id, self.multiple)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class LabelCollator:
    """Batch of labeled replies as ``KTOTrainer`` takes it.

    Its estimate of the KL term needs mismatched pairs: each prompt with the reply of the example
    before it in the batch, the first with the last one's.

    Args:
        pad_id: Of the tokenizer.
        max_length: Tokens of a mismatched pair.
        multiple: Widths are padded to a multiple of it; None: as long as the longest row.
    """

    def __init__(self, pad_id: int, max_length: int, multiple: int | None = None) -> None:
        self.pad_id, self.max_length, self.multiple = pad_id, max_length, multiple or 1

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        ids = [example["completion_tokens"] for example in examples]
        labels = [example["completion_labels"] for example in examples]
        batch = _columns(ids, labels, self.pad_id, self.multiple)
        if "KL_completion_ids" in examples[0]:
            lengths = [_prompt_length(row) for row in labels]
            order = [len(ids) - 1, *range(len(ids) - 1)]
            mixed = [
                ids[i][: lengths[i]] + ids[j][lengths[j] :]
                for i, j in zip(range(len(ids)), order, strict=True)
            ]
            marks = [
                labels[i][: lengths[i]] + labels[j][lengths[j] :]
                for i, j in zip(range(len(ids)), order, strict=True)
            ]
            cut = slice(self.max_length)
            other = _columns(
                [row[cut] for row in mixed],
                [row[cut] for row in marks],
                self.pad_id,
                self.multiple,
            )
            batch |= {f"KL_{name}": column for name, column in other.items()}
        for name in ("ref_logps", "ref_KL_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
        return batch


def _prompt_length(labels: Sequence[int]) -> int:
    """Tokens before the first that is learned from."""
    return next(t for t, label in enumerate(labels) if label != IGNORED)


def _columns(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int, multiple: int
) -> dict[str, Tensor]:
    """[B, T] ids, attention mask, and mask of the tokens that are learned from."""
    width = max(map(len, ids))
    width += -width % multiple
    padded = [[*row, *[IGNORED] * (width - len(row))] for row in labels]
    masks = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
    tokens = [[*row, *[pad_id] * (width - len(row))] for row in ids]
    return {
        "input_ids": pad_right(tokens, pad_id, torch.long),
        "attention_mask": pad_right(masks, 0, torch.long),
        "completion_mask": (pad_right(padded, IGNORED, torch.long) != IGNORED).long(),
    }
