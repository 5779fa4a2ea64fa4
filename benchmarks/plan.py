"""Compare the estimates of ``--dry-run`` with measurements.

    python -m benchmarks.plan               # the six configurations of docs/planning.md
    python -m benchmarks.plan sft dpo       # some of them
    python -m benchmarks.plan --set development

The configurations of the set "validation" were fixed before the first measurement, and nothing in
the estimate was fitted to them. Those of the set "development" were used for that. Every estimate
and every measurement has a process of its own. The memory is the peak resident memory above that of
a process which only imports the toolkit. The time of a step is the median over the steps after the
first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import copy_without_stop_token
from benchmarks.paths import ROOT, work_directory
from benchmarks.system_load import LoadReading
from benchmarks.texts import assistant_message, lognormal_lengths, random_words, user_message

MODEL = "smollm2-135m-instruct"
STEPS = 9
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A configuration whose estimate is compared with a measurement."""

    command: str
    config: Mapping[str, Any]
    """Keys of the configuration. The model and the data are added."""
    rows: Mapping[str, int]
    """Words of the prompts and, for offline runs, mean number of words of the completions."""
    processes: int = 1
    sharded: bool = False
    """Whether the processes share the training state (FSDP2)."""


_TRAINER = {
    "learning_rate": 1e-6,
    "max_steps": STEPS,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
_ONLINE = {
    "num_steps": STEPS,
    "rewards": [{"kind": "length", "low": 40}],
    "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
    "evaluation": {"episodes": 2},
    "save_every": STEPS,
}

VALIDATION = {
    "sft": Case(
        "sft",
        {"max_length": 512, "batch_size": 8, "micro_batch_size": 4, "trainer": _TRAINER},
        {"prompt": 16, "completion": 120},
    ),
    "reward": Case(
        "reward",
        {
            "model": {"dtype": "float32"},
            "max_length": 384,
            "batch_size": 4,
            "micro_batch_size": 2,
            "trainer": _TRAINER,
        },
        {"prompt": 24, "completion": 90},
    ),
    "dpo": Case(
        "dpo",
        {"max_length": 512, "batch_size": 4, "micro_batch_size": 2, "trainer": _TRAINER},
        {"prompt": 90, "completion": 80},
    ),
    "ppo": Case(
        "ppo",
        _ONLINE
        | {
            "critic": "separate",
            "rollout": {"max_new_tokens": 48, "chat": False},
            "episodes_per_step": 8,
            "micro_batch_tokens": 512,
            "algorithm": {"num_epochs": 2, "num_minibatches": 2},
        },
        {"prompt": 72},
    ),
    "grpo-lora": Case(
        "grpo",
        _ONLINE
        | {
            "model": {"lora": {"rank": 16}},
            "rollout": {"max_new_tokens": 64, "chat": False},
            "episodes_per_step": 8,
            "micro_batch_tokens": 2048,
            "algorithm": {"group_size": 4},
        },
        {"prompt": 120},
    ),
    "fsdp2": Case(
        "sft",
        {"max_length": 512, "batch_size": 4, "micro_batch_size": 2, "trainer": _TRAINER},
        {"prompt": 32, "completion": 140},
        processes=2,
        sharded=True,
    ),
}
"""The configurations of docs/planning.md."""

DEVELOPMENT = {
    "sft-long": Case(
        "sft",
        {"max_length": 1024, "batch_size": 4, "micro_batch_size": 4, "trainer": _TRAINER},
        {"prompt": 8, "completion": 300},
    ),
    "sft-float32": Case(
        "sft",
        {
            "model": {"dtype": "float32"},
            "max_length": 256,
            "batch_size": 8,
            "micro_batch_size": 2,
            "activation_checkpointing": True,
            "trainer": _TRAINER,
        },
        {"prompt": 8, "completion": 150},
    ),
    "rloo": Case(
        "rloo",
        _ONLINE
        | {
            "rollout": {"max_new_tokens": 32, "chat": False},
            "episodes_per_step": 8,
            "micro_batch_tokens": 2048,
            "algorithm": {"group_size": 4},
        },
        {"prompt": 200},
    ),
    "sft-lora": Case(
        "sft",
        {
            "model": {"lora": {"rank": 8}},
            "max_length": 512,
            "batch_size": 8,
            "micro_batch_size": 8,
            "trainer": _TRAINER,
        },
        {"prompt": 8, "completion": 100},
    ),
}
"""Other configurations, with which the estimate was developed."""

SETS = {"validation": VALIDATION, "development": DEVELOPMENT}


def write_config(case: Case, folder: Path) -> dict[str, Any]:
    """Write the data of a case to a folder; return its configuration."""
    from rlhf.models.hub import fetch_model_folder

    rng = random.Random(0)
    prompt = case.rows["prompt"]
    config = {"output_dir": str(folder / "run"), "overwrite": True, **case.config}
    if "completion" in case.rows:
        model = fetch_model_folder(MODEL)
        lengths = lognormal_lengths(256, 256 * case.rows["completion"])
        rng.shuffle(lengths)
        sides = ("completion",) if case.command == "sft" else ("chosen", "rejected")
        rows = [
            {
                "prompt": user_message(random_words(prompt, rng)),
                **{
                    side: assistant_message(random_words(lengths[(index + 97 * k) % 256], rng))
                    for k, side in enumerate(sides)
                },
            }
            for index in range(256)
        ]
        config |= {"evaluations": 1, "eval_fraction": 0.02}
        config["data"] = [{"path": str(folder / "rows.jsonl")}]
    else:
        model = copy_without_stop_token(MODEL, folder / "model")
        rows = [{"prompt": user_message(random_words(prompt, rng))} for _ in range(256)]
        config["env"] = {"prompts": [{"path": str(folder / "rows.jsonl")}]}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    partial = folder / f"rows-{os.getpid()}.jsonl"  # several processes write the same rows
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "rows.jsonl")
    config["model"] = {"path": model, **case.config.get("model", {})}
    return config


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def import_toolkit() -> None:
    """Import the modules that a training command needs, without loading a model."""
    from rlhf.runs.launch import prepare_process

    prepare_process()
    import rlhf.reports
    import rlhf.training.offline
    import rlhf.training.online  # noqa: F401


def measure_imports() -> dict[str, float]:
    """Return the memory of a process that only imports the toolkit."""
    import_toolkit()
    return {"bytes": peak_memory()}


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """Return the estimates for a case."""
    import_toolkit()
    from rlhf.cli.table import COMMANDS
    from rlhf.commands.dry_run import describe_offline, describe_online
    from rlhf.runs.launch import configure_malloc_to_return_memory
    from rlhf.training.plan.plan import Parallelism
    from rlhf.training.plan.text import OFFLINE_KEYS, ONLINE_KEYS, plan_lines

    config = COMMANDS.config_from_tree(case.command, write_config(case, folder))
    describe, keys = (
        (describe_offline, OFFLINE_KEYS)
        if hasattr(config, "data")
        else (describe_online, ONLINE_KEYS)
    )
    start = time.perf_counter()
    if case.sharded:
        configure_malloc_to_return_memory()
    shards = case.processes if case.sharded else 1
    lines, plan = describe(
        case.command, config, Parallelism(case.processes, shards, per_machine=case.processes)
    )
    seconds = time.perf_counter() - start
    text = [*lines, *plan_lines(plan, device_bytes=float("inf"), keys=keys)]
    return {
        "bytes": plan.overhead + max(memory.total for memory in plan.phases.values()),
        "seconds": plan.duration.total,
        "text": "\n".join(text),
        "planning": seconds,
    }


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Train for some steps; return the peak memory and the median duration of a step.

    The first steps allocate memory and compile kernels. They are slower than the others, so that
    there must be enough of these for a median.
    """
    import_toolkit()
    from rlhf.cli.table import COMMANDS
    from rlhf.common.imports import import_object
    from rlhf.runs.directory import Run

    times: list[float] = []

    class TimedRun(Run):
        """A run that records when the metrics of each step are logged."""

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            """Log the metrics of a step."""
            super().log(step, metrics)
            times.append(time.perf_counter())

    tree = write_config(case, folder)
    if case.sharded:
        tree["sharding"] = "fsdp"
    config = COMMANDS.config_from_tree(case.command, tree)
    opened = Run.open(COMMANDS.effective_config_tree(case.command, config))
    load = LoadReading.now()
    import_object(COMMANDS[case.command].run)(case.command, config, TimedRun(opened.directory))
    others = LoadReading.now().cores_used_by_others(load)
    # The first step allocates memory, and the last one includes the evaluation and a checkpoint.
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    middle = steps[1:-1] if hasattr(config, "data") else steps[:-1]
    return {
        "bytes": peak_memory(),
        "seconds": statistics.median(middle),
        "steps": steps,
        "other_cores": others,
    }


def run_worker(*arguments: str, processes: int = 1, one_thread: bool = False) -> dict[str, Any]:
    """Run a function of this module in processes of its own; return the result of the first.

    With ``one_thread``, a process has one thread, as several processes that torchrun starts have.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "benchmarks.plan", "--worker", *arguments]
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if one_thread else {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(names: Sequence[str], group: str, *, verbose: bool) -> None:
    """Print a table with estimates, measurements and their ratios."""
    imports = run_worker("imports")["bytes"]
    print(f"a process that only imports the toolkit: {imports / GIB:.2f} GiB")
    print(
        "| configuration | memory, estimated | measured | ratio "
        "| step, estimated | measured | ratio |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        processes = SETS[group][name].processes
        planned = run_worker("predict", group, name, one_thread=processes > 1)
        measured = run_worker("measure", group, name, processes=processes)
        estimate, memory = planned["bytes"] - imports, measured["bytes"] - imports
        print(
            f"| {name} | {estimate / GIB:.2f} GiB | {memory / GIB:.2f} GiB | "
            f"{estimate / memory:.2f} | {planned['seconds']:.2f} s | "
            f"{measured['seconds']:.2f} s | {planned['seconds'] / measured['seconds']:.2f} |",
            flush=True,
        )
        if verbose:
            print(planned["text"])
            print({key: measured[key] for key in ("steps", "other_cores")}, planned["planning"])


def work(kind: str, group: str = "", name: str = "") -> None:
    """Run one function in this process, and print its result as JSON."""
    if kind == "imports":
        result = measure_imports()
    else:
        case = SETS[group][name]
        function = {"predict": predict, "measure": measure}[kind]
        result = function(case, work_directory("plan", f"{name}-{kind}"))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="configurations; by default, all of the set")
    parser.add_argument("--set", choices=SETS, default="validation", dest="group")
    parser.add_argument("--verbose", action="store_true", help="also print the texts of the plans")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.names)
    else:
        compare(options.names or list(SETS[options.group]), options.group, verbose=options.verbose)
