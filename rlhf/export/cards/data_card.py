"""The data card (DATA_CARD.md) of an export: sources, rows and environments of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from rlhf.common.languages import language_metadata
from rlhf.common.numbers import is_number
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.export.cards.training import yaml_block
from rlhf.export.public_text import public_name, without_paths_and_secrets
from rlhf.export.source import Stage

DATA_CARD_FILE = "DATA_CARD.md"

_SOURCE_KEYS = {
    "data": "training",
    "env.prompts": "training prompts",
    "eval_data": "held-out evaluation during training",
    "test_data": "final report",
}
"""Configuration key with a list of datasets -> purpose of the datasets."""
_SIZE_CATEGORIES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
"""Upper bounds of numbers of rows -> size category of the Hub."""
_DATASET_OPTIONS = ("name", "data_dir", "columns", "reward_columns", "system", "limit", "weight")
"""Keys of a dataset that select or change its rows."""


def make_data_card(name: str, stages: Sequence[Stage], *, language: Sequence[str]) -> DatasetCard:
    """Return the data card.

    Args:
        name: Name of the model.
        stages: Runs that trained the model.
        language: Languages of the data, see `rlhf.config.export.ExportConfig`.
    """
    title = f"Data of {name}"
    parts = [
        f"# {escape_markdown(title)}",
        "This card lists the data of the training runs of this model, as the runs recorded them. "
        "The data themselves are not part of the export. A fingerprint is the start of the digest "
        "of a local file or folder: if yours has a different fingerprint, the run did not read "
        "it. Hub datasets have no fingerprint.",
    ]
    parts += [_stage_section(stage) for stage in stages]
    if not stages:
        parts.append("The model has no record of a training run, so its data are unknown.")
    counts = [stage.record.data_counts.get("training_rows") for stage in stages]
    languages: dict[str, Any] = language_metadata(language)
    data = DatasetCardData(
        pretty_name=title,
        source_datasets=hub_datasets(stages) or None,
        size_categories=_size_category(counts),
        tags=["rlhf", *dict.fromkeys(stage.command for stage in stages if stage.command)],
        **languages,
    )
    body = "\n\n".join(parts)
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def hub_datasets(stages: Sequence[Stage]) -> list[str]:
    """Return the Hub ids of the training data of all runs, without repetitions."""
    ids = [
        str(spec["path"])
        for stage in stages
        for key, index, spec in _datasets_of_stage(stage)
        if key in ("data", "env.prompts")
        and stage.is_hub_id(f"{key}.{index}.path", str(spec["path"]))
    ]
    return list(dict.fromkeys(ids))


def _datasets_of_stage(stage: Stage) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield (key, index, dataset) for the datasets of a run."""
    for key in _SOURCE_KEYS:
        tree: Any = stage.record.config
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, Mapping) else None
        for index, spec in enumerate(tree if isinstance(tree, list) else []):
            if isinstance(spec, Mapping) and spec.get("path"):
                yield key, index, spec


def _stage_section(stage: Stage) -> str:
    parts = [f"## {escape_markdown(stage.name)} (`rlhf {escape_markdown(stage.command)}`)"]
    rows = [_source_row(stage, *source) for source in _datasets_of_stage(stage)]
    if rows:
        columns = ["source", "used for", "split", "options", "fingerprint"]
        parts.append(markdown_table(columns, rows).rstrip())
    elif not stage.config.get("env"):
        parts.append("The run recorded no dataset.")
    if environment := _environment_sentence(stage.config):
        parts.append(environment)
    if counts := _row_counts_list(stage.record.data_counts):
        parts.append(counts)
    fraction = stage.config.get("eval_fraction")
    if rows and fraction and not stage.config.get("eval_data"):
        parts.append(
            f"The fraction {fraction} of the rows was held out for evaluation; rows with "
            "the same prompt were either all held out or all used for training."
        )
    return "\n\n".join(parts)


def _source_row(stage: Stage, key: str, index: int, spec: Mapping[str, Any]) -> list[str]:
    path = str(spec["path"])
    is_hub = stage.is_hub_id(f"{key}.{index}.path", path)
    options = [f"{name}: {spec[name]}" for name in _DATASET_OPTIONS if spec.get(name) is not None]
    return [
        path if is_hub else public_name(path),
        _SOURCE_KEYS[key],
        str(spec.get("split", "train")) if is_hub else "",
        without_paths_and_secrets(", ".join(options)),
        stage.inputs.get(f"{key}.{index}.path", "not recorded")[:16],
    ]


def _environment_sentence(config: Mapping[str, Any]) -> str:
    """Return a sentence on the environment of an online run, with its arguments."""
    env = config.get("env")
    if not isinstance(env, Mapping) or not env.get("id"):
        return ""
    text = f"The episodes came from the environment `{escape_markdown(str(env['id']))}`"
    kwargs = env.get("kwargs")
    return f"{text} with these arguments:\n\n{yaml_block(kwargs)}" if kwargs else f"{text}."


def _row_counts_list(counts: Mapping[str, Any]) -> str:
    """Return the numbers of rows as a list; "" if the run did not record them."""
    lines = []
    for what in ("data", "prompts", "eval_data"):
        loaded = counts.get(what)
        if not isinstance(loaded, Mapping):
            continue
        line = f"{what}: {loaded['rows']:,} of {loaded['total']:,} rows were used"
        dropped = [f"{count:,} {reason}" for reason, count in loaded.get("dropped", {}).items()]
        line += f"; dropped: {', '.join(dropped)}" if dropped else ""
        unused = loaded.get("unused")
        line += f"; {unused:,} were not used (limit or mixture weights)" if unused else ""
        lines.append(line)
    for key, name in (("training_rows", "trained on"), ("held_out_rows", "held out")):
        if is_number(counts.get(key)):
            lines.append(f"{name}: {counts[key]:,} rows")
    return "\n".join(f"* {escape_markdown(without_paths_and_secrets(line))}" for line in lines)


def _size_category(counts: Sequence[Any]) -> str | None:
    """Return the size category of the largest number of rows; None if none was recorded."""
    known = [int(count) for count in counts if is_number(count)]
    if not known:
        return None
    largest = max(known)
    return next((name for bound, name in _SIZE_CATEGORIES if largest < bound), "1B<n<10B")
