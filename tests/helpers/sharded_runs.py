"""Training commands in this process, which may be one of several processes of a launcher.

    python -m tests.helpers.sharded_runs JOBS.json

The file has a list of jobs: the words of a command, and the dtype of the weights. The dtype float64
has no configuration key; it makes rounding errors small enough to find all others. A job may copy a
run without its last checkpoint before its command, so that the command resumes there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rlhf.cli.main import main
from rlhf.models import loading
from rlhf.models.sharding import loading as sharded_loading
from rlhf.training.distributed import init_distributed
from rlhf.training.reward_models import new_head


def run(words: list[str], *, dtype: str = "float32") -> int:
    """Run a command with weights of a dtype."""
    kind = getattr(torch, dtype)
    modules = (loading, sharded_loading, new_head)
    patches: list[Any] = [
        mock.patch.object(module, "choose_dtype", return_value=kind) for module in modules
    ]
    if dtype == "float64":  # otherwise the head of a reward model is float32
        patches.append(mock.patch.object(new_head, "cast_heads_to_fp32"))
    for patch in patches:
        patch.start()
    try:
        return main(words)
    finally:
        for patch in patches:
            patch.stop()


def copy_without_last_checkpoint(source: Path, target: Path) -> None:
    """Copy a finished run as if it had been killed after the second to last checkpoint."""
    shutil.copytree(source, target)
    last = max(target.glob("checkpoints/step-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    shutil.rmtree(target / "final")
    (target / "finished").unlink()


def run_jobs(jobs: list[dict[str, Any]]) -> None:
    """Run jobs one after another."""
    world = init_distributed()
    for job in jobs:
        if "copy" in job and world.rank == 0:
            copy_without_last_checkpoint(*map(Path, job["copy"]))
        world.barrier()
        code = run(job["words"], dtype=job.get("dtype", "float32"))
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))
