"""Offline runs record replies to held-out prompts, before and after training."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.reports import write_report
from rlhf.runs.callbacks import Callback
from rlhf.training import reply_samples
from rlhf.training.reply_samples import NUM_PROMPTS, prompts_to_sample
from tests.helpers.training import (
    label_rows,
    offline_tree,
    pair_rows,
    read_rows,
    same,
    sft_rows,
    user,
    weights_of,
    write_rows,
)

ROWS = {"sft": sft_rows, "dpo": pair_rows, "kto": label_rows, "reward": pair_rows}


def trained(tmp_path: Path, model: Path, command: str, name: str = "run", **keys: Any) -> Path:
    data = write_rows(tmp_path / f"{command}.jsonl", ROWS[command]())
    tree = offline_tree(tmp_path / name, model, data, **{"trainer": {"max_steps": 4}, **keys})
    run_command(command, tree)
    return tmp_path / name


@pytest.mark.parametrize(
    ("command", "engine"), [("sft", "native"), ("dpo", "native"), ("kto", "auto"), ("sft", "trl")]
)
def test_replies_to_held_out_prompts_are_recorded(tmp_path, echo_model, command, engine):
    folder = trained(tmp_path, echo_model, command, engine=engine)
    rows = read_rows(folder / "samples.jsonl")
    assert Counter(row["split"] for row in rows) == {"before": NUM_PROMPTS, "after": NUM_PROMPTS}
    by_split = {
        split: {row["seed"]: row["messages"][:-1] for row in rows if row["split"] == split}
        for split in ("before", "after")
    }
    assert by_split["before"] == by_split["after"]
    texts = {messages[0]["content"] for messages in by_split["before"].values()}
    assert len(texts) == NUM_PROMPTS
    assert {row["step"] for row in rows} == {0, 4}
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    page = write_report(folder).read_text()
    assert "Before training" in page
    assert "Held-out prompt" in page
    assert "not scored" not in page


def test_a_reward_model_has_no_replies(tmp_path, echo_model):
    assert not (trained(tmp_path, echo_model, "reward") / "samples.jsonl").exists()


def test_sampling_does_not_change_training(tmp_path, echo_model, monkeypatch):
    first = trained(tmp_path, echo_model, "sft", "with")
    monkeypatch.setattr(reply_samples, "NUM_PROMPTS", 0)
    second = trained(tmp_path, echo_model, "sft", "without")
    assert not (second / "samples.jsonl").exists()
    assert same(weights_of(first), weights_of(second))


class FailOnce(Callback):
    """Ends the first run after its third step."""

    failed = False

    def on_step(self, event):
        if event.step == 3 and not FailOnce.failed:
            FailOnce.failed = True
            raise ValueError("planted")


def test_a_resumed_run_has_every_reply_once(tmp_path, echo_model):
    keys = {"callbacks": ["tests.training.test_reply_samples:FailOnce"]}
    with pytest.raises(UserError, match="planted"):
        trained(tmp_path, echo_model, "sft", **keys)
    folder = trained(tmp_path, echo_model, "sft", **keys, resume=True)
    rows = read_rows(folder / "samples.jsonl")
    assert Counter((row["split"], row["seed"]) for row in rows) == Counter(
        (split, seed) for split in ("before", "after") for seed in range(NUM_PROMPTS)
    )


def test_a_model_that_cannot_be_sampled_is_a_warning(tmp_path, echo_model, monkeypatch, caplog):
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("planted")

    monkeypatch.setattr(reply_samples, "sample_completions", fail)
    with caplog.at_level(logging.WARNING):
        folder = trained(tmp_path, echo_model, "sft")
    assert "no replies of the model are recorded: planted" in caplog.text
    assert not (folder / "samples.jsonl").exists()


def test_prompts_are_different_and_rows_without_a_prompt_are_skipped():
    rows = [{"text": "plain"}, *[{"prompt": user(text)} for text in "aabcde"]]
    prompts = prompts_to_sample(rows)
    assert [prompt[0]["content"] for prompt in prompts] == ["a", "b", "c", "d"]
    assert prompts_to_sample([]) == []
