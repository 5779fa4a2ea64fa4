"""Implements `rlhf models list`, `rlhf models get` and `rlhf models merge`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelListConfig:
    """Configuration of `rlhf models list`, which has no options."""


@dataclass(frozen=True)
class ModelDownloadConfig:
    """Configuration of `rlhf models get`: the model to download."""

    name: str
    """Short name (`rlhf models list`), id on the Hugging Face Hub, folder or GGUF file."""


@dataclass(frozen=True)
class AdapterMergeConfig:
    """Configuration of `rlhf models merge`: an adapter, and the folder of the merged model."""

    adapter: str
    """Folder of the LoRA adapter."""
    target: str
    """Folder to which the merged model is written."""


def list_models(config: ModelListConfig) -> Iterator[str]:
    """Yield a line per model in `SHORT_NAMES`: name, size, license and Hugging Face Hub id."""
    from rlhf.models.hub import SHORT_NAMES

    for name, row in SHORT_NAMES.items():
        yield f"{name}  {row.parameters}  {row.license}  {row.hub}"


def download_model(config: ModelDownloadConfig) -> Iterator[str]:
    """Download a model, unless the name is a local folder; yield the folder of the model."""
    from rlhf.models.hub import SHORT_NAMES, fetch_by_short_name, fetch_model_folder

    download = fetch_by_short_name if config.name in SHORT_NAMES else fetch_model_folder
    yield str(download(config.name))


def merge_model(config: AdapterMergeConfig) -> Iterator[str]:
    """Merge an adapter into its base model; yield the folder of the merged model."""
    from rlhf.models.loading import merge_adapter

    yield str(merge_adapter(config.adapter, Path(config.target)))
