"""Runs in which one thing prevents learning raise the alarm that states it, and no wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch

from rlhf.cli.table import run_command
from rlhf.config.load import merge_trees
from rlhf.models.policy import Policy
from tests.helpers.training import first_alarm_steps, online_tree

HERE = "tests.training.test_planted_runs"
Conversations = Sequence[Sequence[dict[str, Any]]]


def constant(conversations: Conversations) -> list[float]:
    """The same score for every reply."""
    return [1.0 for _ in conversations]


def by_prompt(conversations: Conversations) -> list[float]:
    """A score that depends on the prompt alone."""
    return [sum(talk[-2]["content"].encode()) % 7 / 7 for talk in conversations]


def hundreds(conversations: Conversations) -> list[float]:
    """A score that differs between replies, on a scale of hundreds."""
    return [float(sum(talk[-1]["content"].encode()) % 11 * 100) for talk in conversations]


def units(conversations: Conversations) -> list[float]:
    """A score that differs between replies, between 0 and 1."""
    return [sum(talk[-1]["content"].encode()) % 7 / 7 for talk in conversations]


def sometimes_missing(conversations: Conversations) -> list[float | None]:
    """Every eighth reply has no score."""
    return [None if i % 8 == 0 else units([talk])[0] for i, talk in enumerate(conversations)]


class OneTurn(gym.Env):
    """One turn; reports whether the reply solves the task, which is fixed."""

    observation_space = gym.spaces.Text(99)
    action_space = gym.spaces.Text(99)

    def __init__(self, solved: bool) -> None:
        self.solved = solved

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict]:
        super().reset(seed=seed)
        return "Repeat: apple", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        reward = self.solved * (0.5 + sum(action.encode()) % 7 / 14)
        return "", reward, True, False, {"is_success": self.solved}


def rewards(*names: str) -> dict[str, Any]:
    return {"rewards": [{"kind": "function", "path": f"{HERE}:{name}"} for name in names]}


def constant_values(patch: pytest.MonkeyPatch) -> None:
    """The critic returns 0 for every state."""
    score = Policy.score

    def dead(self: Policy, *args: Any, **kwargs: Any) -> Any:
        scored = score(self, *args, **kwargs)
        if scored.values is not None:
            with torch.no_grad():
                scored.values.zero_()
        return scored

    patch.setattr(Policy, "score", dead)


class Planted(NamedTuple):
    """A run with a fault."""

    alarm: str
    command: str
    keys: dict[str, Any]
    steps: int = 12
    also: frozenset[str] = frozenset()
    """Other alarms that state consequences of the fault."""


NO_ENV_REWARD = {"env": {"reward": 0.0}}
GROUPS = {"algorithm": {"group_size": 4}}
PLANTED = {
    "constant reward": Planted("constant_reward", "ppo", NO_ENV_REWARD | rewards("constant")),
    "constant reward of groups": Planted(
        "constant_reward",
        "grpo",
        NO_ENV_REWARD | GROUPS | rewards("constant"),
        also=frozenset(["not_moved"]),
    ),
    "reward of the prompt": Planted(
        "equal_groups",
        "grpo",
        NO_ENV_REWARD | GROUPS | rewards("by_prompt"),
        also=frozenset(["not_moved"]),
    ),
    "dominating component": Planted(
        "dominant_reward", "ppo", NO_ENV_REWARD | rewards("hundreds", "units")
    ),
    "saturated task": Planted(
        "saturated",
        "ppo",
        {"env": {"id": f"{HERE}:OneTurn", "kwargs": {"solved": True}}, "rewards": []},
    ),
    "unsolvable task": Planted(
        "unsolved",
        "ppo",
        {
            "env": {"id": f"{HERE}:OneTurn", "kwargs": {"solved": False}},
            "rewards": [],
        },
        steps=20,
        also=frozenset(["constant_reward", "not_moved"]),
    ),
    "dead critic": Planted("dead_critic", "ppo", {}, steps=22, also=frozenset(["unsolved"])),
    "frozen policy": Planted("not_moved", "ppo", {"optimizer": {"learning_rate": 1e-30}}),
    "every reply cut": Planted("length_limited", "ppo", {"rollout": {"max_new_tokens": 1}}),
    "every ratio clipped": Planted(
        "clipped",
        "ppo",
        {"algorithm": {"clip_low": 1e-6, "clip_high": 1e-6, "num_epochs": 24}},
    ),
    "missing scores": Planted("unscored", "ppo", rewards("sometimes_missing")),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_right_alarm_is_raised(
    fault: str, tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = PLANTED[fault]
    if fault == "dead critic":
        constant_values(monkeypatch)
    keys = {"num_steps": planted.steps, "save_every": 5, **rewards("units")}
    echo = {"env": {"id": "text/Echo-v0"}}
    tree = merge_trees(online_tree(tmp_path / "run", echo_model) | echo | keys, planted.keys)
    run_command(planted.command, tree)
    found = set(first_alarm_steps(tmp_path / "run"))
    assert planted.alarm in found
    assert found <= {planted.alarm, *planted.also} | UNTRAINED


UNTRAINED = frozenset(["length_limited", "missing_eos", "truncated", "invalid", "evasion"])
"""Alarms that an untrained model can raise in any run."""
