"""The online loop on a tiny model: each setting does what it says, each row trains."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import configure, run_command
from rlhf.errors import UserError
from rlhf.models.precision import MasterAdamW
from rlhf.training import optimize as update
from rlhf.training.online import OnlineTrainer
from rlhf.training.scoring import shaped_rewards
from rlhf.training.transcripts import token_texts
from tests.helpers.trainers import collected_batch
from tests.helpers.training import (
    metrics_of,
    online_tree,
    read_rows,
    same,
    sft_rows,
    weights_of,
    write_rows,
)


def trainer_for(place, command="ppo", **keys):
    keys = {"output_dir": "unused", **keys}
    return OnlineTrainer(command, configure(command, online_tree("unused", place, **keys)))


def snapshot(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def moved(before, module):
    return max((w - before[n]).abs().max().item() for n, w in module.named_parameters())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0, 0.25, 0.5, 0.75, 1, 1]), ("linear", [0, 0.25, 0.5, 0.75, 1, 0.75])],
)
def test_every_schedule_has_the_warm_up(echo_model, schedule, expected):
    """Learning rate of each update, of 8 in all, relative to its peak."""
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 4, "schedule": schedule}
    keys = {"num_steps": 8, "optimizer": optimizer}
    trainer = trainer_for(echo_model, algorithm={"num_epochs": 1, "num_minibatches": 1}, **keys)
    rates = []
    for _ in expected:
        rates.append(trainer.scheduler.get_last_lr()[0] / 1e-3)
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("command", sorted(ALGORITHMS))
def test_every_algorithm_trains_two_steps(tmp_path, echo_model, command):
    run_command(command, online_tree(tmp_path / "run", echo_model, num_steps=2))
    rows = [row for row in metrics_of(tmp_path / "run") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    final = tmp_path / "run/final"
    AutoModelForCausalLM.from_pretrained(final)
    AutoTokenizer.from_pretrained(final)
    assert (final / "value_head.safetensors").exists() == ALGORITHMS[command].needs_critic
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["episodes"] == 4
    assert summary["optimal"] == 1.0
    splits = [row["split"] for row in read_rows(tmp_path / "run/samples.jsonl")]
    assert [splits.count(name) for name in ("before", "train", "after")] == [16, 4, 16]


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_kept_tokens_are_those_of_the_step(tmp_path, echo_model, command):
    """Against the model that sampled them: the first step's policy is the start model itself."""
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, samples_per_step=3)
    run_command(command, tree)
    rows = [r for r in read_rows(tmp_path / "run/samples.jsonl") if r["split"] == "train"]
    model = AutoModelForCausalLM.from_pretrained(echo_model)
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    assert len(rows) == 3
    for row in rows:
        table = row["tokens"]
        assert ("value" in table) == (command == "ppo")
        reply = row["messages"][-1]["content"]
        assert "".join(table["text"]).startswith(reply)
        assert sum(table["reward"]) == pytest.approx(row["return_trained"], abs=1e-3)
        assert table["kl"] == pytest.approx([0.0] * len(table["kl"]), abs=1e-5)
        history = row["messages"][:-1]
        shown = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        share = logits.softmax(-1)
        assert table["entropy"][0] == pytest.approx(-(share * share.log()).sum().item(), rel=1e-3)
    if command == "grpo":  # one advantage for all tokens of a reply
        assert all(len(set(row["tokens"]["advantage"])) == 1 for row in rows)


def test_pieces_keep_characters_whole():
    alphabet = [bytes([value]) for value in range(256)]
    decode = lambda ids: b"".join(alphabet[i] for i in ids).decode("utf-8", errors="replace")  # noqa: E731
    ids = list("a é🙂b".encode())
    assert token_texts(ids, decode) == ["a", " ", "", "é", "", "", "", "🙂", "b"]
    assert "".join(token_texts(ids[:-2], decode)) == "a é\ufffd"


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_epochs_and_mini_batches_really_happen(echo_model, epochs, minibatches):
    algorithm = {"num_epochs": epochs, "num_minibatches": minibatches}
    trainer = trainer_for(echo_model, algorithm=algorithm)
    taken = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (taken.append(1), step())
    metrics = update.update_policy(trainer, collected_batch(trainer), step=0)
    assert len(taken) == metrics["train/updates"] == epochs * minibatches


def test_mini_batches_part_the_episodes_and_epochs_shuffle_anew(echo_model):
    trainer = trainer_for(echo_model)
    batch = collected_batch(trainer)
    rng = np.random.default_rng(0)
    orders = []
    for _ in range(2):
        parts = update.shuffle_into_mini_batches(batch, 4, rng)
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        orders.append([part.tolist() for part in parts])
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert orders[0] != orders[1]


def test_the_learning_rate_falls_to_zero_over_all_updates(tmp_path, echo_model):
    keys = {"algorithm": {"num_epochs": 2, "num_minibatches": 2}, "num_steps": 4}
    run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))
    rates = [row["train/learning_rate"] for row in metrics_of(tmp_path / "run")]
    assert rates == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0.0])


def test_gradients_are_clipped(echo_model):
    """Adam hides the size of a gradient in its step, so its first moments are looked at."""
    norms = {}
    for limit in (1e9, 1e-3):
        trainer = trainer_for(echo_model, optimizer={"max_grad_norm": limit})
        batch = collected_batch(trainer)
        step = trainer.optimizer.step

        def look(trainer=trainer, step=step, limit=limit):
            step()
            parts = trainer.optimizer.state_dict()["inner"]
            moments = [row["exp_avg"] for part in parts for row in part["state"].values()]
            norm = torch.cat([m.flatten() for m in moments]).norm().item()
            norms.setdefault(limit, norm / 0.1)  # after the first step: (1 - beta1) times it

        trainer.optimizer.step = look
        update.update_policy(trainer, batch, step=0)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e9] > 1e-2


@pytest.mark.parametrize("command", ["ppo", "grpo", "online_dpo"])
def test_micro_batches_do_not_change_the_update(echo_model, command):
    gradients = []
    for tokens in (1, 60, 10_000):
        trainer = trainer_for(echo_model, command, micro_batch_tokens=tokens)
        torch.manual_seed(0)
        if trainer.policy.value_head is not None:  # zero at the start, blind to the trunk
            torch.nn.init.normal_(trainer.policy.value_head.linear.weight)
        batch = collected_batch(trainer)
        rows = torch.arange(8)
        update.accumulate_gradients(trainer, batch, rows, critic_only=False)
        found = [p.grad for p in trainer.policy.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_warm_up_trains_the_critic_and_leaves_the_policy_alone(echo_model, critic):
    keys = {"critic": critic, "critic_warmup_steps": 1, "algorithm": {"num_epochs": 3}}
    trainer = trainer_for(echo_model, **keys, optimizer={"weight_decay": 0.1})
    policy, head = snapshot(trainer.policy.model), snapshot(trainer.policy.value_head)
    batch = collected_batch(trainer)
    update.update_policy(trainer, batch, step=0)
    assert moved(policy, trainer.policy.model) == 0.0
    assert moved(head, trainer.policy.value_head) > 1e-6
    update.update_policy(trainer, batch, step=1)
    assert moved(policy, trainer.policy.model) > 1e-6


def test_the_adaptive_coefficient_moves_as_in_the_paper(tmp_path, echo_model):
    """Ziegler et al. 2019: coef *= 1 + clip(kl / target - 1, -.2, .2) * episodes / horizon."""
    kl = {"controller": "adaptive", "target": 0.01, "horizon": 20}
    keys = {"kl": kl, "optimizer": {"learning_rate": 1e-2}}
    run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["kl/coef"] == 0.05
    assert rows[0]["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    for row, after in itertools.pairwise(rows):
        error = min(max(row["policy/kl"] / 0.01 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(row["kl/coef"] * (1 + error * 8 / 20))
    assert rows[1]["kl/coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 20))


def test_the_divergence_budget_ends_training_with_a_model(tmp_path, echo_model):
    keys = {
        "kl": {"controller": "budget", "target": 1e-4},
        "optimizer": {"learning_rate": 1e-2},
        "num_steps": 30,
    }
    final = run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))
    rows = metrics_of(tmp_path / "run")
    assert 2 <= len(rows) < 30
    assert rows[-1]["policy/kl"] > 1e-4
    assert (final / "model.safetensors").exists()


def rollouts_of(trainer):
    starts = trainer.starts.take_episode_seeds(0, 8, 1)
    return trainer.step_collector.collect_and_score(starts)


def shaped_returns(trainer, rollouts):
    """Returns after scaling and penalties; the scores and the environment's rewards stay."""
    before = [(list(r.env_rewards), list(r.rewards)) for r in rollouts]
    trainer.moments.update(torch.tensor([r.score for r in rollouts], dtype=torch.float64))
    rewards = shaped_rewards(rollouts, trainer.algorithm, trainer.config, trainer.moments)
    assert [(r.env_rewards, r.rewards) for r in rollouts] == before
    return np.array([sum(row) for row in rewards])


def test_penalties_change_the_rewards(echo_model):
    def scores(**shaping):
        trainer = trainer_for(echo_model, shaping=shaping)
        rollouts = rollouts_of(trainer)
        for index, rollout in enumerate(rollouts):
            rollout.stopped = index % 2 == 0
        return shaped_returns(trainer, rollouts), np.array([r.num_sampled_tokens for r in rollouts])

    plain, lengths = scores()
    cut = np.arange(8) % 2
    np.testing.assert_allclose(scores(missing_eos_penalty=0.7)[0], plain - 0.7 * cut, atol=1e-6)
    np.testing.assert_allclose(scores(length_penalty=0.1)[0], plain - 0.1 * lengths, atol=1e-6)


def paid(trainer, amounts):
    """Rollouts with these scores."""
    rollouts = rollouts_of(trainer)[: len(amounts)]
    for rollout, amount in zip(rollouts, amounts, strict=True):
        zeros = [0.0] * len(rollout.tokens)
        rollout.rewards = rollout.with_terminal_reward(zeros, amount)
    return rollouts


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        # mean 3, standard deviation 2 of the scores 1, 1, 5, 5
        ({"scale": "none"}, [1, 1, 5, 5]),
        ({"scale": "std"}, [0.5, 0.5, 2.5, 2.5]),
        ({"scale": "normalize"}, [-1, -1, 1, 1]),
        ({"scale": "std", "clip": 2.0}, [0.5, 0.5, 2.0, 2.0]),
        ({"scale": "normalize", "length_penalty": 1.0}, None),
    ],
)
def test_scores_are_scaled_by_their_running_moments(echo_model, shaping, expected):
    trainer = trainer_for(echo_model, shaping=shaping)
    rollouts = paid(trainer, [1.0, 1.0, 5.0, 5.0])
    returns = shaped_returns(trainer, rollouts)
    if expected is None:  # penalties are in units of the scaled score
        lengths = [r.num_sampled_tokens for r in rollouts]
        expected = [x - n for x, n in zip([-1, -1, 1, 1], lengths, strict=True)]
    assert returns == pytest.approx(expected, abs=1e-6)


def judge_some(conversations):
    """No score for every fourth conversation (this file as a user's module)."""
    return [None if i % 4 == 0 else 1.0 for i, _ in enumerate(conversations)]


JUDGE = [{"kind": "function", "path": "tests.training.test_online:judge_some"}]


def test_too_many_unscored_episodes_stop_the_run(tmp_path, echo_model):
    reason = (
        r"2 x judge_some: returned None \(test_online.py:\d+\) \(seed \d+\); correct the reward"
    )
    message = rf"25% of the episodes .* shaping\.max_unscored = 20%: {reason}"
    with pytest.raises(UserError, match=message):
        run_command("ppo", online_tree(tmp_path / "run", echo_model, rewards=JUDGE))


def judge_that_fails(conversations):
    """A fault in every text (this file as a user's module)."""
    return [len(conversations) / 0 for _ in conversations]


def test_the_run_says_why_episodes_have_no_score(tmp_path, echo_model):
    """The message names the line; below the limit, the metrics and transcripts name the reason."""
    line = judge_that_fails.__code__.co_firstlineno + 2
    path = "tests.training.test_online:judge_that_fails"
    message = "100% of the episodes .*: 8 x judge_that_fails: ZeroDivisionError: division by zero "
    with pytest.raises(UserError, match=message + rf"\(test_online.py:{line}\) \(seed \d+\); "):
        run_command(
            "ppo",
            online_tree(tmp_path / "a", echo_model, rewards=[{"kind": "function", "path": path}]),
        )
    home = tmp_path / "b"
    run_command("ppo", online_tree(home, echo_model, rewards=JUDGE, shaping={"max_unscored": 0.5}))
    rows = [
        json.loads(line) for line in (home / "metrics.jsonl").read_text().rstrip("\n").split("\n")
    ]
    shares = [row.get("rewards/unscored/judge_some/returned_none") for row in rows]
    assert 0.25 in shares
    samples = [
        json.loads(line) for line in (home / "samples.jsonl").read_text().rstrip("\n").split("\n")
    ]
    trained = [row for row in samples if row["split"] == "train"]
    reasons = {row.get("unscored") for row in trained}
    assert any(str(r).startswith("judge_some: returned None (test_online.py:") for r in reasons)


@pytest.mark.parametrize("command", ["ppo", "grpo", "reinforce++"])
def test_unscored_episodes_do_not_reach_the_gradient(echo_model, command):
    keys = {"rewards": JUDGE, "shaping": {"max_unscored": 0.5}}
    trainer = trainer_for(echo_model, command, **keys)
    batch = collected_batch(trainer)
    unscored = batch.rewards.isnan().any(1)
    assert unscored.tolist() == [True, False, False, False] * 2
    touched = torch.cat(update.shuffle_into_mini_batches(batch, 1, np.random.default_rng(0)))
    assert not unscored[touched].any()
    metrics = update.update_policy(trainer, batch, step=0)
    assert all(math.isfinite(value) for value in metrics.values())
    for weight in trainer.policy.parameters():
        assert weight.isfinite().all()


def test_an_environment_without_weight_is_measured_and_not_learned_from(tmp_path, echo_model):
    """A length reward trains; the environment's own score stays a component."""
    length = [{"kind": "function", "path": "tests.training.test_online:judge_all"}]
    env = {"id": "text/Echo-v0", "kwargs": {"num_words": 4}}
    runs = {}
    for name, weight in (("without", 0.0), ("with", 1.0)):
        tree = online_tree(tmp_path / name, echo_model, rewards=length, num_steps=1)
        run_command("ppo", tree | {"env": env | {"reward": weight}})
        runs[name] = metrics_of(tmp_path / name)[0]
    assert runs["without"]["reward/mean"] == pytest.approx(0.25)
    env_mean = runs["with"]["reward/env"]
    assert runs["without"]["reward/env"] == env_mean
    assert runs["with"]["reward/mean"] == pytest.approx(0.25 + env_mean)


def judge_all(conversations):
    """The same for everyone."""
    return [0.25 for _ in conversations]


def test_gold_is_measured_and_not_learned_from(tmp_path, echo_model):
    gold = [{"kind": "function", "path": "tests.training.test_online:judge_all", "name": "gold"}]
    run_command("ppo", online_tree(tmp_path / "plain", echo_model))
    run_command("ppo", online_tree(tmp_path / "gold", echo_model, gold=gold))
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "gold"))
    assert [row["reward/gold"] for row in metrics_of(tmp_path / "gold")] == [0.25] * 4


def test_gold_is_the_weighted_sum_of_its_rewards(tmp_path, echo_model):
    """Reports, alarms and `keep_best` find it, whatever the names of the rewards."""
    function = {"kind": "function", "path": "tests.training.test_online:judge_all"}
    gold = [function, {**function, "name": "again", "weight": -3.0}]
    keys = {"gold": gold, "num_steps": 1, "evaluation": {"episodes": 4, "every": 1}}
    run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))
    row = metrics_of(tmp_path / "run")[0]
    assert [row["reward/judge_all"], row["reward/gold"], row["eval/gold"]] == [0.25, -0.5, -0.5]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"rewards": [{"kind": "length", "name": "mean"}]}, "mean"),
        ({"rewards": [{"kind": "length", "name": "env"}]}, "env"),
        ({"rewards": [{"kind": "length", "name": "return"}]}, "return"),
        ({"rewards": [{"kind": "length", "name": "cost"}]}, "cost"),
        ({"rewards": [{"kind": "length", "name": "score", "weight": 2.0}]}, "score"),
        ({"rewards": [{"kind": "length"}], "gold": [{"kind": "length", "low": 5}]}, "length"),
        ({"rewards": [{"kind": "length", "name": "gold"}]}, "gold"),
        (
            {"rewards": [{"kind": "length", "name": "gold"}], "gold": [{"kind": "repetition"}]},
            "gold",
        ),
    ],
)
def test_a_reward_with_the_name_of_another_metric_is_refused(tmp_path, echo_model, keys, name):
    with pytest.raises(UserError, match=f"named '{name}'"):
        run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))


@pytest.mark.parametrize("command", ["grpo", "rloo"])
def test_groups_must_divide_the_batch(tmp_path, echo_model, command):
    tree = online_tree(tmp_path / "run", echo_model, episodes_per_step=10)
    with pytest.raises(UserError, match=r"multiple of algorithm\.group_size, got 10 and [48]"):
        run_command(command, tree)


def test_a_group_shares_its_start_state_and_not_its_replies(echo_model):
    trainer = trainer_for(echo_model, "rloo", episodes_per_step=8)
    rollouts = trainer.step_collector.collect(0).rollouts
    groups = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_index, []).append(rollout)
    assert [len(members) for members in groups.values()] == [4, 4]
    for members in groups.values():
        assert len({r.conversation[-2]["content"] for r in members}) == 1
        assert len({tuple(r.tokens) for r in members}) > 1


def test_training_and_evaluation_seeds_never_meet(echo_model, tmp_path):
    run_command("ppo", online_tree(tmp_path / "run", echo_model, num_steps=2))
    for row in read_rows(tmp_path / "run/samples.jsonl"):
        assert (row["seed"] < 2**30) == (row["split"] == "train")
    for row in read_rows(tmp_path / "run/evaluation/run/episodes.jsonl"):
        assert row["seed"] >= 2**30


def test_a_lora_policy_leaves_an_adapter_that_loads(tmp_path, echo_model):
    model = {"path": str(echo_model), "lora": {"rank": 4}}
    keys = {"model": model, "optimizer": {"learning_rate": 1e-2}}
    final = run_command("ppo", online_tree(tmp_path / "run", echo_model, **keys))
    from rlhf.models.loading import load_causal_model

    assert (final / "adapter_config.json").exists()
    merged, start = load_causal_model(str(final)), load_causal_model(str(echo_model))
    gap = merged.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight
    assert gap.abs().max() > 1e-4
    assert metrics_of(tmp_path / "run")[0]["policy/kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_diverging_run_stops_before_the_step_with_advice(tmp_path, echo_model, monkeypatch):
    """The gradient of the third mini-batch of the first step is not finite."""
    norms = iter([1.0, 1.0, math.nan])
    steps = []
    monkeypatch.setattr(MasterAdamW, "clip_at_next_step", lambda *_: next(norms))
    monkeypatch.setattr(MasterAdamW, "step", lambda *_: steps.append(1))
    tree = online_tree(tmp_path / "run", echo_model, algorithm={"num_minibatches": 4})
    with pytest.raises(UserError, match=r"diverged in step 1: the gradient is not finite; lower"):
        run_command("ppo", tree)
    assert len(steps) == 2


def test_prompt_sets_are_split_and_scored_by_the_rewards(tmp_path, echo_model):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": r["prompt"]} for r in sft_rows(20)])
    env = {"prompts": [{"path": str(prompts)}]}
    reward = [{"kind": "function", "path": "tests.training.test_online:judge_all"}]
    tree = online_tree(tmp_path / "run", echo_model, env=env, rewards=reward, num_steps=2)
    run_command("ppo", tree)
    rows = read_rows(tmp_path / "run/samples.jsonl")
    asked = {
        split: {row["messages"][0]["content"] for row in rows if row["split"] == split}
        for split in ("before", "train", "after")
    }
    assert asked["before"] == asked["after"]
    assert asked["train"].isdisjoint(asked["before"])


def test_the_answer_column_of_a_prompt_set_reaches_the_reward(tmp_path, echo_model):
    rows = [{"question": f"Repeat: {i}", "answer": f"so\n#### {i}"} for i in range(20)]
    env = {"prompts": [{"path": str(write_rows(tmp_path / "p.jsonl", rows))}]}
    reward = [{"kind": "function", "path": "tests.training.test_online:answer_of"}]
    tree = online_tree(tmp_path / "run", echo_model, env=env, rewards=reward, num_steps=1)
    run_command("ppo", tree)
    for row in read_rows(tmp_path / "run/samples.jsonl"):
        opening = row["messages"][0]
        assert opening["content"] == f"Repeat: {opening['answer']}"


def answer_of(conversations):
    """The number that travels on the first message; KeyError where it was lost."""
    return [float(conversation[0]["answer"]) for conversation in conversations]
