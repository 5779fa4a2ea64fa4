"""Run directories of finished evaluations, written by hand."""

import json
from collections.abc import Mapping
from pathlib import Path

FIRST = 2**30


def write_run(
    directory: Path,
    returns: Mapping[int, float | None],
    *,
    policy: str = "model",
    decoding: str = "greedy",
    seed: int | None = None,
    env: str = "echo",
) -> Path:
    """Write one evaluated run.

    Args:
        directory: The run directory.
        returns: Evaluation seed minus `FIRST` -> return; None if the episode has no score.
        policy: Name of the policy in the path and the rows.
        decoding: Name of the decoding in the path and the rows.
        seed: Training seed of the run's configuration; None writes no configuration.
        env: Name of the environment.
    """
    folder = directory / "evaluation" / f"{policy}-{decoding}-{env}"
    folder.mkdir(parents=True)
    if seed is not None:
        (directory / "config.yaml").write_text(f"seed: {seed}\n")
    rows = [
        {
            "env": env,
            "policy": policy,
            "decoding": decoding,
            "seed": FIRST + episode,
            "return": value,
            "success": None,
            "cost": 0.5,
            "components": {"gold": None if value is None else 2 * value},
        }
        for episode, value in returns.items()
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
