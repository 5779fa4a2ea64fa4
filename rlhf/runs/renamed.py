"""Names that changed since version 0.1.0: keys and values of configurations, keys of JSON lines.

When the records of an old run are read, old names are replaced by the current names. A user's
configuration must use the current names. The error message for an old name states the current name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlhf.common.columns import INTEGER, MESSAGES, OBJECT, TEXT, Columns
from rlhf.common.files import iterate_log
from rlhf.errors import UserError

T = TypeVar("T")

RENAMED_KEYS: dict[str, str] = {
    "verb": "command",
    "stages.verb": "stages.command",
    "algorithm.mismatch_cap": "algorithm.tis_cap",
    "rewards.normalise": "rewards.normalize",
    "gold.normalise": "gold.normalize",
    "reward.normalise": "reward.normalize",
    "condition.normalise": "condition.normalize",
}
"""Old dotted configuration key -> new dotted key in the same section. Indices of lists are omitted:
`rewards.path` is the key `path` of every entry of `rewards`. A key with a section is also renamed
in configurations that contain the section at a deeper level, such as a stage of a pipeline.
``reward`` and ``condition`` are the sections of a reward of kind ``gate``."""

RENAMED_VALUES: dict[str, dict[str, str]] = {"shaping.scale": {"normalise": "normalize"}}
"""Dotted configuration key, as in `RENAMED_KEYS` -> old value -> new value."""

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
    "profile/flop_utilisation": "profile/flop_utilization",
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

    >>> renamed_key("stages.0.rewards.1.normalise")
    'stages.0.rewards.1.normalize'
    """
    new = _entry_of_dotted_key(RENAMED_KEYS, key)
    section, dot, _ = key.rpartition(".")
    return new and section + dot + new.rpartition(".")[2]


def check_no_old_names(tree: Any, key: str = "") -> None:
    """Check that a user's configuration has no key and no value with an old name.

    Args:
        tree: The configuration, or the value of ``key``, as plain data.
        key: Dotted key of ``tree`` in the whole configuration.

    Raises:
        UserError: A name was renamed; the message states the current name.
    """
    if isinstance(tree, str) and (
        value := (_entry_of_dotted_key(RENAMED_VALUES, key) or {}).get(tree)
    ):
        raise UserError(f"{key}: {tree} was renamed to {value}")
    children = tree.items() if isinstance(tree, Mapping) else ()
    for name, child in enumerate(tree) if isinstance(tree, list) else children:
        path = f"{key}.{name}" if key else str(name)
        if new := renamed_key(path):
            raise UserError(f"{path} was renamed to {new}")
        check_no_old_names(child, path)


def upgraded_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded configuration of any version, with the current names."""
    return _upgraded(tree, "")


def check_not_recorded_by_old_version(recorded: Mapping[str, Any], path: Path) -> None:
    """Check that the run with a recorded configuration can continue in this version.

    Args:
        recorded: The recorded configuration, without new names.
        path: File of the configuration.

    Raises:
        UserError: Version 0.1.0 recorded it.
    """
    if "verb" in recorded:
        raise UserError(
            f"{path.parent} is a run of version 0.1.0, which this version cannot continue: start a "
            f"new run with --config {path} and another --output_dir"
        )


def _upgraded(tree: Any, key: str) -> Any:
    if isinstance(tree, list):
        return [_upgraded(item, key) for item in tree]
    if isinstance(tree, str):
        return (_entry_of_dotted_key(RENAMED_VALUES, key) or {}).get(tree, tree)
    if not isinstance(tree, Mapping):
        return tree
    upgraded = {}
    for name, child in tree.items():
        path = f"{key}.{name}" if key else str(name)
        new = _entry_of_dotted_key(RENAMED_KEYS, path)
        upgraded[new.rpartition(".")[2] if new else name] = _upgraded(child, path)
    return upgraded


def _entry_of_dotted_key(table: Mapping[str, T], key: str) -> T | None:
    """Return the entry of `RENAMED_KEYS` or `RENAMED_VALUES` for a dotted key, or None."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    if "kwargs" in parts:  # names that an environment defines
        return None
    path = ".".join(parts)
    for old, new in table.items():
        if path == old or ("." in old and path.endswith(f".{old}")):
            return new
    return None


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
