"""Implements `rlhf split`, which splits a dataset into train.jsonl and test.jsonl by prompt."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from rlhf.common.files import write_jsonl
from rlhf.common.ranges import ProperFraction
from rlhf.config.base import RunConfig
from rlhf.config.data import DataSpec, Kind
from rlhf.data.labels import check_labels_have_one_scale
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitConfig(RunConfig):
    """Configuration of `rlhf split`: datasets and the fraction of the test set."""

    data: list[DataSpec]
    """Datasets; they are combined, and the combined dataset is split."""
    kind: Kind
    """Kind of the rows."""
    test_fraction: ProperFraction = 0.1
    """Approximate fraction of the rows that is written to test.jsonl; the rows of a prompt are
    written to the same file."""


def write_split_into_run(command: str, config: SplitConfig, run: Run) -> Path:
    """Write train.jsonl and test.jsonl, split by prompt; return the run directory."""
    loaded = load(config.data, config.kind, seed=config.seed)
    loaded.log_summary("data")
    check_labels_have_one_scale(loaded.rows, "data")  # rows of the new files have no range
    train, test = split_by_prompt(loaded.rows, fraction=config.test_fraction, seed=config.seed)
    for name, rows in (("train", train), ("test", test)):
        write_jsonl(run.directory / f"{name}.jsonl", rows)
        log.info("%s.jsonl: %d rows", name, len(rows))
    return run.directory
