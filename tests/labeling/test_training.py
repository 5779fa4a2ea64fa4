"""Labels of a scripted annotator with noise train a reward model, by one command."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.cli.main import main
from rlhf.cli.table import run_command
from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.data.load import load
from rlhf.errors import UserError
from tests.helpers.training import WORDS, assistant, offline_tree, save_model, user
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


def label(number: int, mode: str, **columns: Any) -> dict[str, Any]:
    """A row of a file of labels."""
    row = {"label_id": f"l{number}", "item_id": f"i{number}", "mode": mode, "annotator": "ann"}
    prompt = user(f"Repeat: {WORDS[number % len(WORDS)]} {number}")
    return {**row, "prompt": prompt, **columns}


def rated(number: int, rating: int, **columns: Any) -> dict[str, Any]:
    reply = assistant(WORDS[number % len(WORDS)])
    return label(number, "ratings", completion=reply, rating=rating, **columns)


def preferred(number: int, margin: int, **columns: Any) -> dict[str, Any]:
    replies = {"response_a": assistant("apple"), "response_b": assistant("river")}
    return label(number, "pairs", **replies, winner="ab"[number % 2], margin=margin, **columns)


MIXED = {
    "ratings": ("scale", {"kind": "regression", "labels": ["rating"]}, rated),
    "margins": ("strengths", {"margins": True}, preferred),
    "strengths as weights": ("strengths", {"kind": "scaled"}, preferred),
}
"""Case -> column with the range of the answers, settings of `rlhf reward`, function of a label."""


def tree_of(folder: Path, model: Path, make: Any, ranges: dict[str, dict], **settings: Any) -> dict:
    """A configuration of `rlhf reward`, with a file of labels for each name of a range."""
    for index, (name, columns) in enumerate(ranges.items()):
        labels = [make(i + 50 * index, 1 + i % 2, **columns) for i in range(16)]
        write_jsonl(folder / f"{name}.jsonl", labels)
    tree = offline_tree(folder / "run", model, folder / "none.jsonl", **settings)
    tree["data"] = [{"path": str(folder / f"{name}.jsonl")} for name in ranges]
    return tree


@pytest.mark.parametrize("place", ["data", "eval_data", "test_data"])
@pytest.mark.parametrize("case", MIXED)
def test_answers_of_different_ranges_are_refused_before_training(
    tmp_path: Path, echo_model: Path, case: str, place: str
):
    """The rating 5 of 5 and the rating 5 of 10 are different answers."""
    column, settings, make = MIXED[case]
    tree = tree_of(tmp_path, echo_model, make, {"a": {column: 2}, "b": {column: 3}}, **settings)
    if place != "data":
        tree[place] = [tree["data"].pop()]
    message = f"data: some labels have {column}: 2 and others {column}: 3; the numbers would have"
    with pytest.raises(UserError, match=message):
        run_command("reward", tree)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("case", MIXED)
def test_answers_of_one_range_or_of_an_unknown_range_train(
    tmp_path: Path, echo_model: Path, case: str
):
    column, settings, make = MIXED[case]
    tree = tree_of(tmp_path, echo_model, make, {"a": {column: 2}, "b": {}}, **settings)
    run_command("reward", tree)


def test_strengths_that_the_loss_does_not_use_can_differ(tmp_path: Path, echo_model: Path):
    ranges = {"a": {"strengths": 2}, "b": {"strengths": 3}}
    run_command("reward", tree_of(tmp_path, echo_model, preferred, ranges))


def test_a_split_keeps_no_range_and_refuses_different_ones(tmp_path: Path):
    files = []
    for name, strengths in (("a", 2), ("b", 3)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [preferred(i, 1, strengths=strengths) for i in range(8)]
        )
        files.append({"path": str(tmp_path / f"{name}.jsonl")})
    tree = {"data": files, "kind": "preference", "output_dir": str(tmp_path / "split")}
    with pytest.raises(UserError, match="data: some labels have strengths: 2 and others"):
        run_command("split", tree)


@pytest.mark.parametrize("value", ["many", [5], {}])
def test_a_label_with_an_invalid_range_is_dropped(tmp_path: Path, value: Any):
    path = tmp_path / "labels.jsonl"
    write_jsonl(path, [rated(0, 1, scale=5), rated(1, 1, scale=value), rated(2, 1)])
    loaded = load(DataSpec(str(path)), "rated", seed=None, keep=("rating",))
    assert loaded.dropped == {"scale is not a number": 1}
    assert [row.get("scale") for row in loaded.rows] == [5, None]
