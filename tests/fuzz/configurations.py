"""Configurations of every command, and the checks of mutated ones before a model is loaded."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import yaml

from rlhf import reward_models
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import COMMANDS
from rlhf.commands.dry_run import check_config_without_data
from rlhf.common.imports import import_object
from rlhf.common.yaml_text import dump_yaml, load_yaml
from rlhf.config.help import sections_of
from rlhf.errors import UserError
from rlhf.studies.bench.manifest import make_bench
from rlhf.studies.sweep.run import make_sweep
from tests.fuzz.values import TEXTS, hostile, mutate, paths_of, value_at

Tree = dict[str, Any]

MODEL = {"path": "no-such-model"}
DATA = [{"path": "no-such-file.jsonl"}]
ENV = {"id": "text/Echo-v0", "kwargs": {"num_words": 4}}
RULES = [{"kind": "length", "weight": 0.5}, {"kind": "regex", "pattern": "a+", "clip": [0, 1]}]
OUT = {"output_dir": "no-such-folder/run", "seed": 1}
OFFLINE = {
    **OUT, "model": MODEL, "data": DATA, "eval_data": [], "max_length": 48, "batch_size": 4,
    "micro_batch_size": 2, "engine": "native", "evaluations": 1,
    "trainer": {"learning_rate": 1e-3, "max_steps": 1, "warmup_steps": 0, "adam_beta1": 0.9},
}  # fmt: skip
ONLINE = {
    **OUT, "model": {**MODEL, "lora": {"rank": 2, "alpha": 4}}, "env": ENV, "rewards": RULES,
    "rollout": {"max_new_tokens": 2, "temperature": 0.9}, "num_steps": 1, "save_every": 1,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}, "kl": {"controller": "fixed"},
    "shaping": {"scale": "std", "clip": 3.0}, "evaluation": {"episodes": 2}, "episodes_per_step": 8,
}  # fmt: skip
ONLINE_KEYS = {key: value for key, value in ONLINE.items() if key not in OUT}
SCRATCH = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 64}}
BENCH = {
    "output_dir": "no-such-folder/bench", "model": SCRATCH, "seeds": [0, 1], "episodes": 4,
    "environments": {"menu": {"env": ENV, "demonstrations": {"count": 8}, "random": 0, "optimal": 1,
                              "run": {"num_steps": 1}}},
    "algorithms": {"rloo": {}, "mine": {"command": "grpo", "run": {"algorithm": {"kl_coef": 0.1}}}},
    "sft": {"trainer": {"max_steps": 1}}, "run": {"episodes_per_step": 8}, "curve_points": 1,
}  # fmt: skip
STAGES = [
    {"name": "sft", "command": "sft", "model": SCRATCH, "data": DATA},
    {"name": "train", "command": "rloo", "model": {"path": "stage:sft"}, "env": ENV,
     "rewards": [{"kind": "learned", "path": "stage:sft/x"}]},
]  # fmt: skip

BASES: dict[str, list[Tree]] = {
    "run": [{"output_dir": "no-such-folder/all", "seed": 0, "stages": STAGES}],
    "report": [{"directories": ["no-such-run"], "output": None}],
    "replay": [{"directory": "no-such-run"}],
    "compare": [{"runs": ["a", "b"], "metric": "return", "baseline": None, "json": True}],
    "bench": [BENCH],
    "tune": [{"output_dir": "no-such-folder/tune", "bench": "configs/no-such.yaml", "seeds": [7],
              "space": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                        "algorithm.lam": {"choices": [0.9, 1]}}, "trials": 2}],
    "sweep": [{"output_dir": "no-such-folder/sweep", "run_command": "rloo", "run": ONLINE_KEYS,
               "grid": {"optimizer.learning_rate": [1e-3, 1e-2]}, "seeds": [0, 1],
               "metric": "eval/return", "launcher": "local", "jobs": 2}],
    "sft": [OFFLINE],
    "reward": [
        {**OFFLINE, "engine": "auto", "kind": "smoothed", "flip_rate": 0.1},
        {**OFFLINE, "engine": "auto", "kind": "classification", "labels": ["a", "b", "c"]},
        {**OFFLINE, "engine": "auto", "kind": "process", "separator": "\n", "test_data": DATA},
    ],
    "dpo": [{**OFFLINE, "trainer": {"beta": 0.1, "loss_type": ["sigmoid", "sft"]}}],
    "kto": [{**OFFLINE, "engine": "trl"}],
    **{name: [ONLINE] for name in ALGORITHMS},
    "evaluate": [{**OUT, "policies": [{"name": "a", "model": MODEL, "examples": DATA},
                                      {"name": "random"}], "env": ENV, "rewards": RULES,
                  "text": DATA, "classes": {"data": DATA, "labels": ["a", "b"]}, "samples": 2,
                  "tasks": {"names": ["x"], "shots": 1}, "pairs": DATA, "episodes": 4}],
    "reward-report": [{**OUT, "rewards": RULES, "data": DATA, "policy": MODEL, "prompts": 2}],
    "explain": [{**OUT, "rewards": RULES, "pairs": DATA, "shown": 2, "train_pairs": DATA,
                 "policy": {"model": MODEL, "reference": MODEL, "lam": 0.9},
                 "stage_models": [{"name": "a", "model": MODEL},
                                  {"name": "b", "model": MODEL}]}],
    "overoptimize": [{**OUT, "model": MODEL, "env": ENV, "gold": RULES,
                      "proxies": {"bases": [MODEL], "data": DATA, "pairs": [16], "members": 2},
                      "best_of_n": {"prompts": 4, "samples": 8},
                      "rl": {"algorithm": "rloo", "against": ["mean"], "seeds": 1,
                             "training": {"num_steps": 1}}}],
    "generate": [{"model": MODEL, "prompt": "Hi", "samples": 2, "rollout": {"top_k": 5}}],
    "chat": [{"models": ["no-such-model", "no-such-run"], "env": ENV, "rollout": {"top_k": 5},
              "rewards": RULES, "blind": True, "labels": "votes.jsonl", "interface": "page"}],
    "score": [{"input": "x.jsonl", "rewards": RULES}],
    "serve": [{"model": MODEL, "name": "m", "rewards": RULES, "reward_name": "r", "port": 0,
               "host": "127.0.0.1", "rollout": {"parallel": 4},
               "limits": {"max_tokens": 64, "queue": 3, "seconds": 5.0, "body_bytes": 1000}}],
    "label": [
        {"data": DATA, "output": "no-such-folder/labels.jsonl", "annotator": "a", "strengths": 2,
         "checks": DATA, "check_every": 5, "order": "disagreement", "rewards": RULES, "port": 8000},
        {"data": DATA, "output": "no-such-folder/labels.jsonl", "annotator": "a", "scale": 7,
         "mode": "ratings", "interface": "terminal", "limit": 3, "guidelines": "x"},
    ],
    "labels agreement": [{"files": ["a.jsonl", "b.jsonl"], "json": True}],
    "labels export": [{"files": ["a.jsonl"], "path": "a.json", "format": "argilla"}],
    "labels import": [{"path": "a.json", "format": "label-studio", "output": "a.jsonl",
                       "names": {"prompt": "q"}, "annotator": "a"}],
    "demos": [{**OUT, "env": "text/Echo-v0", "kwargs": {"num_words": 4},
               "files": [{"path": "a.jsonl", "kind": "sft", "count": 3, "quality": 0.5}]}],
    "split": [{**OUT, "data": DATA, "kind": "sft", "test_fraction": 0.5}],
    "pairs": [{**OUT, "model": MODEL, "env": ENV, "rewards": RULES, "samples": 2, "prompts": 3,
               "annotator": {"tau": 1.0, "flip": 0.1}}],
    "data check": [{"path": "x.jsonl", "kind": "sft", "columns": {"prompt": "q"}}],
    "models list": [{}],
    "models get": [{"name": "x"}],
    "models merge": [{"adapter": "a", "target": "b"}],
    "export": [{"source": "a", "target": "b", "evaluations": ["c"], "language": ["en"],
                "gguf": {"converter": "d", "types": ["f16"]}, "onnx": True, "push": "a/b"}],
    "envs list": [{"json": True}],
    "envs demos": [{"env": "text/Echo-v0", "path": "x.jsonl", "count": 3, "kwargs": {}}],
    "envs play": [{"env": "text/Echo-v0"}],
    "envs check": [{"env": "text/Echo-v0"}],
    "algorithms": [{"name": "ppo"}],
    "doctor": [{}],
    "completion": [{"shell": "bash"}],
    "branch": [{"checkpoint": "runs/ppo/checkpoints/step-4", "output_dir": "runs/other"}],
    "plan-seeds": [{"difference": 0.1, "seed_sd": 0.1, "episode_sd": 0.4}],
    "init": [{"template": "python", "directory": "no-such-folder"}],
    "engine start": [{**OUT, "model": MODEL, "env": ENV,
                      "rollout": {"engine": {"kind": "vllm", "urls": ["http://localhost:8000"]}}}],
}  # fmt: skip

UNKNOWN = "an_unknown_key"
RULE_KINDS = ("length", "regex", "format", "number", "exact_match")
FREE = {"kwargs", "chat_template_kwargs", "columns", "names", "tuning", "space", "normalize"}
"""Keys whose mappings have names that the user chooses, or that a model or environment checks."""


def mutated_configuration(generator: random.Random) -> Tree:
    """Return a case: a command, a configuration, and whether it has a key that no command knows."""
    command = generator.choice(list(BASES))
    tree = copy.deepcopy(generator.choice(BASES[command]))
    keys = keys_of(command)
    for _ in range(generator.randrange(1, 4)):
        if keys and generator.random() < 0.4:
            set_key(tree, generator.choice(keys).split("."), hostile(generator))
        else:
            mutate(tree, generator)
    unknown = generator.random() < 0.1
    if unknown:
        sections = [(), *(path for path in paths_of(tree) if not FREE & set(path))]
        mappings = [v for v in (value_at(tree, path) for path in sections) if isinstance(v, dict)]
        generator.choice(mappings)[UNKNOWN] = 1
    return {"command": command, "tree": tree, "unknown": unknown}


def check_configuration(case: Tree) -> Any:
    """Check a configuration up to the model; return it, or None if it is refused.

    A refusal is one line. An accepted configuration has no unknown key, and its record is read
    back as the same configuration.
    """
    command = case["command"]
    try:
        config = COMMANDS.read_config(command, [case["tree"]], [])
        check_further(command, config)
        record = dump_yaml(COMMANDS.effective_config_tree(command, config))
    except UserError:
        return None
    assert not case["unknown"], "a key that no command knows was accepted"
    if COMMANDS[command].makes_run:
        again = COMMANDS.read_config(command, [load_yaml(record)], [])
        assert dump_yaml(COMMANDS.effective_config_tree(command, again)) == record
    return config


def check_text(text: str) -> None:
    """Read YAML text; a mistake is a YAMLError."""
    try:
        tree = load_yaml(text)
    except yaml.YAMLError:
        return
    dump_yaml(tree)


def mutated_text(generator: random.Random) -> str:
    """Return the YAML of a configuration with some characters and lines changed."""
    text = dump_yaml(generator.choice(BASES[generator.choice(list(BASES))]))
    pieces = (*TEXTS, "&a ", "*a", "<<: *a", "!!python/object:os.system", "? ", "- ", ": ", "1_0",
              "!!binary x", "!!set {a}", "0b", "1:30", "|\n", ">", "---\n", "%YAML 1.1\n", "\t",
              "2024-13-45", "!!timestamp 2024-13-45", "!!int x", "!!float x",
              "!!omap [a]")  # fmt: skip
    for _ in range(generator.randrange(1, 4)):
        place = generator.randrange(len(text) + 1)
        end = min(len(text), place + generator.choice([0, 0, 1, 10]))
        text = text[:place] + generator.choice(pieces) + text[end:]
    return text


def check_further(command: str, config: Any) -> None:
    """Make the checks of a command that need neither data nor a model."""
    check_config_without_data(command, config, with_model=False)
    if command == "bench":
        make_bench(config.manifest(), COMMANDS)
    elif command == "sweep":  # its first run makes these checks
        run_command, tree = make_sweep(config, COMMANDS).jobs()[0].stages[0]
        config = COMMANDS.config_from_tree(run_command, tree)
        check_config_without_data(run_command, config, with_model=False)
    elif command == "overoptimize":
        COMMANDS.plan(command, config)
    for key in ("rewards", "gold"):
        for spec in getattr(config, key, ()):
            kind = spec.get("kind")
            # Build a rule, or a kind that is refused before it loads a model.
            if kind in RULE_KINDS or not (isinstance(kind, str) and kind in reward_models.KINDS):
                reward_models.build(spec)


@functools.cache
def keys_of(command: str) -> list[str]:
    """Return the dotted keys that the help of a command can show."""
    row = COMMANDS[command]
    sections = sections_of(import_object(row.config), {})
    return [key.name for section in sections for key in section.keys]


def set_key(tree: Any, path: list[str], value: Any) -> None:
    """Set a key in place, as far as the tree has mappings on the way."""
    for part in path[:-1]:
        if isinstance(tree, list):
            tree = tree[0] if tree else {}
        if not isinstance(tree, dict):
            return
        if part != "N":
            tree = tree.setdefault(part, {})
    if isinstance(tree, dict):
        tree[path[-1]] = value
