"""Training and evaluation items have different content in tasks with splits."""

import itertools
import json

import gymnasium as gym
import numpy as np
import pytest

from rlhf import envs
from rlhf.envs.adversary import successful_adversaries
from rlhf.envs.catalog import catalog
from rlhf.envs.core import TextEnv
from rlhf.envs.demonstrations import write_demonstrations
from rlhf.envs.exact import exact_value
from rlhf.envs.items import (
    draws_only_items_of_split,
    has_separate_splits,
    kwargs_for_split,
    split_items,
    split_of_text,
)
from rlhf.envs.wrappers import FewShot, InvalidActions

OWN = ["KeyDoor", "KnowledgeGraph", "ProgramSynthesis"]


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_content_and_lose_no_item(seed):
    rng = np.random.default_rng(seed)
    items = [(int(n), i) for i, n in enumerate(rng.integers(40, size=200))]
    parts = {s: split_items(items, s, lambda item: item[0]) for s in ("all", "train", "test")}
    assert parts["all"] == items
    assert sorted(parts["train"] + parts["test"]) == sorted(items)
    assert not {n for n, _ in parts["train"]} & {n for n, _ in parts["test"]}
    contents = len({n for n, _ in items})
    assert len({n for n, _ in parts["test"]}) == round(0.2 * contents)
    shuffled = [items[i] for i in rng.permutation(len(items))]
    again = split_items(shuffled, "test", lambda item: item[0])
    assert sorted(again) == sorted(parts["test"])


def test_two_items_give_one_to_each_side_and_one_cannot_be_split():
    assert sorted(split_items("ab", "train") + split_items("ab", "test")) == ["a", "b"]
    with pytest.raises(ValueError, match="two different items"):
        split_items("aaa", "train")


def test_split_of_text_ignores_case_and_white_space():
    questions = [f"What is {n} + 1?" for n in range(400)]
    sides = [split_of_text(q) for q in questions]
    assert sides == [split_of_text(f"  {q.upper()}\n") for q in questions]
    assert 150 < sides.count("test") < 250


@pytest.mark.parametrize("name", OWN)
def test_splits_have_disjoint_first_observations(name):
    def openings(split, count):
        env = gym.make(f"text/{name}-v0", split=split)
        return {env.reset(seed=seed)[0] for seed in range(count)}

    train, test = openings("train", 1500), openings("test", 1500)
    assert len(train) > 60
    assert len(test) > 10
    assert not train & test
    assert openings("all", 200) & train
    assert openings("all", 200) & test


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("KeyDoor", {"size": 3, "split": "test"}),
        ("KnowledgeGraph", {"hops": 1, "split": "train"}),
        ("KnowledgeGraph", {"hops": 2, "split": "test"}),
    ],
)
def test_values_of_a_split_by_exact_solution(name, kwargs):
    env = gym.make(f"text/{name}-v0", **kwargs).unwrapped
    assert exact_value(env) == pytest.approx(env.optimal_value(), abs=1e-8)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("split", ["train", "test"])
def test_stated_values_of_a_split_match_simulation(name, split):
    env = gym.make(f"text/{name}-v0", split=split).unwrapped
    rng = np.random.default_rng(0)
    for act, stated in (
        (lambda: env.expert(), env.optimal_value()),
        (lambda: env.sample_action(rng), env.random_value()),
    ):
        returns = []
        for seed in range(500):
            env.reset(seed=seed)
            total, done = 0.0, False
            while not done:
                _, reward, done, _, _ = env.step(act())
                total += reward
            returns.append(total)
        error = max(np.std(returns) / len(returns) ** 0.5, 1e-9)
        assert abs(np.mean(returns) - stated) < 4 * error


def test_catalog_describes_the_items_of_every_task():
    rows = {row["id"]: row for row in catalog(compute_values=False)}
    assert len(rows) == len(envs.TASKS) + len(envs.EXTRAS)
    for env_id, row in rows.items():
        assert row["items"] != TextEnv.items, env_id
        assert row["items"].endswith("."), env_id
        assert row["separable"] == has_separate_splits(env_id)
        if row["separable"]:
            assert "do not occur in training" in row["items"]
    apart = {env_id for env_id, row in rows.items() if row["separable"]}
    assert apart == {f"text/{n}-v0" for n in (*OWN, "ReasoningGym", "TextWorld")}


def test_split_kwargs_keep_the_users_split():
    assert kwargs_for_split("text/KeyDoor-v0", {"size": 3}, "train") == {
        "size": 3,
        "split": "train",
    }
    assert kwargs_for_split("text/KeyDoor-v0", {"split": "train"}, "test") == {"split": "test"}
    assert kwargs_for_split("text/KeyDoor-v0", {"split": "all"}, "test") == {"split": "all"}
    assert kwargs_for_split("text/KeyDoor-v0", {"split": "test"}, "train") == {"split": "test"}
    assert kwargs_for_split("text/Echo-v0", {"num_words": 3}, "test") == {"num_words": 3}
    assert kwargs_for_split("nowhere:Nothing-v0", {}, "test") == {}


def test_demonstrations_use_training_items(tmp_path):
    write_demonstrations("text/KeyDoor-v0", tmp_path / "demos.jsonl", count=300, size=3)
    rows = [json.loads(line) for line in (tmp_path / "demos.jsonl").read_text().splitlines()]
    shown = {row["messages"][1]["content"] for row in rows}
    env = gym.make("text/KeyDoor-v0", size=3, split="test")
    assert not shown & {env.reset(seed=seed)[0] for seed in range(300)}


def test_few_shot_examples_use_training_items():
    env = FewShot(gym.make("text/KnowledgeGraph-v0", hops=6, split="test"), count=8)
    goals = {f"Your goal: {goal}. You are at {start}." for start, goal in env.unwrapped.pairs}
    assert not [goal for goal in goals if goal in env.examples]


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [
        ("CliffWalking", {"max_turns": 15}),
        ("Taxi", {"max_turns": 10}),
        ("FrozenLake", {"max_turns": 20}),
        ("TicTacToe", {}),
    ],
)
def test_ending_early_by_an_invalid_action_is_not_an_advantage(task, kwargs):
    assert (
        successful_adversaries(InvalidActions(gym.make(f"text/{task}-v0", **kwargs), end=True))
        == []
    )


def test_ending_early_costs_the_remaining_turns():
    env = InvalidActions(gym.make("text/CliffWalking-v0", max_turns=9), penalty=0.5, end=True)
    env.reset(seed=0)
    env.step("up")
    _, reward, done, _, _ = env.step("out")
    assert (reward, done) == (-8.5, True)
    lake = InvalidActions(gym.make("text/FrozenLake-v0"), end=True)
    lake.reset(seed=0)
    assert lake.step("out")[1:3] == (0.0, True)


def test_docs_explain_tasks_without_splits():
    """These tasks have few first observations, or the item is not visible in them."""
    for name in set(envs.TASKS) - {f"{n}-v0" for n in OWN} - {"Prompts-v0"}:
        env = gym.make(f"text/{name}").unwrapped
        openings = {env.reset(seed=seed)[0] for seed in range(2000)}
        assert len(openings) <= 300, name
        description = env.items
        words = ("training", "alike", "anew")
        assert any(word in description for word in words), name


def test_training_and_evaluation_seeds_draw_different_items():
    """With the seeds that runs use by default."""
    from rlhf.config.rollout import EnvSpec
    from rlhf.rollout.environments.calls import make_env_factory
    from rlhf.rollout.seeds import evaluation_seed, training_seed

    for name, run in itertools.product(OWN, (0, 7)):
        spec = EnvSpec(id=f"text/{name}-v0")
        train, test = (make_env_factory(spec, split=split)() for split in ("train", "test"))
        trained = {train.reset(seed=training_seed(run, n))[0] for n in range(600)}
        assert not trained & {test.reset(seed=evaluation_seed(n))[0] for n in range(128)}


@pytest.mark.parametrize("env_id", ["text/KnowledgeGraph", "rlhf.envs:text/KnowledgeGraph"])
def test_an_id_without_a_version_has_splits_too(env_id):
    """gymnasium makes the latest version, so training and evaluation must not share pairs."""
    assert has_separate_splits(env_id)
    pairs = {}
    for split in ("train", "test"):
        with pytest.warns(UserWarning, match="latest versioned"):
            env = gym.make(env_id, **kwargs_for_split(env_id, {}, split))
        pairs[split] = set(env.unwrapped.pairs)
    assert not pairs["train"] & pairs["test"]
    assert not has_separate_splits("text/Nowhere")


@pytest.mark.parametrize(
    ("kwargs", "training", "evaluation"),
    [
        ({}, True, True),
        ({"split": "train"}, True, True),
        ({"split": "test"}, False, True),
        ({"split": "all"}, False, False),
    ],
)
def test_a_split_of_the_user_can_join_the_items(kwargs, training, evaluation):
    name = "text/KeyDoor-v0"
    assert draws_only_items_of_split(name, kwargs, "train") is training
    assert draws_only_items_of_split(name, kwargs, "test") is evaluation
    assert not draws_only_items_of_split("text/Echo-v0", kwargs, "test")
