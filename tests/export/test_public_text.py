"""Local paths and secrets are removed from texts, and other text is kept."""

from __future__ import annotations

import pytest

from rlhf.export.public_text import (
    config_without_paths_and_secrets,
    public_name,
    without_paths_and_secrets,
)

KEPT = [
    "https://huggingface.co/owner/name/tree/main",
    "a ratio of 1/2 and/or 3/4",
    "<think>a</think> and <b>b</b>",
    "owner/name",
    "/no_think",
    "text/Echo-v0",
    "2026-11-30T08:00:00+0000",
    "a // b",
    "the fraction -/+",
    "Повтори: слово",
    "",
]
REPLACED = {
    "/home/ann/rows.jsonl": "rows.jsonl",
    "see /home/ann/rows.jsonl, and /srv/b/c.json": "see rows.jsonl, and c.json",
    "~/data/rows.jsonl": "rows.jsonl",
    "~ann/rows.jsonl": "rows.jsonl",
    r"C:\Users\ann\rows.jsonl": "rows.jsonl",
    r"\\server\share\rows.jsonl": "rows.jsonl",
    "file:///home/ann/rows.jsonl": "rows.jsonl",
    "('/home/ann/rows.jsonl')": "('rows.jsonl')",
    "/home/ann/code.py:score": "code.py:score",
    "PYTHONPATH:/home/ann/lib": "PYTHONPATH:lib",
    "token hf_abcdefghijklmnopqrstuvwx": "token ***",
}


@pytest.mark.parametrize("text", KEPT)
def test_other_text_is_kept(text: str):
    assert without_paths_and_secrets(text) == text


@pytest.mark.parametrize("text", REPLACED)
def test_paths_and_secrets_are_replaced(text: str):
    assert without_paths_and_secrets(text) == REPLACED[text]


def test_names_of_folders_of_runs():
    assert public_name("/home/a b/runs/sft/final") == "sft"
    assert public_name("runs/ppo/checkpoints/step-10") == "ppo"
    assert public_name("runs/reward/checkpoints/checkpoint-10") == "reward"
    assert public_name("data/rows.jsonl") == "rows.jsonl"
    assert public_name("/") == "…"


def test_configurations():
    tree = {
        "model": {"path": "runs/sft/final"},
        "data": [{"path": "owner/name"}, {"path": "/home/a b/rows of ann.jsonl", "limit": 3}],
        "separator": "\n\n",
        "env": {"kwargs": {"folder": "/srv/games/x", "password": "hunter22", "api_token": ""}},
    }
    expected = {
        "model": {"path": "sft"},
        "data": [{"path": "owner/name"}, {"path": "rows of ann.jsonl", "limit": 3}],
        "separator": "\n\n",
        "env": {"kwargs": {"folder": "x", "password": "***", "api_token": ""}},
    }
    assert config_without_paths_and_secrets(tree, {"model.path"}) == expected
