"""Names that changed since version 0.1.0: configuration keys, metrics, sample keys and files.

Records of old runs are read under the current names. A configuration that a user writes must use
the current names; an old one gets an error that states the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import read_log

RENAMED_KEYS: dict[str, str] = {
    "verb": "command",
    "algorithm.mismatch_cap": "algorithm.tis_cap",
}
"""Dotted configuration key from the root of a run's configuration, old -> new. Indices of lists are
left out: `rewards.path` is a key of every entry of `rewards`."""

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

RENAMED_FILES: dict[str, str] = {}
"""Path inside a run directory, old -> new."""


def renamed_key(key: str) -> str | None:
    """Return the current name of a dotted configuration key of 0.1.0, or None if it is unchanged.

    >>> renamed_key("batch_size") is None
    True
    """
    return RENAMED_KEYS.get(".".join(part for part in key.split(".") if not part.isdigit()))


def current_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration of any version under the current keys."""
    config = _copy(tree)
    for old, new in RENAMED_KEYS.items():
        _move(config, old.split("."), new.split("."))
    return config


def current_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of `metrics.jsonl` of any version under the current keys."""
    return {RENAMED_METRICS.get(key, key): value for key, value in row.items()}


def current_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of `samples.jsonl` of any version under the current keys."""
    renamed = RENAMED_SAMPLE_KEYS.get(row.get("split", ""), {})
    return {renamed.get(key, key): value for key, value in row.items()}


def current_episode(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of `episodes.jsonl` of any version under the current keys."""
    return {RENAMED_EPISODE_KEYS.get(key, key): value for key, value in row.items()}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl` of a run of any version; no file gives no lines."""
    return [current_metrics(row) for row in read_log(run_file(directory, "metrics.jsonl"))]


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of `samples.jsonl` of a run of any version; no file gives no lines."""
    return [current_sample(row) for row in read_log(run_file(directory, "samples.jsonl"))]


def run_file(directory: Path, name: str) -> Path:
    """Return the path of a file of a run directory, which an old run has under its old name."""
    old_names = [old for old, new in RENAMED_FILES.items() if new == name]
    paths = [directory / name, *(directory / old for old in old_names)]
    return next((path for path in paths if path.exists()), paths[0])


def _copy(node: Any) -> Any:
    """Copy nested mappings and lists."""
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(item) for item in node] if isinstance(node, list) else node


def _move(node: Any, old: list[str], new: list[str]) -> None:
    """Move a value to another key in place; keys that both paths begin with reach through lists."""
    if isinstance(node, list):
        for item in node:
            _move(item, old, new)
    elif not isinstance(node, dict) or old[0] not in node:
        return
    elif len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        _move(node[old[0]], old[1:], new[1:])
    else:
        source = node
        for part in old[:-1]:
            source = source.get(part)
            if not isinstance(source, dict):
                return
        if old[-1] not in source:
            return
        value = source.pop(old[-1])
        for part in new[:-1]:
            node = node.setdefault(part, {})
        node[new[-1]] = value
