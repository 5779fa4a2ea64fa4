"""Compare final returns on the echo task with completions of a vLLM server and of this process.

    python -m benchmarks.vllm_returns FOLDER --executable vllm-env/bin/python [--seeds 5]

For each seed, the script runs configs/learning/echo.yaml twice, with both engines: SFT, PPO, GRPO
and an evaluation. The model has attention heads of 32 channels, which vLLM supports. The script
prints the mean return of each policy on held-out episodes and, for each algorithm, the mean
difference over the seeds with its interval. Finished stages are not repeated.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import rlhf
from benchmarks.learning import ALGORITHMS, CONFIG_FOLDER, read_result
from rlhf.cli.table import COMMANDS
from rlhf.runs import launch
from rlhf.stats.paired import difference

URL = "http://127.0.0.1:8765"
HEADS = {"sft.model.scratch.num_heads": 2}


def run_seed(folder: Path, *, seed: int, engine: dict[str, Any] | None) -> dict[str, float]:
    """Run the task with one seed; return algorithm -> mean return of the trained policy."""
    root = folder / f"{'local' if engine is None else 'vllm'}-{seed}"
    engines = {f"{name}.rollout.engine": engine for name in ALGORITHMS if engine is not None}
    rlhf.run(
        CONFIG_FOLDER / "echo.yaml",
        output_dir=str(root),
        seed=seed,
        resume=True,
        **HEADS,
        **engines,
    )
    return {name: read_result(root, name)["share"] for name in ALGORITHMS}


@contextmanager
def vllm_server(model: Path, folder: Path, *, executable: str) -> Iterator[dict[str, Any]]:
    """Start a server for models with the architecture of ``model``; yield the engine's settings."""
    engine = {"kind": "vllm", "urls": [URL], "tolerance": 1e-3}
    stages = yaml.safe_load((CONFIG_FOLDER / "echo.yaml").read_text())["stages"]
    grpo = next(stage for stage in stages if stage["name"] == "grpo")
    tree = {key: value for key, value in grpo.items() if key not in ("name", "command")}
    tree |= {"output_dir": str(folder / "server"), "model": {"path": str(model)}}
    arguments = ["--enforce-eager", "--gpu-memory-utilization", "0.3"]
    tree["rollout"] |= {"engine": {**engine, "executable": executable, "arguments": arguments}}
    (line,) = COMMANDS.run_and_yield_text(
        "engine start", COMMANDS.read_config("engine start", [tree], [])
    )
    try:
        yield engine
    finally:
        os.kill(int(line.partition("(process ")[2].partition(",")[0]), signal.SIGTERM)


def main() -> None:
    """Run the seeds that are not finished, and print the returns and their differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executable", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    launch.prepare_process()
    seeds = range(arguments.seeds)
    local = [run_seed(arguments.folder, seed=seed, engine=None) for seed in seeds]
    initial = arguments.folder / "local-0/sft/final"
    with vllm_server(initial, arguments.folder, executable=arguments.executable) as engine:
        served = [run_seed(arguments.folder, seed=seed, engine=engine) for seed in seeds]
    for name in ALGORITHMS:
        returns = {"vllm": [run[name] for run in served], "local": [run[name] for run in local]}
        for side, values in returns.items():
            print(f"{name}, {side}: " + ", ".join(f"{value:.3f}" for value in values))
        print(f"{name}, vllm - local: {difference(returns['vllm'], returns['local'])}")


if __name__ == "__main__":
    main()
