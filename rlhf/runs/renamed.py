"""Names that changed since version 0.1.0: configuration keys, metrics, and keys of JSON lines.

Records of old runs are read under the current names. A user's configuration must use the current
names; for an old name, the error message states the new one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import log_rows, read_log

RENAMED_KEYS: dict[str, str] = {
    "verb": "command",
    "algorithm.mismatch_cap": "algorithm.tis_cap",
}
"""Dotted configuration key, old -> new in the same section. Indices of lists are left out:
`rewards.path` is a key of every entry of `rewards`."""

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
"""Key of `metrics.jsonl`, old -> new."""

RENAMED_SAMPLE_KEYS: dict[str, dict[str, str]] = {
    "before": {"return": "score"},
    "train": {"return": "return_trained"},
    "after": {"return": "score"},
}
"""Split -> key of `samples.jsonl`, old -> new. In 0.1.0, the `return` of a training episode was
after scaling and penalties, and that of a held-out episode was before them."""

RENAMED_EPISODE_KEYS: dict[str, str] = {"cut": "length_limited"}
"""Key of `evaluation/NAME/episodes.jsonl`, old -> new."""


def renamed_key(key: str) -> str | None:
    """Return the current name of a dotted configuration key of 0.1.0, or None if it is unchanged.

    >>> renamed_key("batch_size") is None
    True
    """
    return RENAMED_KEYS.get(".".join(part for part in key.split(".") if not part.isdigit()))


def current_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration of any version with the current keys."""
    config = copy.deepcopy(dict(tree))
    for old, new in RENAMED_KEYS.items():
        _rename(config, old.split("."), new.rpartition(".")[2])
    return config


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl` of a run of any version; no file gives no lines."""
    return list(metric_rows(directory))


def metric_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl` of a run of any version one by one."""
    for row in log_rows(directory / "metrics.jsonl"):
        yield _renamed(row, RENAMED_METRICS)


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of `samples.jsonl` of a run of any version; no file gives no lines."""
    return list(sample_rows(directory))


def sample_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `samples.jsonl` one by one; the file may be larger than the memory."""
    for row in log_rows(directory / "samples.jsonl"):
        yield _renamed(row, RENAMED_SAMPLE_KEYS.get(row.get("split", ""), {}))


def read_episodes(evaluation: Path) -> list[dict[str, Any]]:
    """Read the lines of `episodes.jsonl` of an evaluation by a run of any version."""
    return [_renamed(row, RENAMED_EPISODE_KEYS) for row in read_log(evaluation / "episodes.jsonl")]


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    # Names are interned, because the parser creates new strings for each line.
    return {sys.intern(names.get(key, key)): value for key, value in row.items()}


def _rename(node: Any, path: list[str], name: str) -> None:
    """Rename the key at the end of a path in place; the path leads through lists."""
    if isinstance(node, list):
        for item in node:
            _rename(item, path, name)
    elif isinstance(node, dict) and path[0] in node:
        if len(path) > 1:
            _rename(node[path[0]], path[1:], name)
        else:
            node[name] = node.pop(path[0])
