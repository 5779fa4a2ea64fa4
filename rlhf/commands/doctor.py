"""Implements `rlhf doctor`: versions, hardware, automatic settings and optional features."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.common.plugins import installed_plugin_files
from rlhf.config.base import CommandConfig
from rlhf.config.model import ModelSpec
from rlhf.errors import UserError, first_line
from rlhf.runs.machine import describe_machine

OPTIONAL_PACKAGES = {
    "track: tensorboard": ("tensorboard", "tracking"),
    "track: wandb": ("wandb", "wandb"),
    "track: mlflow": ("mlflow", "mlflow"),
    "track: trackio": ("trackio", "trackio"),
    "text/ReasoningGym-v0": ("reasoning_gym", "reasoning-gym"),
    "text/TextArena-v0": ("textarena", "textarena"),
    "text/TextWorld-v0": ("textworld", "textworld"),
    "rlhf tune": ("optuna", "tuning"),
    "tasks of rlhf evaluate": ("lm_eval", "tasks"),
    "--launcher ray": ("ray", "ray"),
    "rlhf label": ("uvicorn", "web"),
    "rlhf chat --interface page": ("uvicorn", "web"),
    "rlhf serve": ("prometheus_client", "serve"),
    "rewards: vader": ("vaderSentiment", "sentiment"),
    "attribution.methods: shapley": ("captum", "explain"),
    "rlhf export --onnx true": ("onnxruntime", "onnx"),
}
"""Feature -> imported package, and the extra that installs it."""


@dataclass(frozen=True)
class DoctorConfig(CommandConfig):
    """Configuration of `rlhf doctor`."""

    model: ModelSpec | None = None
    """Model that is loaded to show the automatic settings for it. The default is a small Llama with
    random weights."""
    json: bool = False
    """Print JSON instead of text."""


def doctor(config: DoctorConfig) -> Iterator[str]:
    """Yield the report as text or as JSON."""
    report = {
        "versions and hardware": _versions_and_hardware(),
        "automatic settings": _automatic_settings(config.model),
        "features": _feature_availability(),
        "installed plug-ins": {name: str(file) for name, file in installed_plugin_files().items()},
    }
    if config.json:
        yield json.dumps(report, indent=2)
        return
    for title, rows in report.items():
        if rows:
            width = max(map(len, rows))
            yield "\n".join([title, *(f"  {key:<{width}}  {text}" for key, text in rows.items())])


def _versions_and_hardware() -> dict[str, str]:
    import torch

    machine = describe_machine()
    rows = {
        "rlhf": _toolkit_version(machine),
        "python": f"{machine['python']} ({sys.executable})",
        "platform": machine["platform"],
        "processor": f"{machine['processor']}, {machine['cores']} cores",
    }
    for name, version in machine["versions"].items():
        if name != "rlhf-kit":
            rows[name] = version or "not installed"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["GPUs"] = ", ".join(names) or "none"
    return rows


def _toolkit_version(machine: dict[str, Any]) -> str:
    from rlhf import __version__

    commit = machine["commit"]
    return f"{__version__}, checkout at commit {commit[:12]}" if commit else __version__


def _automatic_settings(spec: ModelSpec | None) -> dict[str, str]:
    """Return the automatic settings for a model: device, dtype, threads and others."""
    import torch

    from rlhf.config.model import ScratchSpec
    from rlhf.models.loading import load_model
    from rlhf.models.policy import Policy
    from rlhf.models.precision import BF16_MIN_PARAMS, choose_dtype, default_device
    from rlhf.rollout.sampling.decoder import make_fastest_matching_decoder

    device = default_device()
    untested = " (untested)" if device.type == "mps" else ""
    large, small = (choose_dtype("auto", size, device) for size in (BF16_MIN_PARAMS, 1))
    name = "a small Llama with random weights" if spec is None else spec.path or "from scratch"
    model, tokenizer = load_model(spec or ModelSpec(scratch=ScratchSpec()), seed=0)
    policy = Policy(model, tokenizer)
    attention = getattr(model.config.get_text_config(), "_attn_implementation", "unknown")
    sequences = "packed" if policy.supports_packing else "padded"
    return {
        "device": f"{device}{untested}",
        "dtype: auto": f"{large} from {BF16_MIN_PARAMS:,} parameters, {small} below",
        "model": f"{name}: {model.num_parameters():,} parameters",
        "dtype": str(model.dtype),
        "threads": str(torch.get_num_threads()),
        "attention": f"{attention}, {sequences} sequences",
        "decoder": type(make_fastest_matching_decoder(model)).__name__,
    }


def _feature_availability() -> dict[str, str]:
    """Return feature -> "available" or what is missing, and how the Hub can be accessed."""
    rows = {}
    for feature, (package, extra) in OPTIONAL_PACKAGES.items():
        is_installed = importlib.util.find_spec(package) is not None
        rows[feature] = "available" if is_installed else f'missing: pip install "rlhf-kit[{extra}]"'
    has_slurm = shutil.which("sbatch") is not None
    rows["--launcher slurm"] = "available" if has_slurm else "missing: sbatch is not on PATH"
    rows["rewards: code (sandbox)"] = _sandbox_availability()
    rows["models of the Hugging Face Hub"] = _hub_access_text()
    return rows


def _sandbox_availability() -> str:
    """Return "available" if programs can be confined on this machine, else what is missing."""
    from rlhf.reward_models import build

    try:
        build({"kind": "code"})
    except UserError as error:
        return f"missing: {first_line(error)}"
    return "available"


def _hub_access_text() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "only models in the cache, because HF_HUB_OFFLINE is set"
    token = "with" if get_token() else "without"
    return f"connection not tested; {token} an access token"
