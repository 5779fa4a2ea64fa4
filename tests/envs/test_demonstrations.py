"""Demonstrations and preference pairs: agreement with the expert, the values and the seed."""

import json

import numpy as np
import pytest

from rlhf import envs
from rlhf.envs import preference_bandit
from rlhf.envs.demonstrations import write_demonstrations
from rlhf.errors import UserError


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def test_expert_episodes_are_whole_conversations_with_their_return(tmp_path):
    path = tmp_path / "deep" / "demos.jsonl"
    summary = write_demonstrations("text/TMaze-v0", path, count=5, seed=7)
    written = rows(path)
    assert [row["seed"] for row in written] == [7, 8, 9, 10, 11]
    assert [row["return"] for row in written] == [1.0] * 5
    for row in written:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * 5
    assert (summary["rows"], summary["mean_return"], summary["last_seed"]) == (5, 1.0, 11)


def test_turn_rows_and_the_system_prompt_switch(tmp_path):
    path = tmp_path / "turns.jsonl"
    settings = {"form": "prompt_completion", "system_prompt": False}
    write_demonstrations("text/GuessNumber-v0", path, count=4, **settings)
    first = rows(path)[0]
    assert first["prompt"][0]["role"] == "user"
    assert [message["role"] for message in first["completion"]] == ["assistant"]
    assert first["completion"][0]["content"] in {str(n) for n in range(8, 14)}


def test_quality_mixes_in_random_actions(tmp_path):
    path = tmp_path / "mixed.jsonl"
    values = []
    for quality in (0.0, 0.5, 1.0):
        settings = {"count": 400, "quality": quality}
        summary = write_demonstrations("text/PreferenceBandit-v0", path, **settings)
        values.append(summary["mean_return"])
    random = preference_bandit.PreferenceBandit().random_value()
    assert values == pytest.approx([random, (random + 1) / 2, 1.0], abs=0.05)


def test_preferences_are_ordered_by_the_exact_values(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_demonstrations(
        "text/PreferenceBandit-v0", path, count=200, kind="preference", instructions=False
    )
    margins = []
    for row in rows(path):
        assert [message["role"] for message in row["prompt"]] == ["user"]
        gold = preference_bandit.gold_reward(
            [row["prompt"] + row[k] for k in ("chosen", "rejected")]
        )
        assert gold[0] > gold[1]
        assert row["margin"] == pytest.approx(gold[0] - gold[1])
        margins.append(row["margin"])
    assert np.std(margins) > 0.05


def test_preferences_in_several_turns_come_from_the_states_on_the_way(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_demonstrations("text/Triage-v0", path, count=60, kind="preference", quality=0.5)
    lengths = {len(row["prompt"]) for row in rows(path)}
    assert {2, 4} <= lengths


@pytest.mark.parametrize("name", [name for name in envs.TASKS if name != "Prompts-v0"])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_every_task_writes_both_kinds_and_the_same_file_twice(name, kind, tmp_path):
    texts = []
    for copy in ("a", "b"):
        path = tmp_path / copy
        write_demonstrations(f"text/{name}", path, count=6, quality=0.7, seed=3, kind=kind)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, "kind must be one of"),
        ({"form": "chat"}, "form must be one of"),
        ({"quality": 1.5}, "quality must lie"),
        ({"count": 0}, "count must lie"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_demonstrations("text/Echo-v0", tmp_path / "x", **{"count": 1, **settings})


def test_an_environment_without_an_expert_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="cannot write sft rows"):
        write_demonstrations("text/Prompts-v0", path, count=1)
    assert not path.exists()


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("text/KeyDoor-v0", {"sise": 3}, "text/KeyDoor-v0 cannot be made: .*'sise'"),
        ("KeyDor", {}, "did you mean text/KeyDoor-v0"),
        ("nowhere:text/KeyDoor-v0", {}, "cannot import 'nowhere'"),
    ],
)
def test_an_environment_that_cannot_be_made_is_refused_in_one_line(
    tmp_path, env_id, kwargs, message
):
    with pytest.raises(UserError, match=message):
        write_demonstrations(env_id, tmp_path / "rows.jsonl", count=1, **kwargs)


def test_demonstrations_take_a_short_id_and_use_training_items(tmp_path):
    short, whole = tmp_path / "short.jsonl", tmp_path / "whole.jsonl"
    write_demonstrations("keydoor", short, count=5)
    write_demonstrations("text/KeyDoor-v0", whole, count=5, split="train")
    assert short.read_text() == whole.read_text()
