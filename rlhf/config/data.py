"""Configuration of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rlhf.common.conversation import RESERVED_KEYS
from rlhf.common.names import did_you_mean
from rlhf.common.ranges import PositiveFloat, PositiveInt, check_fields
from rlhf.errors import UserError

Kind = Literal[
    "sft",
    "preference",
    "label",
    "prompt",
    "text",
    "classification",
    "rated",
    "ranking",
    "steps",
]
"""Kind of the rows of a dataset; docs/data.md describes the kinds. label: replies with a binary
label (KTO); text: plain text for language modeling; rated: texts or replies with ratings in
additional columns."""

DATA_KINDS: tuple[str, ...] = get_args(Kind)

FIELDS = (
    "prompt",
    "context",
    "input",
    "system",
    "history",
    "tools",
    "completion",
    "reasoning",
    "chosen",
    "rejected",
    "response_a",
    "response_b",
    "winner",
    "score_a",
    "score_b",
    "margin",
    "chosen_score",
    "rejected_score",
    "messages",
    "label",
    "text",
    "turns",
    "replies",
    "steps",
    "labels",
    "answer",
    "tests",
)
"""Field names of a column mapping; `input` is a synonym of `context`."""


@dataclass(frozen=True)
class DataSpec:
    """Configuration of a dataset. The constructor raises UserError if a value is invalid."""

    path: str
    """Id on the Hugging Face Hub (org/name), file (.jsonl, .json, .parquet, .csv, .txt; .gz
    allowed) or folder."""
    name: str | None = None
    """Configuration name, for datasets on the Hugging Face Hub that have several
    configurations."""
    data_dir: str | None = None
    """Folder inside the repository on the Hugging Face Hub, e.g. harmless-base in
    Anthropic/hh-rlhf."""
    split: str = "train"
    """Split of a dataset on the Hugging Face Hub or of a folder; ignored for a single file."""
    columns: dict[str, str] | None = None
    """Field -> column of the dataset, e.g. {prompt: question, completion: answer}. The columns of
    other fields are recognized by their names. A dot selects a key inside a column: {answer:
    reward_model.ground_truth}."""
    reward_columns: list[str] | None = None
    """Columns of the dataset that rewards read, such as [difficulty, test_cases]. Each column
    becomes a key of the row's last user message; models do not receive these keys. Only for prompts
    and for the pairs of evaluate and reward-report."""
    system: str | None = None
    """System message for prompts without a system message."""
    limit: PositiveInt | None = None
    """Maximum number of valid rows to use, taken after the seeded shuffle. By default, all rows are
    used."""
    streaming: bool = False
    """Read the rows sequentially during training, if the source is too large to be prepared first.
    Only rlhf sft with the native engine streams rows; docs/data.md states the conditions."""
    weight: PositiveFloat | None = None
    """Relative number of rows from this dataset in a mixture: its share is this weight divided by
    the sum of all weights. Without weights, all rows are used."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if not self.path.strip():
            raise UserError("data.path is empty: give a hub id (org/name), a file or a folder")
        if not self.split.strip():
            raise UserError('data.split is empty: give the name of a split, e.g. "train"')
        for field in self.columns or {}:
            if field not in FIELDS:
                raise UserError(
                    f"data.columns maps field names to columns of the dataset; there is no field "
                    f"{field!r} (fields: {', '.join(FIELDS)}){did_you_mean(field, FIELDS)}"
                )
        check_reward_columns(self.reward_columns or [], "data.reward_columns")


def check_reward_columns(columns: Sequence[str], key: str) -> None:
    """Check that columns can become keys of a message.

    Args:
        columns: Names of the columns.
        key: Configuration key, for messages.

    Raises:
        UserError: A name is blank, is that of a key that messages already have, or occurs twice.
    """
    for i, column in enumerate(columns):
        if column in ("answer", "tests"):
            raise UserError(
                f"{key}: {column!r} is a key that the last user message has without this setting; "
                f"remove it, and set data.columns: {{{column}: COLUMN}} if it is in another column"
            )
        if column in RESERVED_KEYS or not column.strip():
            raise UserError(
                f"{key}: a column cannot become the key {column!r} of a message, because that key "
                "is empty or reserved; rename the column in the dataset"
            )
        if column in columns[:i]:
            raise UserError(f"{key}: column {column!r} is named twice")
