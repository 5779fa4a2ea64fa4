"""Implements `rlhf data check`: find duplicates, leakage, contradictions and suspect rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from rlhf.common.ranges import Seed
from rlhf.config.base import CommandConfig
from rlhf.config.data import DataSpec, Kind


@dataclass(frozen=True)
class DataCheckConfig(CommandConfig):
    """Configuration of `rlhf data check`."""

    path: str
    """Dataset to check: a file, a folder or an id on the Hugging Face Hub."""
    kind: Kind | None = None
    """Kind of the rows. By default, it is inferred from the columns."""
    against: str | None = None
    """A second dataset that should have no prompt in common with the first, such as the training
    set."""
    columns: dict[str, str] | None = None
    """Field of the toolkit -> column of both datasets; a dot selects a key inside a column."""
    reward_columns: list[str] | None = None
    """Columns of prompts that rewards read, as in the source of a configuration."""
    seed: Seed = 0
    """Random seed of the cross-validation folds in the search for suspect pairs."""


def check_data(config: DataCheckConfig) -> Generator[str, None, int]:
    """Yield the report on a dataset in Markdown.

    Returns:
        1 if the dataset has a fault, otherwise 0.
    """
    from rlhf.data.data_report import check_dataset
    from rlhf.data.files import read_rows
    from rlhf.data.reader import guess_kind

    spec = DataSpec(
        config.path, columns=config.columns, reward_columns=config.reward_columns or None
    )
    kind = config.kind or guess_kind(read_rows(spec), spec)
    against = DataSpec(config.against, columns=config.columns) if config.against else None
    report = check_dataset(spec, kind, against=against, seed=config.seed)
    yield f"# {config.path}, read as {kind} data\n\n{report.to_markdown()}"
    return 0 if report.ok else 1
