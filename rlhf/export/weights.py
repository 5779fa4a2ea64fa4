"""Write the weights, the tokenizer and the generation configuration of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from rlhf.common.files import add_path_to_write_errors, read_json
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.models.adapters import is_adapter
from rlhf.models.hub import check_model_files
from rlhf.models.loading import save_merged_model
from rlhf.runs.checksums import CHECKSUMS_FILE, verify_checksums

COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "reward_model.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)
"""Patterns of the files and folders of a model that an export contains. The files of a critic, an
optimizer and a run are not copied."""

_PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys of config.json and tokenizer_config.json with the folder from which they were loaded."""


def write_model_folder(source: Path, target: Path) -> None:
    """Write a model to a folder that Transformers and other programs can load.

    The files of a model are copied, so that its weights are bit-identical. The adapters of a LoRA
    folder are merged into their base model, in float32.

    Args:
        source: Folder of the model or of the LoRA adapter.
        target: Folder to write; it must not exist.

    Raises:
        UserError: A file is missing or damaged, or the adapters cannot be merged.
    """
    check_model_files(str(source))
    if (source / CHECKSUMS_FILE).is_file():
        verify_checksums(source)
    if is_adapter(source):
        save_merged_model(str(source), target)
    else:
        _copy_model(source, target)
    for name in ("config.json", "tokenizer_config.json"):
        _remove_keys(target / name, _PATH_KEYS)
    if is_causal_model(target) and not (target / "generation_config.json").exists():
        config = AutoConfig.from_pretrained(target)
        GenerationConfig.from_model_config(config).save_pretrained(target)


def _copy_model(source: Path, target: Path) -> None:
    """Copy the files of `COPIED_FILES`.

    Raises:
        UserError: There are no weights in safetensors files, or no tokenizer.
    """
    for pattern, what in (("model*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if not any(source.glob(pattern)):
            raise UserError(f"{source} cannot be exported: it has no {what} ({pattern})")
    target.mkdir(parents=True)
    for pattern in COPIED_FILES:
        for path in source.glob(pattern):
            with add_path_to_write_errors(target / path.name):
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, target / path.name)


def _remove_keys(path: Path, keys: tuple[str, ...]) -> None:
    """Remove keys from a JSON file, which is not written if it has none of them."""
    if not path.is_file():
        return
    content = read_mapping_or_empty(path)
    if content.keys() & set(keys):
        kept = {key: value for key, value in content.items() if key not in keys}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_class_name(folder: Path) -> str:
    """Return the name of the Transformers class of a saved model; "" if it is not recorded."""
    config = read_json(folder / "config.json")
    return str((config.get("architectures") or [""])[0])


def is_causal_model(folder: Path) -> bool:
    """Return whether a folder contains a language model and not a classifier."""
    return not model_class_name(folder).endswith(
        ("ForSequenceClassification", "ForTokenClassification")
    )


def count_parameters_and_dtypes(folder: Path) -> tuple[int, list[str]]:
    """Return the number of stored weights and the names of their types, such as "F32"."""
    total, dtypes = 0, set()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part: Any = weights.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                total += size
                dtypes.add(str(part.get_dtype()))
    return total, sorted(dtypes)
