"""Compare learning curves with bfloat16 and with float32 weights in two tasks, seed by seed.

    python -m benchmarks.precision FOLDER [--seeds 5]

For each seed, the script runs SFT, PPO and GRPO of configs/learning/TASK.yaml with bfloat16
weights, and again with float32 weights. With bfloat16 weights, the optimizer has float32 master
weights. A curve is the mean reward of each batch. Finished stages are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import rlhf
from benchmarks.curves import curve_comparison_table, plot_curves, read_reward_curve
from benchmarks.learning import ALGORITHMS, CONFIG_FOLDER
from rlhf.runs import launch

TASKS = ("echo", "bandit")
SIDES = ("bfloat16", "float32")


def train_reward_curves(
    task: str, folder: Path, *, dtype: str, seed: int
) -> dict[str, list[float]]:
    """Run a task with one dtype and seed; return the learning curve of each algorithm."""
    root = folder / f"{task}-{dtype}-{seed}"
    dtypes = {f"{stage}.model.dtype": dtype for stage in ("sft", *ALGORITHMS)}
    rlhf.run(CONFIG_FOLDER / f"{task}.yaml", output_dir=str(root), seed=seed, resume=True, **dtypes)
    return {algorithm: read_reward_curve(root / algorithm) for algorithm in ALGORITHMS}


def main() -> None:
    """Train the runs that are not finished, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    launch.prepare_process()
    found: dict[str, dict[str, np.ndarray]] = {}
    for task in TASKS:
        runs = {
            dtype: [
                train_reward_curves(task, arguments.folder, dtype=dtype, seed=seed)
                for seed in range(arguments.seeds)
            ]
            for dtype in SIDES
        }
        for algorithm in ALGORITHMS:
            found[f"{task}, {algorithm}"] = {
                dtype: np.array([run[algorithm] for run in made]) for dtype, made in runs.items()
            }
    print(curve_comparison_table(found))
    plot_curves(found, arguments.folder / "precision.png")


if __name__ == "__main__":
    main()
