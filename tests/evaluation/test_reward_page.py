"""The page of a reward report and of an over-optimization run: what must stand on it."""

import csv
import io
import json
import math
import re
from html import unescape

import numpy as np
import pytest

from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.reports import write_report
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import last_reply
from tests.evaluation.fake_study import best_of_n, overoptimization

LENGTH = PerConversationReward(lambda c: float(len(last_reply(c))), name="length")


def rows(n: int) -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        chosen, rejected = ("word " * int(k) + f"{i}." for k in rng.integers(1, 30, 2))
        row = {"prompt": f"Question {i}?", "chosen": chosen, "rejected": rejected}
        made.append({**row, "source": ("left", "right")[i % 2]})
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "judged"
    curve = best_of_n("length")
    talk = [{"role": "assistant", "content": "a b c"}]
    write_pair_evaluation(
        LENGTH,
        rows(80),
        root,
        name="pairs",
        train_rows=rows(40),
        samples=[[talk, [{"role": "assistant", "content": "a"}]]],
        best_of_n=curve,
        dropped={"empty reply": 3},
    )
    return root


def test_a_single_report_is_drawn_in_full(run):
    page = unescape(write_report(run).read_text())
    for words in (
        "Paired gain in accuracy",
        "Accuracy by size of the margin",
        "Accuracy by length gap",
        "Calibration",
        "Best of n: gold",
        "Stress tests",
        'No better than "longer wins"',
        "40 of 80 prompts are also in the training pairs",
        "dropped: empty reply",
        "from right",
    ):
        assert words in page
    assert "over longer wins" in page
    assert re.search(r'<li class="bad">No better than "longer wins"', page)


def test_its_tables_are_files_too(run):
    write_report(run)
    tables = json.loads((run / "report_tables" / "tables.json").read_text())
    slices = list(csv.DictReader((run / "report_tables" / "pairs_slices.csv").open()))
    report = json.loads((run / "evaluation" / "pairs" / "summary.json").read_text())
    assert float(slices[0]["accuracy"]) == report["accuracy"]["value"]
    assert [row["range"] for row in slices if row["by"] == "source"] == ["left", "right"]
    assert sum(row["by"] == "margin" for row in slices) == 10
    card = {row["what"]: row["how many"] for row in tables["pairs_data"]}
    assert card["pairs"] == "80"
    assert card["pairs with 13 consecutive words of a training prompt"] == "0"
    assert [row["n"] for row in tables["pairs_best_of_n"]] == [1, 2, 4, 8, 16, 32]


def test_repeated_prompts_are_counted_once(tmp_path):
    """40 pairs on 10 prompts are 10 independent observations."""
    repeated = [row | {"prompt": f"Question {i % 10}?"} for i, row in enumerate(rows(40))]
    report = write_pair_evaluation(LENGTH, repeated, tmp_path, name="pairs")
    assert (report["accuracy"]["n"], report["accuracy"]["groups"]) == (40, 10)
    page = unescape(write_report(tmp_path).read_text())
    assert "<small>10 prompts</small>" in page
    assert "<small>40 pairs</small>" not in page
    # The temperature has no interval with fewer than 20 prompts.
    assert not re.search(r"Fitted T [\d.]+ \[", page)
    slices = list(csv.DictReader((tmp_path / "report_tables" / "pairs_slices.csv").open()))
    assert {row["accuracy n"] for row in slices if row["by"] == "all"} == {"10"}


def test_the_markdown_holds_the_same(run):
    page = (run / "evaluation" / "pairs" / "report.md").read_text()
    for words in (
        "## Best of n",
        "## Data card",
        "| dropped: empty reply | 3 |",
        "| largest change of a score by padding | 0.000 |",
        "| margin | 5.000 to 10.000 | 0.750 [0.388, 0.956] | 8 |",
    ):
        assert words in page


def test_a_benchmark_becomes_a_table(tmp_path):
    home = tmp_path / "run" / "evaluation" / "rewardbench"
    home.mkdir(parents=True)
    found = {"score": 0.5, "sections": {"Chat": 0.75, "Safety": 0.25}, "unscored": 2}
    summary = {"name": "rewardbench", "env": "rewardbench", "policy": "x", "benchmark": found}
    (home / "summary.json").write_text(json.dumps(summary))
    write_report(tmp_path / "run")
    text = (tmp_path / "run" / "report_tables" / "rewardbench.csv").read_text()
    parts = {row["part"]: float(row["score"]) for row in csv.DictReader(io.StringIO(text))}
    assert parts == {
        "score": 0.5,
        "sections / Chat": 0.75,
        "sections / Safety": 0.25,
        "unscored": 2,
    }


def test_over_optimization_shows_peak_interval_and_table(tmp_path):
    results = overoptimization()
    [trained] = results["rl"]
    assert trained["observed"]["inside"]
    assert trained["observed"]["distance"]["mean"] == pytest.approx(
        math.e, abs=0.5
    )  # exp(1 / .5 - 1)
    assert trained["observed"]["gold_after"]["high"] < 0 < trained["observed"]["proxy_after"]["low"]
    assert trained["observed"]["distance"]["low"] < math.e < trained["observed"]["distance"]["high"]
    assert "while the proxy continued to rise" in results["verdict"][0]
    (tmp_path / "config.yaml").write_text("command: overoptimize\n")
    (tmp_path / "overoptimization.json").write_text(json.dumps(results, allow_nan=False))
    page = unescape(write_report(tmp_path).read_text())
    assert "inside the predicted interval" in page
    assert page.count('class="shade"') >= 2
    assert "predicted peak" in page
    [row] = json.loads((tmp_path / "report_tables" / "tables.json").read_text())["training"]
    assert row["peak inside predicted interval"] == "yes"
    assert row["predicted peak (√KL)"] == pytest.approx(math.e, abs=0.2)
