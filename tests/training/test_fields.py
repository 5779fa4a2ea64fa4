"""Every key of an online run changes what the run leaves, or is refused with the reason.

The classes are enumerated, so that a key that is added without a case here fails. A case is two
runs of two steps that differ in one key; `refusals` are combinations in which the key would do
nothing. Keys whose effect is not in what a run leaves have a test of their own below.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from rlhf.algorithms.settings import Settings
from rlhf.cli.table import configure, run_command
from rlhf.config.engine import EngineSpec
from rlhf.config.load import merge_trees
from rlhf.config.model import LoraSpec, ModelSpec, ScratchSpec
from rlhf.config.online import EvaluationSpec, KLSpec, OnlineConfig, OptimizerSpec, RewardShaping
from rlhf.config.rollout import EnvSpec, OnlineRolloutSpec
from rlhf.errors import UserError
from rlhf.training import loop
from rlhf.training import optimize as update
from rlhf.training.online import OnlineTrainer
from tests.helpers.trainers import collected_batch
from tests.helpers.training import (
    Tree,
    checkpoint_of,
    metrics_of,
    online_tree,
    read_rows,
    same,
    save_model,
    user,
    weights_of,
    write_rows,
)

CLASSES = {
    "": OnlineConfig,
    "model.": ModelSpec,
    "model.scratch.": ScratchSpec,
    "model.lora.": LoraSpec,
    "env.": EnvSpec,
    "rollout.": OnlineRolloutSpec,
    "rollout.engine.": EngineSpec,
    "optimizer.": OptimizerSpec,
    "kl.": KLSpec,
    "shaping.": RewardShaping,
    "evaluation.": EvaluationSpec,
    "algorithm.": Settings,
}
JUDGE = [{"kind": "function", "path": "tests.helpers.training:judge"}]
ECHO = {"id": "text/Echo-v0"}
NUMBERS = {"id": "tests.training.test_fields:Numbers-v0"}
PROMPTS = {"env": {"id": None, "prompts": "PROMPTS"}}


class Numbers(gym.Env):
    """Three turns of a number from 0 to 9; pays the number. Seeds that are odd may break."""

    observation_space = gym.spaces.Text(99)
    action_space = gym.spaces.Discrete(10)

    def __init__(self, fragile: bool = False, slow: bool = False) -> None:
        self.fragile, self.slow = fragile, slow

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3
        if self.slow:
            time.sleep(60)
        if self.fragile and self.np_random.random() < 0.3:
            raise RuntimeError("broken")
        return "apple", {}

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return "river", float(action), self.left == 0, False, {}


gym.register("Numbers-v0", entry_point=Numbers)

LORA = {"model": {"lora": {"rank": 2}}, "optimizer": {"learning_rate": 1e-2}}
TURNS = {"env": NUMBERS, "rewards": [], "rollout": {"invalid": "retry"}}
TWICE = {"algorithm": {"num_epochs": 4}}
FAST = {"optimizer": {"learning_rate": 1e-2}}
NORMALIZED = {"shaping": {"scale": "normalize"}}
SCRATCH = {"model": {"path": None, "scratch": {}}}
# key -> (another value, keys that both runs have, algorithm)
EFFECTS: dict[str, tuple[Any, Tree, str]] = {
    "model": ({"path": "OTHER"}, {}, "ppo"),
    "model.path": ("OTHER", {}, "ppo"),
    "model.lora": ({"rank": 2}, {}, "ppo"),
    "model.dtype": ("bfloat16", {}, "ppo"),
    "model.scratch": ({"num_layers": 1}, SCRATCH, "ppo"),
    "model.scratch.hidden_size": (32, SCRATCH, "ppo"),
    "model.scratch.num_layers": (1, SCRATCH, "ppo"),
    "model.scratch.num_heads": (2, SCRATCH, "ppo"),
    "model.scratch.context": (24, merge_trees(TURNS, SCRATCH), "ppo"),
    "model.scratch.initializer_range": (0.1, SCRATCH, "ppo"),
    "model.lora.rank": (4, LORA, "ppo"),
    "model.lora.alpha": (8, LORA, "ppo"),
    "model.lora.target_modules": (["q_proj"], LORA, "ppo"),
    "model.lora.modules_to_save": (["norm"], LORA, "ppo"),
    "model.lora.use_dora": (True, LORA, "ppo"),
    "model.lora.use_rslora": (True, LORA, "ppo"),
    "env": ({"kwargs": {"num_words": 3}}, {}, "ppo"),
    "env.id": (NUMBERS["id"], {}, "ppo"),
    "env.kwargs": ({"num_words": 2}, {}, "ppo"),
    "env.prompts": ("OTHER PROMPTS", PROMPTS, "ppo"),
    "env.reward": (0.5, {"env": NUMBERS}, "ppo"),
    "rewards": ([{"kind": "length"}], {}, "ppo"),
    "gold": (JUDGE, {"rewards": [{"kind": "length"}]}, "ppo"),
    "algorithm": ({"lam": 0.5}, {}, "ppo"),
    "rollout": ({"max_new_tokens": 2}, {}, "ppo"),
    "rollout.max_new_tokens": (2, {}, "ppo"),
    "rollout.max_tokens": (24, TURNS, "ppo"),
    "rollout.temperature": (0.7, {}, "ppo"),
    "rollout.chat": (False, {}, "ppo"),
    "rollout.separator": (" ", {"rollout": {"chat": False}}, "ppo"),
    "rollout.stop": ("e", {"rollout": {"chat": False}}, "ppo"),
    "rollout.system": ("Say apple.", {}, "ppo"),
    "rollout.max_staleness": (1, {}, "ppo"),
    "rollout.invalid": ("retry", {"env": NUMBERS}, "ppo"),
    "rollout.invalid_reward": (-1.0, {"env": NUMBERS}, "ppo"),
    "optimizer": ({"eps": 1e-3}, {}, "ppo"),
    "optimizer.name": ("sgd", {}, "ppo"),
    "optimizer.learning_rate": (2e-3, {}, "ppo"),
    "optimizer.weight_decay": (0.1, {}, "ppo"),
    "optimizer.eps": (1e-3, {}, "ppo"),
    "optimizer.max_grad_norm": (1e-9, {}, "ppo"),
    "optimizer.warmup_steps": (2, {}, "ppo"),
    "optimizer.schedule": ("cosine", {}, "ppo"),
    "kl": ({"controller": "adaptive"}, {}, "ppo"),
    "kl.controller": ("adaptive", {}, "ppo"),
    "kl.target": (1.0, {"kl": {"controller": "budget", "target": 1e-9}}, "ppo"),
    "kl.horizon": (100, {"kl": {"controller": "adaptive"}}, "ppo"),
    "shaping": ({"length_penalty": 0.1}, {}, "ppo"),
    "shaping.scale": ("std", {}, "ppo"),
    "shaping.clip": (0.1, NORMALIZED, "ppo"),
    "shaping.missing_eos_penalty": (0.5, {}, "ppo"),
    "shaping.length_penalty": (0.1, {}, "ppo"),
    "evaluation": ({"episodes": 8}, {}, "ppo"),
    "evaluation.every": (1, {}, "ppo"),
    "evaluation.episodes": (8, {}, "ppo"),
    "evaluation.decoding": ("greedy", {}, "ppo"),
    "evaluation.prompts_fraction": (0.5, PROMPTS, "ppo"),
    "keep_best": (True, {"evaluation": {"every": 1}}, "ppo"),
    "critic": ("separate", {}, "ppo"),
    "critic_warmup_steps": (1, {}, "ppo"),
    "num_steps": (3, {}, "ppo"),
    "episodes_per_step": (4, {}, "ppo"),
    "samples_per_step": (1, {}, "ppo"),
    "profile": (True, {}, "ppo"),
    "seed": (1, {}, "ppo"),
    "algorithm.advantage": ("return_to_go", TURNS, "ppo"),
    "algorithm.num_epochs": (2, {}, "grpo"),
    "algorithm.num_minibatches": (2, {}, "grpo"),
    "algorithm.group_size": (4, {}, "grpo"),
    "algorithm.aggregation": ("sequence", {}, "ppo"),
    "algorithm.clip_low": (1e-6, TWICE, "grpo"),
    "algorithm.clip_high": (1e-6, TWICE, "grpo"),
    "algorithm.dual_clip": (1.0 + 1e-6, merge_trees(TWICE, FAST), "grpo"),
    "algorithm.tis_cap": (1.0, {}, "grpo"),
    "algorithm.sequence_mask_low": (1 - 1e-9, {}, "grpo"),
    "algorithm.sequence_mask_high": (1 + 1e-9, {}, "grpo"),
    "algorithm.kl_placement": ("loss", {"algorithm": {"kl_estimator": "k2"}}, "ppo"),
    "algorithm.kl_estimator": ("k2", {}, "grpo"),
    "algorithm.kl_coef": (0.5, {}, "ppo"),
    "algorithm.gamma": (0.5, {}, "ppo"),
    "algorithm.lam": (0.5, {}, "ppo"),
    "algorithm.turn_gamma": (
        0.5,
        merge_trees(TURNS, {"algorithm": {"advantage": "turn_gae"}}),
        "ppo",
    ),
    "algorithm.turn_lam": (
        0.5,
        merge_trees(TURNS, {"algorithm": {"advantage": "turn_gae"}}),
        "ppo",
    ),
    "algorithm.whiten_advantages": (False, {}, "ppo"),
    "algorithm.scale_by_std": (False, {}, "grpo"),
    "algorithm.entropy_coef": (0.5, {}, "ppo"),
    "algorithm.value_coef": (0.5, {}, "ppo"),
    "algorithm.value_clip": (1e-6, {}, "ppo"),
    "algorithm.pair_labels": ("hard", {}, "online_dpo"),
    "algorithm.dynamic_sampling": (
        True,
        {"rewards": [], "algorithm": {"group_size": 2}},
        "grpo",
    ),
    "algorithm.overlong_fraction": (1.0, {}, "grpo"),
    "algorithm.cost_limit": (-1.0, {}, "ppo_lagrangian"),
    "algorithm.multiplier_init": (2.0, {}, "ppo_lagrangian"),
    "algorithm.multiplier_lr": (0.5, {"algorithm": {"cost_limit": -1.0}}, "ppo_lagrangian"),
    "algorithm.multiplier_max": (1.0, {"algorithm": {"cost_limit": -1.0}}, "ppo_lagrangian"),
}
SERVER_KEYS = {
    "urls": ["http://localhost:1"],
    "folder": "shared",
    "request_timeout": 1.0,
    "retry_seconds": 1.0,
    "tolerance": 1.0,
    "executable": "python3",
    "arguments": ["--enforce-eager"],
    "start_seconds": 1.0,
    "options": {"length": 2},
}
# key -> (value, other keys, algorithm, part of the message)
REFUSALS: dict[str, tuple[Any, Tree, str, str]] = {
    "rollout.top_k": (5, {}, "ppo", "cannot be used in training"),
    "rollout.top_p": (0.9, {}, "ppo", "cannot be used in training"),
    "rollout.min_p": (0.1, {}, "ppo", "cannot be used in training"),
    "rollout.temperature": (0.0, {}, "ppo", "greedy decoding does not explore"),
    "rollout.invalid": ("retry", {}, "ppo", "environment are text"),
    "rollout.invalid_reward": (-1.0, {}, "ppo", "environment are text"),
    "rollout.separator": (" ", {}, "ppo", "the chat template ends turns"),
    "rollout.stop": ("x", {}, "ppo", "the chat template ends turns"),
    **{
        f"rollout.engine.{name}": (value, {}, "ppo", "no effect with rollout.engine.kind local")
        for name, value in SERVER_KEYS.items()
    },
    "optimizer.eps": (1e-3, {"optimizer": {"name": "sgd"}}, "ppo", "no effect with optimizer.name"),
    "kl.target": (1.0, {}, "ppo", "no effect with kl.controller fixed"),
    "kl.horizon": (5, {"kl": {"controller": "budget"}}, "ppo", "with kl.controller budget"),
    "kl.controller": ("adaptive", {}, "dapo", "kl_placement is none"),
    "shaping.clip": (1.0, {}, "ppo", "no effect with shaping.scale none"),
    "evaluation.prompts_fraction": (0.5, {}, "ppo", "no effect without env.prompts"),
    "keep_best": (True, {}, "ppo", "no effect with evaluation.every 0"),
    "critic": ("separate", {}, "grpo", "no critic"),
    "critic_warmup_steps": (1, {}, "grpo", "no critic"),
    "env.reward": (0.5, PROMPTS, "ppo", "no reward"),
    "env.errors": ("count", PROMPTS, "ppo", "cannot fail"),
    "env.timeout": (1.0, PROMPTS, "ppo", "cannot fail"),
    "rollout.max_staleness": (1, {"env": {"timeout": 1.0}}, "ppo", "env.timeout cannot be used"),
    "model.lora": ({}, SCRATCH, "ppo", "cannot be combined with model.scratch"),
    "model.chat_template_kwargs": ({"enable_thinking": False}, {}, "ppo", "does not read"),
    "model.fold_system": (True, {}, "ppo", "the template has a system role"),
    "model.revision": ("main", {}, "ppo", "only a hub id"),
    "model.dtype": ("float16", {}, "ppo", "gradients underflow in float16"),
}
# Shown by the named test: not in what a run leaves, or only in combination with an accident.
ELSEWHERE = {
    "output_dir": "test_the_directory_is_the_one_that_was_asked_for",
    "resume": "tests/training/test_resume.py",
    "overwrite": "tests/test_runs.py",
    "allow_changes": "tests/training/test_changes.py",
    "track": "tests/test_tracking.py",
    "plugins": "tests/test_plugins.py",
    "callbacks": "tests/training/test_callbacks.py",
    "env.errors": "test_failures_stop_the_run_or_are_counted",
    "env.concurrency": "tests/rollout/test_env_workers.py",
    "env.timeout": "test_failures_stop_the_run_or_are_counted",
    "shaping.max_unscored": "tests/training/test_online.py",
    "rollout.parallel": "test_parallel_is_the_number_of_environments",
    "rollout.engine": "tests/training/test_vllm_training.py",
    "rollout.engine.kind": "tests/training/test_vllm_training.py",
    "alarms": "tests/training/test_alarms.py",
    "keep_last": "tests/training/test_checkpoint.py",
    "activation_checkpointing": "tests/models/test_activation_checkpointing.py",
    "sharding": "tests/training/test_sharding.py",
    "save_every": "test_checkpoints_are_written_as_often_as_asked",
    "micro_batch_tokens": "test_micro_batches_are_passes_of_the_model",
    "model.lora.dropout": "tests/training/test_dropout.py",
    "model.attn_implementation": "tests/models/test_adapters.py",
    "model.scratch.vocab_size": "tests/models",
    "model.chat_template_kwargs": "test_the_template_has_the_options_that_were_asked_for",
    "model.fold_system": "test_the_template_has_the_options_that_were_asked_for",
}


def test_no_key_is_forgotten() -> None:
    known = {
        prefix + field.name for prefix, cls in CLASSES.items() for field in dataclasses.fields(cls)
    }
    assert known == EFFECTS.keys() | REFUSALS.keys() | ELSEWHERE.keys()
    for name in CLASSES:  # no group of keys without its class
        assert not name or name[:-1] in known


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, echo_model: Path) -> dict[str, Any]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("fields")
    rows = [{"prompt": user(f"Repeat: {word}")} for word in "abcdefghij"]
    prompts = write_rows(folder / "prompts.jsonl", rows)
    fewer = write_rows(folder / "fewer.jsonl", rows[:5])
    other = save_model(folder / "other", seed=1, sharp=3.0)
    return {
        "MODEL": echo_model,
        "OTHER": str(other),
        "PROMPTS": [{"path": str(prompts)}],
        "OTHER PROMPTS": [{"path": str(fewer)}],
    }


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, places: dict[str, Any]) -> Any:
    """What a run of two steps leaves, by its configuration; equal ones run once."""
    found: dict[str, Any] = {}

    def run(command: str, changes: Tree) -> Any:
        name = json.dumps([command, changes], sort_keys=True)
        if name not in found:
            folder = tmp_path_factory.mktemp("run") / "run"
            run_command(command, tree_of(folder, places, changes))
            found[name] = everything(folder)
        return found[name]

    return run


def tree_of(folder: Path | str, places: dict[str, Any], changes: Tree) -> Tree:
    """A run of two steps with these keys."""
    base = online_tree(Path(folder), places["MODEL"], num_steps=2, env=ECHO)
    return merge_trees(base, filled(changes, places))


def filled(value: Any, places: dict[str, Any]) -> Any:
    """The same with words in capitals replaced."""
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    return places[value] if isinstance(value, str) and value in places else value


def nested(key: str, value: Any) -> Tree:
    """`a.b` as a tree."""
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def everything(folder: Path) -> Any:
    """All that a run leaves but times and its own name."""
    summary = json.loads((folder / "evaluation/run/summary.json").read_text())
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {
        "metrics": metrics_of(folder),
        "weights": weights_of(folder),
        "samples": read_rows(folder / "samples.jsonl"),
        "summary": summary,
        "state": checkpoint_of(folder)["state"],
        "saved": saved,
    }


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_changes_what_the_run_leaves(key: str, left: Any) -> None:
    value, base, command = EFFECTS[key]
    before = left(command, base)
    assert not same(before, left(command, merge_trees(base, nested(key, value))))


@pytest.mark.parametrize("key", REFUSALS)
def test_a_key_without_effect_is_refused(key: str, places: dict[str, Any]) -> None:
    value, base, command, message = REFUSALS[key]
    tree = tree_of("unused", places, merge_trees(base, nested(key, value)))
    with pytest.raises((UserError, ValueError), match=message) as error:
        OnlineTrainer(command, configure(command, tree))
    assert "\n" not in str(error.value)
    assert key.rpartition(".")[2] in str(error.value)


def test_the_directory_is_the_one_that_was_asked_for(tmp_path, places) -> None:
    final = run_command("grpo", tree_of(tmp_path / "here", places, {"num_steps": 1}))
    assert final == tmp_path / "here/final"


def test_failures_stop_the_run_or_are_counted(tmp_path, places) -> None:
    env = {"env": {**NUMBERS, "kwargs": {"fragile": True}}, "rewards": []}
    with pytest.raises(UserError, match=r"the environment failed in the episode of seed \d+"):
        run_command("ppo", tree_of(tmp_path / "stops", places, env))
    counted = merge_trees(env, {"env": {"errors": "count"}, "episodes_per_step": 16})
    run_command("ppo", tree_of(tmp_path / "goes", places, counted))
    rows = metrics_of(tmp_path / "goes")
    assert len(rows) == 2
    assert sum(row["rollout/failed"] for row in rows) > 0
    slow = {"env": {**NUMBERS, "kwargs": {"slow": True}, "timeout": 0.05}, "rewards": []}
    with pytest.raises(UserError, match=r"seed \d+: TimeoutError: took longer than 0.05 s"):
        run_command("ppo", tree_of(tmp_path / "slow", places, slow))


def test_checkpoints_are_written_as_often_as_asked(tmp_path, places, monkeypatch) -> None:
    saved = []
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda _, run, keep: saved.append(run.progress.step)
    )
    run_command("grpo", tree_of(tmp_path / "run", places, {"num_steps": 5, "save_every": 2}))
    assert saved == [2, 4, 5]


def test_parallel_is_the_number_of_environments(places) -> None:
    made = []
    for parallel in (2, 64):
        changes = {"rollout": {"parallel": parallel}}
        trainer = OnlineTrainer("ppo", configure("ppo", tree_of("unused", places, changes)))
        trainer.collector.collect(trainer.starts.take_episode_seeds(0, 8, 1))
        made.append(len(trainer.collector.envs))
        trainer.close()
    assert made == [2, 8]


def test_micro_batches_are_passes_of_the_model(places) -> None:
    passes = []
    for tokens in (1, 10_000):
        changes = {"micro_batch_tokens": tokens, "algorithm": {"num_minibatches": 1}}
        tree = tree_of("unused", places, merge_trees({"algorithm": {"num_epochs": 1}}, changes))
        trainer = OnlineTrainer("ppo", configure("ppo", tree))
        batch = collected_batch(trainer)
        seen = []
        score = trainer.policy.score
        trainer.policy.score = lambda *a, s=score, n=seen, **k: (n.append(1), s(*a, **k))[1]
        update.update_policy(trainer, batch, step=0)
        passes.append(len(seen))
        trainer.close()
    assert passes == [8, 1]


def test_the_template_has_the_options_that_were_asked_for(tmp_path, places) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ tone | default('') }}{% endif %}"
    )
    folder = tmp_path / "model"
    shutil.copytree(places["MODEL"], folder)
    (folder / "chat_template.jinja").write_text(template)
    options = {"chat_template_kwargs": {"tone": "Hm."}, "fold_system": True}
    changes = {"model": {"path": str(folder), **options}, "rollout": {"system": "Be kind."}}
    refused = tree_of("unused", places, merge_trees(changes, {"model": {"fold_system": False}}))
    config = configure("grpo", refused)
    with pytest.raises(UserError, match=r"no system role; remove .*fold_system"):
        OnlineTrainer("grpo", config)
    final = run_command("grpo", tree_of(tmp_path / "run", places, {**changes, "num_steps": 1}))
    for model in (changes["model"], {"path": str(final)}):  # saved with the model
        tree = tree_of("unused", places, {**changes, "model": model})
        trainer = OnlineTrainer("grpo", configure("grpo", tree))
        prompt = trainer.collector.chat_format.encode_prompt(
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say"}]
        )
        shown = trainer.policy.tokenizer.decode(prompt)
        trainer.close()
        assert shown == "<|user|>Be kind.\n\nSay<|end|><|assistant|>Hm."
