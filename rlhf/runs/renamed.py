"""Names that changed since version 0.1.0: configuration keys, metrics, and keys of JSON lines.

When the records of an old run are read, old names are replaced by the current names. A user's
configuration must use the current names. The error message for an old name states the current name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.columns import INTEGER, MESSAGES, OBJECT, TEXT, Columns
from rlhf.common.files import iterate_log

RENAMED_KEYS: dict[str, str] = {
    "verb": "command",
    "algorithm.mismatch_cap": "algorithm.tis_cap",
}
"""Old dotted configuration key -> new dotted key in the same section. Indices of lists are omitted:
`rewards.path` is the key `path` of every entry of `rewards`."""

RENAMED_METRICS: dict[str, str] = {
    "policy/drift": "policy/approx_kl",
    "rollout/cut": "rollout/length_limited",
    "rollout/length": "rollout/tokens",
    "sampler/gap_abs": "sampler/logprob_diff_abs",
    "sampler/gap_mean": "sampler/logprob_diff_mean",
    "critic/loss": "value/loss",
    "critic/value": "value/mean",
    "critic/clip_fraction": "value/clip_fraction",
    "critic/explained_variance": "value/explained_variance",
}
"""Old key of `metrics.jsonl` -> new key."""

RENAMED_SAMPLE_KEYS: dict[str, dict[str, str]] = {
    "before": {"return": "score"},
    "train": {"return": "return_trained"},
    "after": {"return": "score"},
}
"""Value of `split` in a line of `samples.jsonl` -> old key -> new key. In 0.1.0, the `return` of a
training episode was computed after scaling and penalties, and the `return` of a held-out episode
before them."""

RENAMED_EPISODE_KEYS: dict[str, str] = {"cut": "length_limited"}
"""Old key of `evaluation/NAME/episodes.jsonl` -> new key."""

METRIC_COLUMNS: Columns = {"step": INTEGER}
"""Columns of `metrics.jsonl` that every row has."""
SAMPLE_COLUMNS: Columns = {
    "step": INTEGER,
    "split": TEXT,
    "seed": INTEGER,
    "messages": MESSAGES.as_optional(),
    "tokens": OBJECT.as_optional(),
}
"""Columns of `samples.jsonl`."""
EPISODE_COLUMNS: Columns = {
    "env": TEXT,
    "decoding": TEXT,
    "seed": INTEGER,
    "sample": INTEGER.as_optional(),
    "components": OBJECT.as_optional(),
    "messages": MESSAGES.as_optional(),
}
"""Columns of `episodes.jsonl`."""


def renamed_key(key: str) -> str | None:
    """Return the current name of a dotted configuration key, or None if it was not renamed.

    >>> renamed_key("batch_size") is None
    True
    """
    return RENAMED_KEYS.get(".".join(part for part in key.split(".") if not part.isdigit()))


def upgraded_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded configuration of any version, with the current keys."""
    config = copy.deepcopy(dict(tree))
    for old, new in RENAMED_KEYS.items():
        _rename_nested_key(config, old.split("."), new.rpartition(".")[2])
    return config


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` of a run of any version, with the current keys.

    The result is [] if there is no file.
    """
    return list(metric_rows(directory))


def metric_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl` of a run of any version, with the current keys."""
    for row in iterate_log(directory / "metrics.jsonl", METRIC_COLUMNS):
        yield _with_new_keys(row, RENAMED_METRICS)


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of `samples.jsonl` of a run of any version, with the current keys.

    The result is [] if there is no file.
    """
    return list(sample_rows(directory))


def sample_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `samples.jsonl` of a run of any version, with the current keys.

    The lines are read one by one, because the file may not fit in memory.
    """
    for row in iterate_log(directory / "samples.jsonl", SAMPLE_COLUMNS):
        yield _with_new_keys(row, RENAMED_SAMPLE_KEYS.get(row.get("split", ""), {}))


def read_episodes(evaluation: Path) -> list[dict[str, Any]]:
    """Return the lines of `episodes.jsonl` in an evaluation's folder, with the current keys."""
    rows = iterate_log(evaluation / "episodes.jsonl", EPISODE_COLUMNS)
    return [_with_new_keys(row, RENAMED_EPISODE_KEYS) for row in rows]


def _with_new_keys(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    # Names are interned, because the parser creates new strings for each line.
    return {sys.intern(names.get(key, key)): value for key, value in row.items()}


def _rename_nested_key(node: Any, path: list[str], name: str) -> None:
    """Rename the last key of a path to ``name`` in place, in every entry of lists on the path."""
    if isinstance(node, list):
        for item in node:
            _rename_nested_key(item, path, name)
    elif isinstance(node, dict) and path[0] in node:
        if len(path) > 1:
            _rename_nested_key(node[path[0]], path[1:], name)
        else:
            node[name] = node.pop(path[0])
