"""Labels of a scripted annotator with noise train a reward model, by one command."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import httpx
import pytest

from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from tests.helpers.training import WORDS, save_model
from tests.helpers.web import ServedCommand

PAIRS = list(itertools.permutations(range(len(WORDS)), 2))
"""Words of a pair; the annotator prefers earlier words."""
LABELS, NOISE = 200, 0.1


def rows(count: int, start: int) -> list[dict]:
    chosen = [min(PAIRS[i % len(PAIRS)]) for i in range(count)]
    rejected = [max(PAIRS[i % len(PAIRS)]) for i in range(count)]
    return [
        {
            "prompt": f"Repeat: {i + start}",
            "chosen": WORDS[a],
            "rejected": WORDS[b],
            "margin": b - a,
        }
        for i, (a, b) in enumerate(zip(chosen, rejected, strict=True))
    ]


def label_by_script(served: ServedCommand, rng: random.Random) -> int:
    """Label all items on the page's server; returns the number of wrong labels."""
    wrong = 0
    with httpx.Client(base_url=served.base, follow_redirects=True) as client:
        client.get(f"/?token={served.token}")
        while (task := client.get("/api/task").json()["task"]) is not None:
            first, second = (WORDS.index(reply[0]["text"]) for reply in task["replies"])
            flip = rng.random() < NOISE
            wrong += flip
            answer = {
                "choice": "first" if (first < second) != flip else "second",
                "strength": min(3, abs(first - second)),
            }
            ids = {key: task[key] for key in ("label_id", "item_id")}
            assert client.post("/api/label", json={**ids, "answer": answer}).status_code == 200
    return wrong


@pytest.mark.slow
def test_noisy_labels_train_a_reward_model(tmp_path: Path, capsys):
    # Replies are in a random order, so the labels contain all the reward model learns from.
    unlabeled = [
        {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["rejected"]}
        for row in rows(LABELS, 0)
    ]
    write_jsonl(tmp_path / "items.jsonl", unlabeled)
    write_jsonl(tmp_path / "test.jsonl", rows(96, 1000))
    words = ["label", "--data", "[{path: items.jsonl}]", "--output", "labels.jsonl"]
    with ServedCommand([*words, "--annotator", "script"], tmp_path) as served:
        wrong = label_by_script(served, random.Random(7))
    assert 10 <= wrong <= 35
    save_model(tmp_path / "model")
    command = ["reward", "--model.path", str(tmp_path / "model"), "--data"]
    command += [f"[{{path: {tmp_path / 'labels.jsonl'}}}]", "--output_dir", str(tmp_path / "run")]
    command += ["--test_data", f"[{{path: {tmp_path / 'test.jsonl'}}}]", "--max_length", "48"]
    command += ["--trainer", "{learning_rate: 0.01, num_train_epochs: 3}"]
    command += ["--margins", "true"]  # the strengths of the labels
    assert main(command) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["accuracy"]["low"] > 0.5, summary["accuracy"]
