"""Train every algorithm with its default settings, and store the learning curves for docs/.

    python -m benchmarks.algorithm_curves FOLDER [--seeds 5]

Every algorithm starts from the same fine-tuned model, and trains with its default settings and
several seeds. The script writes the mean score of every step to docs/algorithms/curves.json;
`python -m benchmarks.algorithm_pages` draws them. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import rlhf
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.files import write_text

CURVES = Path(__file__).parents[1] / "docs" / "algorithms" / "curves.json"
ECHO, SUPPORT = "text/Echo-v0", "text/Support-v0"
METRICS = ("reward/mean", "rollout/cost")
SETTINGS: dict[str, Any] = {
    "rollout": {"max_new_tokens": 4, "parallel": 256},
    "episodes_per_step": 64,
    "num_steps": 40,
    "optimizer": {"learning_rate": 1e-3},
    "evaluation": {"episodes": 32},
    "save_every": 40,
    "samples_per_step": 0,
}
"""Settings of every run; the settings of the algorithm are its defaults."""


def task_of(algorithm: str) -> str:
    """Return the environment of an algorithm; only one with a constraint needs costs."""
    return SUPPORT if ALGORITHMS[algorithm].constrained else ECHO


def fine_tuned_model(env: str, folder: Path) -> rlhf.Run:
    """Return a small model that was trained on noisy demonstrations of an environment."""
    demos = rlhf.stage(
        "demos",
        {
            "env": env,
            "files": [{"path": "demos.jsonl", "kind": "sft", "count": 1024, "quality": 0.4}],
        },
        output_dir=str(folder / "demos"),
        resume=True,
    )
    return rlhf.sft(
        model={
            "scratch": {
                "hidden_size": 64,
                "num_layers": 2,
                "context": 256,
                "initializer_range": 0.125,
            }
        },
        data=str(demos / "demos.jsonl"),
        max_length=256,
        batch_size=64,
        micro_batch_size=64,
        evaluations=1,
        trainer={"learning_rate": 3e-3, "max_steps": 150},
        output_dir=folder / "sft",
        resume=True,
    )


def learning_curves(algorithm: str, start: rlhf.Run, folder: Path, *, seeds: int) -> dict[str, Any]:
    """Train with several seeds; return the settings and, by metric, one curve for each seed."""
    env = task_of(algorithm)
    runs = [
        rlhf.train(
            algorithm,
            model=start,
            env=env,
            seed=seed,
            output_dir=folder / f"{algorithm}-{seed}",
            resume=True,
            **SETTINGS,
        )
        for seed in range(seeds)
    ]
    frames = [run.metrics for run in runs]
    curves = {
        metric: [[float(f"{value:.4g}") for value in frame[metric]] for frame in frames]
        for metric in METRICS
        if all(metric in frame for frame in frames)
    }
    return {"env": env, "algorithm": runs[0].config["algorithm"], "curves": curves}


def main() -> None:
    """Run what is not finished, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    starts: dict[str, rlhf.Run] = {}
    results = {}
    for algorithm in ALGORITHMS:
        env = task_of(algorithm)
        if env not in starts:
            starts[env] = fine_tuned_model(env, arguments.folder / env.partition("/")[2])
        results[algorithm] = learning_curves(
            algorithm, starts[env], arguments.folder, seeds=arguments.seeds
        )
        print(algorithm, flush=True)
    content = {"settings": SETTINGS, "algorithms": results}
    write_text(CURVES, json.dumps(content, separators=(",", ":")).replace('"},"', '"},\n"') + "\n")


if __name__ == "__main__":
    main()
