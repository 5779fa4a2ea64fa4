"""Measure how often alarms occur in 100 tiny runs that are healthy.

    python -m benchmarks.alarm_rate FOLDER [--first-seed 0]

A healthy run has moderate hyperparameters and starts from a model that imitates noisy
demonstrations of a task with a known optimum. The script prints the number of runs with each alarm,
with Clopper-Pearson intervals. The thresholds of the alarms were selected with ``--first-seed
100``, so they do not depend on the runs with the default seeds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import run_command
from rlhf.common.files import read_jsonl, write_jsonl
from rlhf.envs.demonstrations import write_demonstrations
from rlhf.runs import launch
from rlhf.runs.alarms import ALARMS, Halt
from rlhf.runs.diagnostics import alarm_name, repeat_metric_checks

TASKS: dict[str, dict[str, Any]] = {
    "echo": {"id": "text/Echo-v0", "kwargs": {"num_words": 8}},
    "bandit": {"id": "text/Bandit-v0", "kwargs": {"arms": 2, "horizon": 3}},
    "support": {"id": "text/Support-v0", "kwargs": {"turns": 2}},
}
"""Name -> environment. echo has one turn, bandit has several turns, and support has costs."""
OFFLINE_COMMANDS = ("sft", "reward", "dpo", "kto")
MAX_ALARMS = 5
"""Maximum accepted number of runs with an alarm."""


class HealthyRun(NamedTuple):
    """One of the healthy runs."""

    method: str
    task: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return "-".join(map(str, self))


def healthy_runs(first_seed: int = 0) -> list[HealthyRun]:
    """Return the 100 runs: 12 algorithms x 3 tasks x 2 seeds, and 4 offline methods x 7 seeds.

    `first_seed` is the smallest seed.
    """
    tasks = list(TASKS)
    online = [
        HealthyRun(method, task, first_seed + seed)
        for task in tasks
        for seed in range(2)
        for method in ALGORITHMS
    ]
    offline = [
        HealthyRun(method, tasks[seed % len(tasks)], first_seed + seed)
        for seed in range(7)
        for method in OFFLINE_COMMANDS
    ]
    return online + offline


def alarms_of(run: HealthyRun, folder: Path) -> list[str]:
    """Train a run unless it is finished; return the names of its alarms with any action.

    Args:
        run: one of the healthy runs.
        folder: folder for the data, the initial models and the runs.
    """
    output = folder / run.name
    try:
        if not (output / "final").exists():
            run_command(run.method, _prepare_run_config(run, folder))
    except Halt as halt:
        return [halt.name]
    monitor = repeat_metric_checks(output, {})
    return sorted({alarm_name(kind) for kind in monitor.reported})


def alarm_table(alarms: Mapping[HealthyRun, Iterable[str]]) -> str:
    """Return a Markdown table with the number of runs with each alarm and with at least one alarm.

    The table contains 95% intervals. The runs with alarms are listed below the table.
    """
    counts = Counter(name for names in alarms.values() for name in names)
    counts["any"] = sum(map(bool, alarms.values()))
    lines = ["| alarm | runs | 95% interval |", "| --- | ---: | --- |"]
    for name in (*ALARMS, "any"):
        low, high = binomtest(counts[name], len(alarms)).proportion_ci()
        lines.append(f"| {name} | {counts[name]} of {len(alarms)} | {low:.1%} to {high:.1%} |")
    lines += [f"{run.name}: {', '.join(names)}" for run, names in alarms.items() if names]
    return "\n".join(lines)


def _prepare_run_config(run: HealthyRun, folder: Path) -> dict[str, Any]:
    """Return the configuration of a run; create its data and its initial model if necessary."""
    common = {"output_dir": str(folder / run.name), "seed": run.seed}
    if run.method == "sft":
        return common | _prepare_offline_settings(run, folder, steps=300)
    model = {"path": str(_train_initial_model(run, folder))}
    if run.method in OFFLINE_COMMANDS:
        return common | _prepare_offline_settings(run, folder, steps=30) | {"model": model}
    return common | {
        "model": model,
        "env": TASKS[run.task],
        "rollout": {"max_new_tokens": 8},
        "optimizer": {"learning_rate": 3e-4},
        "evaluation": {"episodes": 16},
        "num_steps": 50,
        "episodes_per_step": 32,
        "save_every": 50,
    }


def _train_initial_model(run: HealthyRun, folder: Path) -> Path:
    """Train a model on noisy demonstrations of the run's task if necessary; return its folder."""
    name = f"initial-{run.task}-{run.seed}"
    if not (folder / name / "final").exists():
        keys = {"output_dir": str(folder / name), "seed": run.seed}
        run_command(
            "sft", _prepare_offline_settings(run._replace(method="sft"), folder, steps=300) | keys
        )
    return folder / name / "final"


def _prepare_offline_settings(run: HealthyRun, folder: Path, *, steps: int) -> dict[str, Any]:
    """Return the configuration keys of data, model and trainer for an offline method."""
    return {
        "model": {"scratch": {"hidden_size": 32, "context": 256, "initializer_range": 0.18}},
        "data": [{"path": str(_write_data(run, folder, count=1024, seed=run.seed))}],
        "eval_data": [{"path": str(_write_data(run, folder, count=128, seed=10_000 + run.seed))}],
        "max_length": 256,
        "batch_size": 32,
        "micro_batch_size": 32,
        "evaluations": 3,
        "trainer": {
            "max_steps": steps,
            "learning_rate": 3e-3 if run.method in ("sft", "reward") else 1e-4,
        },
    }


def _write_data(run: HealthyRun, folder: Path, *, count: int, seed: int) -> Path:
    """Write the training data of a run, unless the file exists; return the path.

    The data are demonstrations for SFT, labeled replies for KTO, and preference pairs otherwise.
    """
    kind = "sft" if run.method == "sft" else "preference"
    path = folder / f"{kind}-{run.task}-{seed}.jsonl"
    if not path.exists():
        env = TASKS[run.task]
        quality = 0.6 if kind == "sft" else 1.0
        write_demonstrations(
            env["id"], path, count=count, quality=quality, seed=seed, kind=kind, **env["kwargs"]
        )
    if run.method != "kto":
        return path
    labeled = path.with_name(f"label-{path.name}")
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in read_jsonl(path)
        for side in ("chosen", "rejected")
    ]
    write_jsonl(labeled, rows)
    return labeled


def main() -> None:
    """Train the runs that are not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    launch.prepare_process()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = healthy_runs(arguments.first_seed)
    print(alarm_table({run: alarms_of(run, arguments.folder) for run in runs}))


if __name__ == "__main__":
    main()
