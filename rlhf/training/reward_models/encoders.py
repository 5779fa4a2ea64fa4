"""From checked rows to what a reward model learns from: token ids, and labels fit for its loss.

Texts are encoded by the functions that scoring uses. An example holds ``texts``, a list of token
lists, and ``labels``; the collator pads all texts of a batch to one width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf.config.reward import RewardConfig
from rlhf.data.conversation import RowDropped, labelled_conversation
from rlhf.errors import UserError
from rlhf.reward_models import encoding
from rlhf.reward_models.chat_template import with_tools
from rlhf.reward_models.core import Conversation, Unscorable
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.pairwise import encode_pair
from rlhf.reward_models.process import encode_steps
from rlhf.rollout.batch import pad_right
from rlhf.rollout.chat_format import prompt_of
from rlhf.training.examples import EQUAL
from rlhf.training.stages import Row

# Share of the rows that a bootstrap sample holds: what each head of an ensemble learns from.
DRAWN = 1 - 1 / math.e

NO_MARGIN = "no margin"
"""Why a pair is dropped where margins are asked for."""


class RewardEncoder:
    """Rows of one kind -> a data set of examples; every row that changes is counted.

    Args:
        config: of the run.
        tokenizer: of the model.
        make: the function of the kind, (encoder, row) -> example.
        append_eos: whether every text ends with EOS.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: Any,
        make: Callable[[RewardEncoder, Row], Row],
        *,
        append_eos: bool,
    ) -> None:
        self.config, self.tokenizer, self.make = config, tokenizer, make
        self.append_eos = append_eos
        self.changed: Counter[str] = Counter()
        self.generator = np.random.default_rng()
        self.training, self.bare_texts = False, False
        self.truncated = False
        """Whether a text of the example in the making was cut."""
        # Rows that became examples, and why others did not, by whether for training.
        self.kept: dict[bool, list[Row]] = {}
        self.dropped: dict[bool, Counter[str]] = {}

    def __call__(self, rows: Sequence[Row], training: bool) -> list[Row]:
        """Examples of ``rows``, neighbours alike in length; only training rows are drawn for heads.

        Raises:
            UserError: nothing is left.
        """
        self.training, made = training, []
        self.kept[training], self.dropped[training] = [], Counter()
        self.generator = np.random.default_rng([self.config.seed, training])
        self.bare_texts = "text" in rows[0]
        for row in rows:
            self.truncated = False
            try:
                made.append(self.make(self, row))
                self.kept[training].append(row)
                self.changed["truncated"] += self.truncated
            except (RowDropped, Unscorable) as reason:
                self.changed[f"dropped: {reason}"] += 1
                self.dropped[training][str(reason)] += 1
        if not made and list(self.dropped[training]) == [NO_MARGIN]:
            asked = "margins is true" if self.config.margins else "kind: scaled"
            raise UserError(
                f"{asked}, but the pairs have no margin column, and no scores of both sides"
            )
        if not made:
            raise UserError(
                f"no example is left: {self.summary()}; max_length is {self.config.max_length}"
            )
        lengths = [max(map(len, example["texts"])) for example in made]
        if training:
            order = length_grouped(lengths, self.config.batch_size, self.generator)
        else:
            order = np.argsort(lengths, kind="stable")
        return [made[i] for i in order]

    def summary(self) -> str:
        """What happened to rows, for the log; empty when nothing did."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.changed.items() if n)

    def text(self, conversation: Conversation) -> list[int]:
        """Ids as the reward model will see them when it scores; too long ones lose their start."""
        whole = encoding.full_ids(self.tokenizer, conversation, append_eos=self.append_eos)
        self.truncated |= len(whole) > self.config.max_length
        return encoding.truncate_left(whole, self.config.max_length, tokenizer=self.tokenizer)

    def drawn(self, value: float) -> list[float]:
        """``value`` for every head that learns from this row, IGNORED for the others. [M]"""
        heads = self.config.num_heads
        if heads == 1 or not self.training:
            return [value] * heads
        return np.where(self.generator.random(heads) < DRAWN, value, IGNORED).tolist()


def length_grouped(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """An order of rows in which batches are alike in length and follow each other at random.

    Rows are shuffled, sorted by length inside spans of 50 batches, and the batches shuffled; the
    longest batch comes first, so that a run that will not fit in memory fails at once.
    """
    size = np.asarray(lengths)
    order = generator.permutation(len(size))
    span = 50 * batch_size
    spans = [order[i : i + span] for i in range(0, len(order), span)]
    batches = [
        part[i : i + batch_size]
        for part in (span_rows[np.argsort(-size[span_rows], kind="stable")] for span_rows in spans)
        for i in range(0, len(part), batch_size)
    ]
    full = [batch for batch in batches if len(batch) == batch_size]
    longest = max(range(len(full)), key=lambda i: size[full[i]].max(), default=None)
    shuffled = [full[i] for i in generator.permutation(len(full)) if i != longest]
    first = [] if longest is None else [full[longest]]
    rest = [batch for batch in batches if len(batch) < batch_size]
    return np.concatenate([*first, *shuffled, *rest])


class Collator:
    """Pads the texts of a batch to the right; labels of T columns are padded with IGNORED."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [text for example in examples for text in example["texts"]]
        ids = pad_right(texts, self.pad_id)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        labels = [example["labels"] for example in examples]
        listed = isinstance(labels[0], list)
        cells = pad_right(labels, IGNORED) if listed else torch.tensor(labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": cells}


def pair(encoder: RewardEncoder, row: Row) -> Row:
    """Two texts; the margin for each head."""
    if encoder.config.margins or encoder.config.kind == "scaled":
        if "margin" not in row:
            raise RowDropped(NO_MARGIN)
        margin = float(row["margin"])
    else:
        margin = 0.0
    return {"texts": _both(encoder, row), "labels": encoder.drawn(margin)}


def cost_pair(encoder: RewardEncoder, row: Row) -> Row:
    """Two texts, the safer one first; whether each is unsafe."""
    flags = [_flag(row[name], name) for name in ("chosen_unsafe", "rejected_unsafe")]
    return {"texts": _both(encoder, row), "labels": flags}


def sized_pair(encoder: RewardEncoder, row: Row) -> Row:
    """Two texts; the characters of each reply, in hundreds."""
    sizes = [sum(len(m["content"]) for m in row[side]) / 100 for side in ("chosen", "rejected")]
    return {"texts": _both(encoder, row), "labels": sizes}


def joined_pair(encoder: RewardEncoder, row: Row) -> Row:
    """Both replies in one text, in an order drawn at random; whether the first is better."""
    first_is_better = bool(encoder.generator.random() < 0.5)
    order = ("chosen", "rejected") if first_is_better else ("rejected", "chosen")
    first, second = ("\n\n".join(m["content"] for m in row[side]) for side in order)
    ids, other = (
        encode_pair(
            encoder.tokenizer, prompt_of(row), one, two, max_length=encoder.config.max_length
        )
        for one, two in ((first, second), (second, first))
    )
    if ids == other:
        raise RowDropped(EQUAL)
    return {"texts": [ids], "labels": [float(first_is_better)]}


def candidates(encoder: RewardEncoder, row: Row) -> Row:
    """The replies, best first; how many there are."""
    replies = list(row["replies"])
    if "best" in row:
        best = row["best"]
        if not isinstance(best, int) or not 0 <= best < len(replies):
            raise RowDropped("best is not the index of a reply")
        replies.insert(0, replies.pop(best))
    texts = [encoder.text([*prompt_of(row), *reply]) for reply in replies]
    if len(set(map(tuple, texts))) < len(texts):
        raise RowDropped(EQUAL)
    return {"texts": texts, "labels": len(texts)}


def two_classes(encoder: RewardEncoder, row: Row) -> Row:
    """A text; its label for each head."""
    label = _class_number(row["label"], 2)
    return {
        "texts": [encoder.text(rated_conversation(row))],
        "labels": encoder.drawn(float(label)),
    }


def many_classes(encoder: RewardEncoder, row: Row) -> Row:
    """A text; the number of its class."""
    label = _class_number(row["label"], len(encoder.config.labels))
    return {"texts": [encoder.text(rated_conversation(row))], "labels": label}


def attributes(encoder: RewardEncoder, row: Row) -> Row:
    """A text; its rating in every column, IGNORED where there is none."""
    names = encoder.config.labels or ["label"]
    values = [_rating(row[name], name) for name in names]
    if all(value == IGNORED for value in values):
        raise RowDropped("no rating")
    return {"texts": [encoder.text(rated_conversation(row))], "labels": values}


def flags(encoder: RewardEncoder, row: Row) -> Row:
    """A text; 0 or 1 in every column, IGNORED where nothing is known."""
    made = attributes(encoder, row)
    if not set(made["labels"]) <= {0.0, 1.0, float(IGNORED)}:
        raise RowDropped("a label is neither 0 nor 1")
    return made


def step_labels(encoder: RewardEncoder, row: Row) -> Row:
    """A solution; 0 or 1 where a labelled step ends, IGNORED elsewhere."""
    separator = encoder.config.separator
    reply = "".join(step + separator for step in row["steps"])
    conversation = [*prompt_of(row), {"role": "assistant", "content": reply}]
    steps = encode_steps(encoder.tokenizer, conversation, separator=separator)
    if len(steps.ends) != len(row["labels"]):
        raise RowDropped("a step is empty or holds the separator")
    labels = [IGNORED] * len(steps.ids)
    for end, label in zip(steps.ends, row["labels"], strict=True):
        labels[end] = IGNORED if label is None else int(label)
    if len(steps.ids) > encoder.config.max_length:
        raise RowDropped("longer than max_length")
    return {"texts": [steps.ids], "labels": labels}


def rated_conversation(row: Row) -> list[dict[str, Any]]:
    """The conversation of a labelled row, with the row's tools."""
    return with_tools(labelled_conversation(row), row.get("tools"))


def _both(encoder: RewardEncoder, row: Row) -> list[list[int]]:
    """Ids of the two texts.

    Raises:
        RowDropped: what is left of them after truncation is the same.
    """
    prompt = prompt_of(row)
    chosen, rejected = (encoder.text([*prompt, *row[side]]) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowDropped(EQUAL)
    return [chosen, rejected]


def _flag(value: Any, name: str) -> float:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise RowDropped(f"{name} is not true or false")


def _class_number(value: Any, count: int) -> int:
    if value not in range(count):
        raise RowDropped(f"label is not one of the classes 0 to {count - 1}")
    return int(value)


def _rating(value: Any, name: str) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return float(IGNORED)
    if isinstance(value, str) or not math.isfinite(value) or value == IGNORED:
        raise RowDropped(f"{name} is not a rating (a finite number other than {IGNORED})")
    return float(value)
