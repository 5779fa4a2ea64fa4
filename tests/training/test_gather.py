"""What a step samples: groups that tell something, failures, penalties, and steps without any."""

import json
import logging
from typing import ClassVar

import gymnasium as gym
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.cli.table import configure, run_command
from rlhf.envs.core import TextEnv
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout
from rlhf.training.collection import MAX_ROUNDS
from rlhf.training.online import OnlineTrainer
from rlhf.training.rollouts.metrics import rollout_metrics
from tests.helpers.training import metrics_of, online_tree, read_rows

WHERE = "tests.training.test_gather"
GROUPS = {"algorithm": {"group_size": 4}}


class Moody(TextEnv):
    """Pays by what is left of a counter, and fails where it is told to (this file as a module)."""

    pays: ClassVar[list[float]] = []
    fails: ClassVar[set[int]] = set()
    calls: ClassVar[list[int]] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.opening("Repeat: apple")

    def step(self, action):
        place = len(self.calls)
        self.calls.append(place)
        if place in self.fails:
            raise RuntimeError("moody")
        return self.turn("", self.pays[place % len(self.pays)], True)


gym.register("moody/Moody-v0", entry_point=Moody)


def trainer_of(place, pays, fails=(), command="dapo", **keys):
    """A trainer of 8 episodes a step in groups of 4; episode n earns ``pays[n % len(pays)]``."""
    Moody.pays, Moody.fails = list(pays), set(fails)
    Moody.calls.clear()
    env = {"id": "moody/Moody-v0", "errors": "count", "concurrency": "lockstep"}
    tree = online_tree("unused", place, **({"env": env, "rewards": []} | GROUPS | keys))
    return OnlineTrainer(command, configure(command, tree))


def round_counts(metrics):
    """The metrics of the rounds of a step, without those of its scores."""
    names = ("rollout/failed", "rollout/rounds", "rollout/groups_dropped")
    return {name: metrics[name] for name in names}


def test_a_failed_episode_does_not_end_a_dapo_run(echo_model):
    """Its group is informative all the same: seven episodes of two groups are a batch."""
    trainer = trainer_of(echo_model, [0.0, 1.0], fails={2})
    found = trainer.step_collector.collect(0)
    assert len(found.rollouts) == 7
    assert len({rollout.group_index for rollout in found.rollouts}) == 2
    assert round_counts(found.metrics) == {
        "rollout/failed": 1.0,
        "rollout/rounds": 1.0,
        "rollout/groups_dropped": 0.0,
    }
    assert not found.skip


def test_a_group_that_fails_as_a_whole_is_replaced(echo_model):
    trainer = trainer_of(echo_model, [0.0, 1.0], fails={0, 1, 2, 3})
    found = trainer.step_collector.collect(0)
    assert [rollout.group_index for rollout in found.rollouts] == [1] * 4 + [2] * 4
    assert round_counts(found.metrics) == {
        "rollout/failed": 4.0,
        "rollout/rounds": 2.0,
        "rollout/groups_dropped": 1.0,
    }


def test_uniform_groups_are_replaced_and_counted(echo_model):
    """Groups 0 and 1 pay alike, later ones do not."""
    trainer = trainer_of(echo_model, [1.0] * 8 + [0.0, 1.0] * 4)
    found = trainer.step_collector.collect(0)
    assert {rollout.group_index for rollout in found.rollouts} == {2, 3}
    assert round_counts(found.metrics) == {
        "rollout/failed": 0.0,
        "rollout/rounds": 2.0,
        "rollout/groups_dropped": 2.0,
    }


def test_a_share_of_a_batch_is_trained_on(echo_model):
    """Every second group is uniform: rounds of 2, 1, 1, ... groups; the limit is not reached."""
    trainer = trainer_of(echo_model, [1.0] * 4 + [0.0, 1.0, 0.0, 1.0])
    found = trainer.step_collector.collect(0)
    assert {rollout.group_index for rollout in found.rollouts} == {1, 3}
    assert found.metrics["rollout/groups_dropped"] == 2.0


def test_a_step_without_an_informative_group_learns_nothing(tmp_path, echo_model, caplog):
    Moody.pays, Moody.fails = [1.0], set()
    Moody.calls.clear()
    env = {"id": "moody/Moody-v0"}
    tree = online_tree(tmp_path / "run", echo_model, env=env, rewards=[], num_steps=2, **GROUPS)
    with caplog.at_level(logging.WARNING):
        run_command("dapo", tree)
    rows = [row for row in metrics_of(tmp_path / "run") if row["step"]]
    assert [row["train/skipped"] for row in rows] == [1.0, 1.0]
    assert [row["train/updates"] for row in rows] == [0.0, 0.0]
    assert [row["rollout/rounds"] for row in rows] == [float(MAX_ROUNDS)] * 2
    assert [row["rollout/groups_dropped"] for row in rows] == [2.0 * MAX_ROUNDS] * 2
    assert "within each of the 8 groups that were sampled in 4 rounds" in caplog.text
    before, after = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (echo_model, tmp_path / "run/final")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_whose_episodes_all_fail_says_so(echo_model):
    with pytest.raises(UserError, match="the environment failed in every episode"):
        trainer_of(echo_model, [0.0, 1.0], fails=range(100)).step_collector.collect(0)
    with pytest.raises(UserError, match="the environment failed in every episode"):
        trainer_of(echo_model, [0.0, 1.0], fails=range(100), command="grpo").step_collector.collect(
            0
        )


def test_groups_are_judged_before_the_penalty_of_length(echo_model):
    """All scores are equal and the penalties are not: the paper filters on accuracy."""
    keys = {
        "algorithm": {"group_size": 4, "overlong_fraction": 1.0},
        "rollout": {"max_new_tokens": 30},
    }
    trainer = trainer_of(echo_model, [1.0], **keys)
    found = trainer.step_collector.collect(0)
    shaped = torch.tensor(found.returns)
    assert len(shaped.unique()) > 1
    assert found.skip


def test_unscored_episodes_are_counted_over_the_whole_step(echo_model):
    """Two of the four episodes of the second round: 2 of 12, not 2 of 4."""
    rewards = [{"kind": "function", "path": f"{WHERE}:judge_by_turn"}]
    judge_by_turn.scores = [1, 1, 1, 1, 0, 1, 0, 1, None, None, 0, 1]  # type: ignore[attr-defined]
    trainer = trainer_of(echo_model, [0.0], rewards=rewards)
    found = trainer.step_collector.collect(0)
    assert len(found.rollouts) == 8
    assert round_counts(found.metrics) == {
        "rollout/failed": 0.0,
        "rollout/rounds": 2.0,
        "rollout/groups_dropped": 1.0,
    }


def judge_by_turn(conversations):
    """The next scores of a list."""
    scores = judge_by_turn.scores  # type: ignore[attr-defined]
    mine, judge_by_turn.scores = (  # type: ignore[attr-defined]
        scores[: len(conversations)],
        scores[len(conversations) :],
    )
    return mine


class Talk(TextEnv):
    """Three turns, each of which pays 0 or 1."""

    max_turns = 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        return self.opening("Repeat: apple")

    def step(self, action):
        self.left -= 1
        return self.turn("Repeat: river", float(len(action) % 2), self.left == 0)


gym.register("moody/Talk-v0", entry_point=Talk)


@pytest.mark.parametrize(
    ("env", "rollout", "limit"),
    [
        ("text/Echo-v0", {"max_new_tokens": 3}, 3),
        ("moody/Talk-v0", {"max_new_tokens": 3}, 9),
        ("moody/Talk-v0", {"max_new_tokens": 3, "max_tokens": 20}, 9),
        ("moody/Talk-v0", {"max_new_tokens": 9, "max_tokens": 20}, 20),
    ],
)
def test_the_constant_length_is_that_of_an_episode(echo_model, env, rollout, limit):
    """Dr. GRPO divides by the most tokens that a response can have (Liu et al. 2025, 3.2)."""
    tree = online_tree("unused", echo_model, env={"id": env}, rewards=[], rollout=rollout)
    trainer = OnlineTrainer("dr_grpo", configure("dr_grpo", tree))
    assert trainer.collector.max_sampled_tokens_per_episode() == limit


def test_held_out_episodes_report_what_they_share_with_training(tmp_path, echo_model):
    """Echo has four words, all of them trained on; maps of KeyDoor are kept apart."""
    run_command("ppo", online_tree(tmp_path / "run", echo_model, num_steps=2))
    items = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())["items"]
    trained = {
        r["messages"][1]["content"]
        for r in read_rows(tmp_path / "run/samples.jsonl")
        if r["split"] == "train"
    }
    assert items["episodes"] == 4
    assert items["seen_in_training"] >= sum(
        row["messages"][0]["content"] in trained
        for row in read_rows(tmp_path / "run/evaluation/run/episodes.jsonl")
    )
    assert items["separate"] is False
    assert "Words from a fixed list" in items["note"]


def test_evasion_is_measured():
    """By hand: two of four episodes evade, at -1 and 0; the others earn -3 and -5."""
    rollouts = []
    evasions = [(1, False), (0, True), (0, False), (0, False)]
    returns = [-1.0, 0.0, -3.0, -5.0]
    for invalid, truncated in evasions:
        rollout = Rollout(0, 0, 0, invalid=invalid, truncated=truncated)
        rollout.append([1], turn=0, logprobs=[0.0])
        rollouts.append(rollout)
    metrics = rollout_metrics(rollouts, returns)
    assert metrics["rollout/evasion_gain"] == pytest.approx(3.5)
    assert metrics["rollout/truncated"] == 0.25
    assert "rollout/evasion_gain" not in rollout_metrics(rollouts[2:], returns[2:])
