"""Kappa equals tables that were worked by hand, and its intervals cover the truth."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from rlhf.labeling.agreement import (
    agreement_report,
    cohen_kappa,
    cohen_kappa_interval,
    fleiss_kappa,
)


def labels_of(table: list[list[int]]) -> tuple[list[int], list[int]]:
    """The labels of two annotators from their table of counts."""
    cells = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in cells], [j for _, j in cells]


def test_cohen_kappa_of_a_hand_worked_table():
    # 50 items: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no.
    # Observed: (20 + 15) / 50 = 0.7. Chance: 25/50 * 30/50 + 25/50 * 20/50 = 0.3 + 0.2 = 0.5.
    # Kappa: (0.7 - 0.5) / (1 - 0.5) = 0.4.
    assert cohen_kappa(*labels_of([[20, 5], [10, 15]])) == pytest.approx(0.4, abs=1e-12)
    # 100 items with ties as a third category: 40 + 30 + 5 equal of 100, so 0.75 observed.
    # Rows 50, 40, 10 and columns 46, 41, 13: chance = (2300 + 1640 + 130) / 10000 = 0.407.
    table = [[40, 6, 4], [6, 30, 4], [0, 5, 5]]
    assert cohen_kappa(*labels_of(table)) == pytest.approx((0.75 - 0.407) / 0.593, abs=1e-12)


def test_kappa_is_zero_by_chance_one_for_equal_and_undefined_for_one_category():
    assert cohen_kappa(*labels_of([[9, 3], [3, 1]])) == pytest.approx(0, abs=1e-12)
    assert cohen_kappa([0, 1, 1], [0, 1, 1]) == 1
    assert np.isnan(cohen_kappa([0, 0], [0, 0]))
    assert cohen_kappa([0, 1], [1, 0]) == pytest.approx(-1)


def test_a_kappa_without_variation_has_no_interval():
    prompts = list(range(30))
    for second, value in (("a" * 29 + "b", 0.0), ("a" * 30, None)):
        kappa = cohen_kappa_interval("a" * 30, second, prompts)
        assert math.isnan(kappa.value) if value is None else kappa.value == value
        assert math.isnan(kappa.low)
        assert kappa.needs


def test_quadratic_kappa_of_a_hand_worked_table():
    # Ratings 1, 2, 4 with nobody at 3. Disagreements 1-2 and 2-4 cost 1 and 4.
    # First: 1 1 2 4; second: 1 2 2 2. Observed cost: (0 + 1 + 0 + 4) / 4 = 1.25.
    # Expected cost: first 1 (1/2), 2 (1/4), 4 (1/4) and second 1 (1/4), 2 (3/4):
    # 1/2 * 3/4 * 1 + 1/4 * 1/4 * 1 + 1/4 * (1/4 * 9 + 3/4 * 4) = 0.375 + 0.0625 + 1.3125 = 1.75.
    kappa = cohen_kappa([1, 1, 2, 4], [1, 2, 2, 2], weights="quadratic")
    assert kappa == pytest.approx(1 - 1.25 / 1.75, abs=1e-12)


def test_fleiss_kappa_of_a_hand_worked_table():
    # Four items, three annotators: aaa, aab, abb, bbb.
    # Agreement of the items: 1, 1/3, 1/3, 1; mean 2/3. Shares 1/2 and 1/2: chance 1/2.
    assert fleiss_kappa(["aaa", "aab", "abb", "bbb"]) == pytest.approx(1 / 3, abs=1e-12)
    # Items with different numbers of labels: aa 1, ab 0, aab 1/3; a in 5 of 7 labels.
    # Mean 4/9, chance (25 + 4) / 49 = 29/49.
    expected = (4 / 9 - 29 / 49) / (1 - 29 / 49)
    assert fleiss_kappa(["aa", "ab", "aab"]) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(fleiss_kappa(["aa", "aa"]))


def test_fleiss_kappa_of_a_published_table():
    # Ten items, five categories, fourteen annotators; the published value is 0.210.
    table = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    items = [[j for j, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.slow
def test_the_interval_of_kappa_covers_the_truth():
    """Two annotators who are right with probability 0.8: kappa is (0.68 - 0.5) / 0.5 = 0.36."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        truth = rng.integers(0, 2, 150)
        first, second = (np.where(rng.random(150) < 0.8, truth, 1 - truth) for _ in range(2))
        kappa = cohen_kappa_interval(first.tolist(), second.tolist(), range(150))
        covered += kappa.low <= 0.36 <= kappa.high
    assert 180 <= covered <= 199, covered


def label(item: int, annotator: str, winner: str, **more) -> dict:
    key = f"{item}-{annotator}"
    row = {"label_id": key, "item_id": str(item), "mode": "pairs", "annotator": annotator}
    prompt = [{"role": "user", "content": f"Question {item}"}]
    replies = {
        side: [{"role": "assistant", "content": side}] for side in ("response_a", "response_b")
    }
    return row | replies | {"prompt": prompt, "winner": winner, "shown_first": "a"} | more


def write_two_files(folder: Path) -> list[str]:
    rng = random.Random(5)
    truth = [rng.choice("ab") for _ in range(80)]
    first = [label(i, "ann", winner, seconds=2.0) for i, winner in enumerate(truth)]
    second = [
        label(i, "bob", winner if rng.random() < 0.85 else "tie", gold="a" if i < 8 else None)
        for i, winner in enumerate(truth)
    ]
    undone = {"label_id": "u", "item_id": "0", "mode": "pairs", "annotator": "bob", "undoes": "0-x"}
    write_jsonl(folder / "ann.jsonl", first)
    write_jsonl(folder / "bob.jsonl", [label(0, "bob", "a") | {"label_id": "0-x"}, undone, *second])
    return [str(folder / "ann.jsonl"), str(folder / "bob.jsonl")]


def test_the_report_of_two_annotators(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = write_two_files(tmp_path)
    assert main(["labels", "agreement", *files, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ann, bob = report["annotators"]
    assert (ann["labels"], ann["median_seconds"], ann["checks"]) == (80, 2.0, None)
    assert (bob["labels"], bob["undone"]) == (80, 1)
    assert bob["checks"]["n"] == 8
    (pair,) = report["pairs"]
    assert pair["items"] == 80
    assert pair["kappa"]["low"] < pair["kappa"]["mean"] < pair["kappa"]["high"]
    assert 0 < pair["kappa"]["mean"] < pair["agreement"]["mean"] < 1
    assert report["shared_items"] == 80
    assert main(["labels", "agreement", *files]) == 0
    text = capsys.readouterr().out
    assert f"{pair['kappa']['mean']:.3f} [" in text
    assert "Fleiss' kappa of 80 shared items: 0." in text


def test_one_annotator_has_no_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_two_files(tmp_path)[0]
    assert main(["labels", "agreement", file]) == 0
    assert "no agreement to measure" in capsys.readouterr().out


def test_rankings_are_compared_by_pairs():
    row = {"mode": "rankings", "item_id": "1", "prompt": [{"role": "user", "content": "Q"}]}
    rows = [
        row | {"label_id": "x", "annotator": "ann", "ranks": [1, 2, 3]},
        row | {"label_id": "y", "annotator": "bob", "ranks": [1, 3, 2]},
    ]
    (pair,) = agreement_report(rows).pairs
    assert pair.items == 3
    assert pair.agreement.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "there is no label"),
        ('{"prompt": "x"}\n', "is not a label"),
        ("x\n", "broken JSON"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, content: str | None, message: str):
    file = tmp_path / "labels.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["labels", "agreement", str(file)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
