"""Accepted configurations, run for one step with the smallest model."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import tempfile
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import run_command
from rlhf.errors import UserError
from tests.fuzz.configurations import BASES, check_configuration, keys_of, set_key
from tests.fuzz.values import hostile, mutate
from tests.helpers.training import pair_rows, save_model, sft_rows, write_rows

COMMANDS = ("sft", "dpo", *ALGORITHMS)
SMALL = {
    "num_steps": 1, "episodes_per_step": 8, "micro_batch_tokens": 8192, "max_length": 48,
    "batch_size": 4, "micro_batch_size": 2, "evaluations": 1, "samples_per_step": 2,
}  # fmt: skip
"""Sizes that mutations leave alone, so that a case takes about a second."""


def mutated_run(generator: random.Random) -> dict[str, Any]:
    """Return an accepted configuration that differs from the base in one to three keys."""
    while True:
        command = generator.choice(COMMANDS)
        tree = copy.deepcopy(generator.choice(BASES[command]))
        tree["model"] = {"path": "no-such-model"}
        for _ in range(generator.randrange(1, 4)):
            if generator.random() < 0.7:
                keys = [key for key in keys_of(command) if not key.startswith(("model.", "data"))]
                set_key(tree, generator.choice(keys).split("."), hostile(generator))
            else:
                mutate(tree, generator)
        tree = _limited(command, tree)
        case = {"command": command, "tree": tree, "unknown": False}
        if check_configuration(case) is not None:
            return {"command": command, "tree": tree}


def check_run(case: dict[str, Any]) -> None:
    """Run one step; the run ends, or is refused in one line."""
    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        rows = pair_rows(8) if case["command"] == "dpo" else sft_rows(8)
        data = [{"path": str(write_rows(Path(folder) / "rows.jsonl", rows))}]
        tree = copy.deepcopy(case["tree"])
        tree |= {"output_dir": str(Path(folder) / "run"), "model": {"path": str(model)}}
        tree |= {key: data for key in ("data", "eval_data") if tree.get(key)}
        if (tree.get("env") or {}).get("prompts"):
            tree["env"] = {**tree["env"], "prompts": data}
        with contextlib.suppress(UserError):
            run_command(case["command"], tree)


def _limited(command: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the sizes of `SMALL` and without trackers."""
    sizes = {key: value for key, value in SMALL.items() if key in tree or key == "samples_per_step"}
    if command not in ALGORITHMS:
        sizes.pop("samples_per_step")
        trainer = tree.get("trainer")
        if isinstance(trainer, dict):
            tree["trainer"] = {**trainer, "max_steps": 1}
    tree = {**tree, **sizes, "seed": tree.get("seed", 0)}
    for key in ("track", "resume", "overwrite", "profile"):
        tree.pop(key, None)
    for section, key, most in (("evaluation", "episodes", 4), ("rollout", "max_new_tokens", 4)):
        if isinstance(tree.get(section), dict) and key in tree[section]:
            tree[section][key] = most
    algorithm = tree.get("algorithm")
    if isinstance(algorithm, dict):
        for key in ("num_epochs", "num_minibatches"):
            algorithm.pop(key, None)
    return tree


@functools.cache
def _model() -> Path:
    return save_model(Path(tempfile.mkdtemp()) / "echo")
