"""Read, validate, split and create training data.

This package does not import torch, and it imports `datasets` only to open a Hugging Face Hub id or
a folder. The report on a dataset (`rlhf.data.data_report`) and the creation of pairs
(`rlhf.data.preferences`) are not re-exported here.
"""

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.data.load import load
from rlhf.data.splits import folds_by_prompt, split_by_prompt

__all__ = [
    "DataSpec",
    "folds_by_prompt",
    "load",
    "split_by_prompt",
    "write_jsonl",
]
