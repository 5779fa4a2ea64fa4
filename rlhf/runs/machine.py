"""Describe the machine and the software of a run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.common.launcher import launcher_number
from rlhf.common.text import mask_secret_options


def describe_machine() -> dict[str, Any]:
    """Return the content of ``environment.json``: versions, hardware, command line and date.

    Secrets in the command line are masked. The version of a missing package is None.
    """
    from importlib.metadata import PackageNotFoundError, version

    packages = ("rlhf-kit", "torch", "transformers", "trl", "peft", "gymnasium", "datasets")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # an optional package, or the toolkit in a checkout
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "gpus": describe_gpus(),
        "processes": launcher_number("WORLD_SIZE"),
        "versions": versions,
        "commit": _git_commit(),
        "command": mask_secret_options([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Return the name and the power limit in watts of each NVIDIA GPU that this process may use.

    They are read from `nvidia-smi`, so that PyTorch need not be imported. An unknown limit is None.
    The list is empty if `nvidia-smi` is missing or fails.
    """
    if not shutil.which("nvidia-smi"):
        return []
    query = ["--query-gpu=index,uuid,name,power.limit", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines()]
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = None if names is None else [name.strip() for name in names.split(",")]
    return [
        {"name": name, "power_limit_watts": _number_or_none(limit)}
        for index, uuid, name, limit in (row for row in rows if len(row) == 4)
        if visible is None or index in visible or uuid in visible
    ]


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def total_memory_bytes(device: Any) -> int:
    """Return the bytes of the memory of a torch device; for a CPU, those of the machine.

    For a CPU, the result is at most the limit of the control group, for example of a container.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _processor_name() -> str:
    """Return the name of the processor, followed by its bf16 instruction set if it has one.

    These instructions have a large influence on the speed.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", platform.processor())
    units = [
        unit for unit in ("amx_bf16", "avx512_bf16") if unit in fields.get("flags", "").split()
    ]
    return f"{name} ({units[0]})" if units else name


def _git_commit() -> str | None:
    """Return the git commit of the toolkit's checkout; None without a checkout or without git."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return result.stdout.strip() or None
