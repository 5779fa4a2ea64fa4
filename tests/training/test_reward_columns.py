"""Runs whose rewards read columns of the prompts: training, evaluation, resumption, Python."""

import json
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

import rlhf
from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.evaluation.metrics import start_entry_id
from rlhf.reward_models.pairs import Pair, data_card
from rlhf.training.online import OnlineTrainer
from tests.helpers.training import PROMPTS, assert_same_run, online_tree, read_rows, write_rows

LEVELS = {prompt: level for level, prompt in enumerate(PROMPTS, start=1)}
ROWS = [{"prompt": prompt, "level": {"value": level}} for prompt, level in LEVELS.items()]


def level(conversations):
    """The reward is the column of the prompt alone: 1 to 4."""
    return [float(talk[-2]["level"]["value"]) for talk in conversations]


def prompt_tree(folder: Path, place: Path, columns=("level",), **keys):
    """A run of four steps whose reward reads a column of the prompts."""
    rows = write_rows(folder.parent / "prompts.jsonl", ROWS)
    source = {"path": str(rows), "reward_columns": list(columns)}
    reward = {"kind": "function", "path": "tests.training.test_reward_columns:level"}
    return online_tree(folder, place, **{"env": {"prompts": [source]}, "rewards": [reward], **keys})


def test_a_reward_reads_the_column_of_every_episode(tmp_path, echo_model):
    run_command("grpo", prompt_tree(tmp_path / "run", echo_model, algorithm={"group_size": 2}))
    samples = read_rows(tmp_path / "run/samples.jsonl")
    assert samples
    for sample in samples:
        assert sample["rewards"]["level"] == LEVELS[sample["messages"][-2]["content"]]


def test_a_template_never_sees_the_column(tmp_path, echo_model, monkeypatch):
    calls = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def spy(tokenizer, conversation, *args, **options):
        calls.extend(conversation)
        return apply(tokenizer, conversation, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spy)
    run_command("ppo", prompt_tree(tmp_path / "run", echo_model, num_steps=1))
    assert any("Repeat" in str(turn["content"]) for turn in calls)
    assert not any("level" in turn for turn in calls)


def test_a_run_without_the_columns_has_the_same_prompts_and_tokens(tmp_path, echo_model):
    judge = [{"kind": "function", "path": "tests.helpers.training:judge"}]
    for name, columns in (("with", ["level"]), ("without", [])):
        tree = prompt_tree(tmp_path / name, echo_model, columns, rewards=judge)
        run_command("rloo", tree)
    found = [
        [
            (sample["step"], sample["seed"], [turn["content"] for turn in sample["messages"]])
            for sample in read_rows(tmp_path / name / "samples.jsonl")
        ]
        for name in ("with", "without")
    ]
    assert found[0] == found[1]


def test_columns_do_not_change_the_ids_of_prompts_and_pairs():
    turns = [
        {"role": "user", "content": "a", "answer": "1"},
        {"role": "tool", "content": "b", "name": "f"},
    ]
    changed = [{**turns[0], "answer": "2", "level": 3}, turns[1]]
    info = {"prompt_index": 0}
    assert start_entry_id(turns, info) == start_entry_id(changed, info)
    assert start_entry_id(turns, info) != start_entry_id([turns[0]], info)
    chosen, rejected = ({"role": "assistant", "content": text} for text in "cd")
    pairs = [Pair(prompt, [*prompt, chosen], [*prompt, rejected]) for prompt in (turns, changed)]
    assert data_card(pairs)["duplicates"] == 1


def test_a_stopped_run_resumes_like_the_whole_run(tmp_path, echo_model, monkeypatch):
    run_command("ppo", prompt_tree(tmp_path / "whole", echo_model))
    original = OnlineTrainer.step

    def failing(trainer, step, run):
        if step == 2:
            raise KeyboardInterrupt
        return original(trainer, step, run)

    monkeypatch.setattr(OnlineTrainer, "step", failing)
    tree = prompt_tree(tmp_path / "cut", echo_model)
    with pytest.raises(KeyboardInterrupt):
        run_command("ppo", tree)
    monkeypatch.undo()
    changed = prompt_tree(tmp_path / "cut", echo_model, columns=[])
    with pytest.raises(UserError, match=r"reward_columns"):
        run_command("ppo", changed | {"resume": True})
    run_command("ppo", tree | {"resume": True})
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["rows", "dataset", "file"])
def test_python_passes_columns_of_rows_data_sets_and_files(tmp_path, echo_model, monkeypatch, kind):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    path = {
        "rows": ROWS,
        "dataset": datasets.Dataset.from_list(ROWS),
        "file": write_rows(tmp_path / "rows.jsonl", ROWS),
    }[kind]
    judged = rlhf.evaluate(
        policies={"base": echo_model},
        prompts={"path": path, "reward_columns": ["level"]},
        rewards=level,
        rollout={"max_new_tokens": 2},
        episodes=4,
        output_dir=str(tmp_path / "judged"),
    )
    episodes = read_rows(tmp_path / "judged/evaluation/base/episodes.jsonl")
    assert sorted(episode["components"]["level"] for episode in episodes) == [1.0, 2.0, 3.0, 4.0]
    assert judged.config["env"]["prompts"][0]["reward_columns"] == ["level"]


def test_pairs_of_an_evaluation_and_of_a_report_have_them(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "a" * i, "rejected": "b" * (9 - i), "longer": i > 4}
        for i in range(1, 9)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    reward = {"kind": "function", "path": "tests.training.test_reward_columns:sign"}
    tree = {"data": [{"path": str(path), "reward_columns": ["longer"]}], "rewards": [reward]}
    run_command("reward-report", tree | {"output_dir": str(tmp_path / "report")})
    summary = json.loads((tmp_path / "report/evaluation/pairs/summary.json").read_text())
    assert summary["accuracy"]["value"] == 1.0


def sign(conversations):
    """Long replies are better if the column says so, else short replies."""
    return [
        len(talk[-1]["content"]) * (1.0 if talk[-2]["longer"] else -1.0) for talk in conversations
    ]
