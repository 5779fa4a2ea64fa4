"""Held-out episodes and text: same seeds for all, intervals, nothing overwritten."""

from __future__ import annotations

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlhf.cli.table import configure, run_command
from rlhf.config.data import DataSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.errors import UserError
from rlhf.evaluation.episodes import (
    evaluation_episode_seeds,
    play_reference_episodes,
    scored_episode_rows,
    summarize_episodes,
    write_evaluation,
)
from rlhf.evaluation.runner import text_loss_metrics
from rlhf.evaluation.text import CompletionLosses, completion_losses
from rlhf.models.policy import Policy
from rlhf.reward_models.adapters import as_reward
from rlhf.reward_models.rules import length
from rlhf.rollout.batch import Rollout
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.environments.calls import make_env_factory
from rlhf.rollout.seeds import EVALUATION_BLOCK
from rlhf.training.scoring import score_rollouts
from tests.helpers.models import tiny_model
from tests.helpers.training import assistant, user

BANDIT = EnvSpec(id="text/PreferenceBandit-v0", kwargs={"instructions": False})


def test_reference_policies_are_near_their_known_values():
    make_env = make_env_factory(BANDIT)
    expert = play_reference_episodes("expert", make_env, evaluation_episode_seeds(50), rewards=[])
    assert all(row["return"] == 1.0 and row["success"] for row in expert)
    random = play_reference_episodes("random", make_env, evaluation_episode_seeds(400), rewards=[])
    summary = summarize_episodes(
        random, name="random", env="e", random_return=0.474, optimal_return=1.0
    )
    found = summary["metrics"]["return"]
    assert found["low"] - 0.02 < make_env().unwrapped.random_value() < found["high"] + 0.02
    assert summary["metrics"]["normalized"]["mean"] == pytest.approx(
        (found["mean"] - 0.474) / 0.526
    )
    seeds = [row["seed"] for row in random]
    assert seeds == [EVALUATION_BLOCK + i for i in range(400)]
    assert [row["seed"] for row in expert] == seeds[:50]


@pytest.mark.parametrize("task", ["GuessNumber", "KuhnPoker", "Recommend", "Triage"])
def test_the_random_policy_knows_nothing_of_what_the_environment_drew(task):
    make_env = make_env_factory(EnvSpec(id=f"text/{task}-v0"))
    rows = play_reference_episodes("random", make_env, evaluation_episode_seeds(1500), rewards=[])
    returns = [row["return"] for row in rows]
    error = np.std(returns) / len(returns) ** 0.5
    assert abs(np.mean(returns) - make_env().unwrapped.random_value()) < 4 * error


def test_rewards_score_reference_policies_like_models():
    """The rewards see the system message, earlier turns and the reference answer."""
    seen = []

    def record(conversations):
        seen.extend(conversations)
        return [float(c[-2].get("answer") == c[-1]["content"]) for c in conversations]

    starts, reward = evaluation_episode_seeds(1), as_reward(record)
    bandit = make_env_factory(EnvSpec(id="text/PreferenceBandit-v0"))
    play_reference_episodes("expert", bandit, starts, rewards=[reward])
    assert [message["role"] for message in seen[-1]] == ["system", "user", "assistant"]
    spec = RolloutSpec(system="Be brief.")
    play_reference_episodes("expert", bandit, starts, rewards=[reward], spec=spec)
    assert seen[-1][0] == {"role": "system", "content": "Be brief."}

    talk = [*user("a"), *assistant("b"), {"role": "user", "content": "c", "answer": "Yes."}]
    prompts = make_env_factory(EnvSpec(prompts=[DataSpec("unread")]), [talk])
    rows = play_reference_episodes("random", prompts, starts, rewards=[reward])
    assert seen[-1][:3] == talk
    assert rows[0]["components"]["record"] == float(rows[0]["messages"][-1]["content"] == "Yes.")

    (row,) = play_reference_episodes(
        "random", make_env_factory(EnvSpec(id="text/GuessNumber-v0")), starts, rewards=[]
    )
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system"] + ["user", "assistant"] * row["turns"]


def test_an_environment_without_an_expert_says_so():
    make_env = make_env_factory(EnvSpec(id="CartPole-v1"))
    with pytest.raises(UserError, match="has no expert policy"):
        play_reference_episodes("expert", make_env, evaluation_episode_seeds(2), rewards=[])


def test_an_evaluation_is_never_overwritten(tmp_path):
    def write(episodes: int) -> None:
        starts = evaluation_episode_seeds(episodes)
        rows = play_reference_episodes("expert", make_env_factory(BANDIT), starts, rewards=[])
        write_evaluation(tmp_path, rows, summarize_episodes(rows, name="expert", env="bandit"))

    write(2)
    with pytest.raises(UserError, match="never overwritten"):
        write(3)
    (folder,) = (tmp_path / "evaluation").iterdir()
    assert len((folder / "episodes.jsonl").read_text().splitlines()) == 2


def test_an_evaluation_closes_every_environment_that_it_makes(tmp_path, echo_model, monkeypatch):
    made, closed = [], []
    make = gym.make

    def counting(*arguments, **options):
        env = make(*arguments, **options)
        made.append(env)
        monkeypatch.setattr(env, "close", lambda: closed.append(env))
        return env

    monkeypatch.setattr(gym, "make", counting)
    tree = {
        "output_dir": str(tmp_path / "evaluation"),
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 2},
        "policies": [{"name": "random"}, {"name": "m", "model": {"path": str(echo_model)}}],
        "episodes": 3,
    }
    run_command("evaluate", tree)
    assert len(made) >= 5
    assert {id(env) for env in closed} == {id(env) for env in made}


def test_samples_of_the_random_policy_differ_and_have_no_tokens():
    starts = evaluation_episode_seeds(40, samples=3)
    rows = play_reference_episodes("random", make_env_factory(BANDIT), starts, rewards=[])
    assert [(row["seed"], row["sample"]) for row in rows[:4]] == [
        (EVALUATION_BLOCK, 0),
        (EVALUATION_BLOCK, 1),
        (EVALUATION_BLOCK, 2),
        (EVALUATION_BLOCK + 1, 0),
    ]
    said = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    assert any(said[3 * i] != said[3 * i + 1] for i in range(40))
    assert {row["tokens"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": [{"name": "../evil", "model": {"path": "m"}}]}, "is not a valid name"),
        ({"policies": [{"name": "a/b", "model": {"path": "m"}}]}, "is not a valid name"),
        ({"policies": [{"name": "pairs", "model": {"path": "m"}}]}, "'pairs' is reserved"),
        (
            {"policies": [{"name": "random"}], "env": None},
            "random has no key model and can only be evaluated on an environment",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, change, words):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "env": {"id": "text/Echo-v0"},
        "text": [{"path": "text.jsonl"}],
        "policies": [{"name": "qwen2.5", "model": {"path": "m"}}],
    }
    assert configure("evaluate", tree).policies[0].name == "qwen2.5"
    with pytest.raises(UserError, match=words):
        configure("evaluate", {**tree, **change})


def test_text_loss_is_the_cross_entropy_of_completions():
    model, tokenizer = tiny_model()
    policy = Policy(model, tokenizer)
    rows = [
        {"prompt": user("Which color is the sky?"), "completion": assistant("It is blue.")},
        {"prompt": user("Say a number."), "completion": assistant("7")},
    ]
    result = completion_losses(policy, rows, max_length=200)
    losses, counts, sizes = result.nats, result.tokens, result.bytes
    assert sizes == [len("It is blue."), 1]
    chat_format = ChatFormat(tokenizer)
    for row, loss, count in zip(rows, losses, counts, strict=True):
        prompt = chat_format.encode_prompt(row["prompt"])
        reply = tokenizer(row["completion"][0]["content"] + "<|end|>")["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="sum")
        assert count == len(reply)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    summary = text_loss_metrics(result)
    mean = sum(losses) / sum(counts)
    assert summary["text_loss"]["mean"] == pytest.approx(mean)
    assert summary["text_perplexity"]["mean"] == pytest.approx(math.exp(mean))
    bits = sum(losses) / math.log(2) / 12
    assert summary["text_bits_per_byte"]["mean"] == pytest.approx(bits)


def test_resume_measures_only_what_is_missing(tmp_path, echo_model):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 3},
        "episodes": 4,
        "policies": [{"name": "random"}, {"name": "mine", "model": {"path": str(echo_model)}}],
    }
    run_command("evaluate", tree)
    folder = tmp_path / "run" / "evaluation"
    marked = folder / "random" / "episodes.jsonl"
    marked.write_text(marked.read_text().replace('"cost": 0.0', '"cost": 9.0'))
    for path in (folder / "mine").iterdir():
        path.unlink()
    (folder / "mine").rmdir()
    (tmp_path / "run" / "finished").unlink()
    run_command("evaluate", tree | {"resume": True})
    rows = [
        json.loads(line)
        for line in (folder / "mine/episodes.jsonl").read_text().rstrip("\n").split("\n")
    ]
    assert [row["seed"] for row in rows] == [EVALUATION_BLOCK + i for i in range(4)]
    assert '"cost": 9.0' in marked.read_text()


def test_text_without_a_completion_token_is_refused():
    with pytest.raises(UserError, match="none of the 2 examples has a completion token"):
        text_loss_metrics(CompletionLosses([0.0, 0.0], [0, 0], [0, 0], truncated=2, emptied=2))


def test_a_perplexity_beyond_the_largest_float_is_unknown():
    losses = CompletionLosses([1000.0] * 6, [1] * 6, [1] * 6, truncated=0, emptied=0)
    assert text_loss_metrics(losses)["text_perplexity"]["mean"] is None
    assert text_loss_metrics(losses)["text_loss"]["mean"] == 1000


def test_copies_of_a_text_are_one_unit_of_a_loss():
    nats, tokens = [1.0, 2.0, 1.5, 3.0, 2.0], [2, 2, 2, 2, 2]
    once = text_loss_metrics(CompletionLosses(nats, tokens, tokens, 0, 0))
    thrice = CompletionLosses(nats * 3, tokens * 3, tokens * 3, 0, 0)
    copies = text_loss_metrics(thrice, list("abcde") * 3)
    for name in ("text_loss", "text_perplexity", "text_bits_per_byte"):
        assert copies[name]["n"] == once[name]["n"] == 5
        for key in ("mean", "low", "high"):
            assert copies[name][key] == pytest.approx(once[name][key])
    assert once["text_loss"]["mean"] == pytest.approx(9.5 / 10)


def test_the_interval_of_a_loss_is_not_negative():
    losses = CompletionLosses([0.01, 0.02, 0.03, 0.01, 3.0], [1] * 5, [1] * 5, 0, 0)
    metrics = text_loss_metrics(losses)
    assert metrics["text_loss"]["low"] == 0
    assert metrics["text_perplexity"]["low"] == 1
    assert metrics["text_bits_per_byte"]["low"] == 0


def test_the_score_is_what_the_weights_of_rewards_and_gold_make_of_their_components():
    starts = evaluation_episode_seeds(3)
    plain = length(high=3)
    collected = {
        "plain": ([plain], None),
        "weighted": ([plain * -2.0], None),
        "gold": ([plain], length(low=1) * -2.0 + 1.0),
    }
    rollouts = []
    for words in ("a", "a b c d e f", "a b c d"):
        rollout = Rollout(starts[0].seed, 0, 0, conversation=[*user("?"), *assistant(words)])
        rollout.append([0], turn=0, logprobs=[0.0])
        rollouts.append(rollout)
    rows = {
        name: [
            row["components"]
            for row in scored_episode_rows(
                rollouts,
                rewards,
                gold=gold,
                decoding="greedy",
                seconds_per_episode=0.0,
                counts=None,
            )
        ]
        for name, (rewards, gold) in collected.items()
    }
    assert [row["length"] for row in rows["plain"]] == pytest.approx([0.0, -1.0, -1 / 3])
    assert all(set(row) == {"length"} for row in rows["plain"])
    assert [row["score"] for row in rows["weighted"]] == pytest.approx([0.0, 2.0, 2 / 3])
    assert [row["gold"] for row in rows["gold"]] == [1.0] * 3


def test_rewards_score_the_last_reply_of_a_truncated_episode():
    rollout = Rollout(0, 0, 0, conversation=[*user("?"), *assistant("yes"), *user("turn 1")])
    rollout.append([0], turn=0, logprobs=[0.0])
    last = as_reward(
        lambda talks: [float(talk[-1]["content"] == "yes") for talk in talks], name="r"
    )
    (row,) = scored_episode_rows(
        [rollout], [last], decoding="greedy", seconds_per_episode=0.0, counts=None
    )
    assert row["components"] == {"r": 1.0}
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]
    score_rollouts([rollout], rewards=last, gold=None, env_weight=1.0)
    assert rollout.score == 1.0
