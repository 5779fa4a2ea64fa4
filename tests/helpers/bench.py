"""A small benchmark study."""

from pathlib import Path

import yaml


def write_manifest(folder: Path) -> Path:
    """Write the manifest of a study of two tasks, two methods and two seeds, with short runs."""
    folder.mkdir()
    online = {"num_steps": 4, "episodes_per_step": 8, "save_every": 1}
    tree = {
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "episodes": 8,
        "curve_points": 2,
        "model": {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 96}},
        "sft": {"max_length": 96, "evaluations": 2, "trainer": {"max_steps": 4}},
        "run": {**online, "rollout": {"max_new_tokens": 4}},
        "environments": {
            "echo": {"env": {"id": "text/Echo-v0"}, "demonstrations": {"count": 24}},
            "maze": {
                "env": {"id": "text/TMaze-v0", "kwargs": {"length": 1, "steps": 3}},
                "demonstrations": {"count": 24},
            },
        },
        "algorithms": {"ppo": {}, "rloo": {}},
    }
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
