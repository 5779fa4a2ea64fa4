"""A small sweep."""

from pathlib import Path
from typing import Any

import yaml


def write_sweep(folder: Path, **changes: Any) -> Path:
    """Write a sweep of two learning rates and two seeds with short runs."""
    run = {
        "model": {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 96}},
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 4},
        "episodes_per_step": 8,
        "num_steps": 2,
        "evaluation": {"every": 2, "episodes": 4},
    }
    tree = {
        "output_dir": str(folder / "out"),
        "run_command": "rloo",
        "grid": {"optimizer.learning_rate": [1e-3, 1e-2]},
        "seeds": [0, 1],
        "metric": "eval/return",
        "goal": "maximize",
        "run": run,
    } | changes
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
