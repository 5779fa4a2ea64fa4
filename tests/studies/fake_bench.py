"""A benchmark's directory with planted returns, as if its runs had been made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.table import COMMANDS
from rlhf.studies.bench.manifest import make_bench
from rlhf.studies.bench.plan import REFERENCE_FOLDER, Bench

Returns = Mapping[str, Mapping[str, Sequence[float]]]
"""Row -> environment -> return by training seed (one value for a reference)."""


def planted_bench(folder: Path, returns: Returns, **keys: Any) -> Bench:
    """A bench over Echo (random 1/16, optimal 1) and T-maze whose every run is done.

    Args:
        folder: the benchmark's directory.
        returns: of sft and of every algorithm; random and expert are at their known values.
        keys: further keys of the manifest.
    """
    algorithms = [row for row in returns if row != "sft"]
    tasks = {"echo": "text/Echo-v0", "maze": "text/TMaze-v0"}
    seeds = len(returns["sft"]["echo"])
    bench = make_bench(
        {
            "output_dir": str(folder),
            "seeds": list(range(seeds)),
            "curve_points": 2,
            "model": {"scratch": {}},
            "environments": {k: {"env": {"id": v}, "demonstrations": {}} for k, v in tasks.items()},
            "algorithms": {
                name: {"command": "rloo", "run": {"num_steps": 2}} for name in algorithms
            },
            **keys,
        },
        COMMANDS,
    )
    for env, (low, high) in KNOWN.items():
        for row, table in returns.items():
            for seed, value in enumerate(table[env]):
                run = bench.run_path(env, f"seed{seed}", "evaluate" if row == "sft" else row)
                write_run(run, row, env, value, (low, high))
        write_run(bench.run_path(env, REFERENCE_FOLDER), "random", env, low, (low, high))
        write_run(bench.run_path(env, REFERENCE_FOLDER), "expert", env, high, (low, high))
    return bench


KNOWN = {"echo": (1 / 16, 1.0), "maze": (0.1, 0.6)}


def write_run(run: Path, row: str, env: str, value: float, known: tuple[float, float]) -> None:
    """What a benchmark reads of a run, which halfway had reached half its return."""
    place = run / "evaluation" / row
    place.mkdir(parents=True)
    episode = {"env": env, "policy": row, "decoding": row if row in _ALONE else "sampled"}
    episode |= {"seed": 2**30, "return": value, "components": {}, "messages": []}
    rows = [episode, episode | {"seed": 2**30 + 1}]
    (place / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {"name": row, "env": env, "policy": row, "decoding": episode["decoding"]}
    summary |= {"random": known[0], "optimal": known[1], "episodes": 2}
    summary["metrics"] = {"return": {"mean": value, "low": value, "high": value, "n": 2}}
    (place / "summary.json").write_text(json.dumps(summary))
    config = {"policies": [{"name": row}]} if run.name == "evaluate" else {}
    (run / "config.yaml").write_text(json.dumps(config))
    points = [{"step": 1, "eval/return": value / 2}, {"step": 2, "eval/return": value}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))


_ALONE = ("random", "expert")
