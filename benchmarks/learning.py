"""Measure how close PPO and GRPO come to the known optimum of three tasks, over several seeds.

    python -m benchmarks.learning FOLDER [--seeds 5] [--tasks echo bandit key_door]

For each seed, the script runs configs/learning/TASK.yaml: SFT of a randomly initialized tiny model
on noisy demonstrations, then PPO and GRPO. It prints the mean return of each policy on held-out
episodes, with sampled decoding, as a fraction of the optimal return. It also prints the number of
seeds with a fraction of at least `REQUIRED_FRACTION`. Finished stages are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import rlhf
from rlhf.runs import launch

CONFIG_FOLDER = Path(__file__).parents[1] / "configs/learning"
TASKS = ("echo", "bandit", "key_door")
ALGORITHMS = ("ppo", "grpo")
REQUIRED_FRACTION = 0.95
"""Minimum fraction of the optimal return that a run should reach."""


def run_task(task: str, folder: Path, *, seed: int) -> dict[str, dict[str, Any]]:
    """Run one task with one seed; return policy -> result (see `read_result`)."""
    root = folder / f"{task}-{seed}"
    rlhf.run(CONFIG_FOLDER / f"{task}.yaml", output_dir=str(root), seed=seed, resume=True)
    return {policy: read_result(root, policy) for policy in ("sft", *ALGORITHMS)}


def read_result(root: Path, policy: str) -> dict[str, Any]:
    """Return the result of a policy: "share", "normalized" and "seconds".

    "share" is the mean return as a fraction of the optimal return. "normalized" is the normalized
    return with its interval; it is 0 for the random policy and 1 for the optimal policy. "seconds"
    is the duration of training.
    """
    summary = json.loads((root / f"evaluate/evaluation/{policy}/summary.json").read_text())
    lines = (root / policy / "metrics.jsonl").read_text().splitlines()
    metrics = summary["metrics"]
    return {
        "share": metrics["return"]["mean"] / summary["optimal"],
        "normalized": metrics["normalized"],
        "seconds": json.loads(lines[-1])["time"],
    }


def result_table(results: dict[str, list[dict[str, dict[str, Any]]]]) -> str:
    """Return a Markdown table with one row per task and policy."""
    rows = [
        "| task | policy | return / optimum, by seed | normalized score, by seed "
        f"| seeds with at least {REQUIRED_FRACTION} | seconds per run, median |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for task, seeds in results.items():
        for policy in ("sft", *ALGORITHMS):
            found = [seed[policy] for seed in seeds]
            shares = ", ".join(f"{x['share']:.3f}" for x in found)
            scores = ", ".join(f"{x['normalized']['mean']:.2f}" for x in found)
            reached = sum(x["share"] >= REQUIRED_FRACTION for x in found)
            seconds = median(x["seconds"] for x in found)
            rows.append(
                f"| {task} | {policy} | {shares} | {scores} | {reached} of {len(found)} "
                f"| {seconds:.0f} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run the tasks that are not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    arguments = parser.parse_args()
    launch.prepare_process()
    results = {
        task: [run_task(task, arguments.folder, seed=seed) for seed in range(arguments.seeds)]
        for task in arguments.tasks
    }
    print(result_table(results))


if __name__ == "__main__":
    main()
