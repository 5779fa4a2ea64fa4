"""Reward models beside each other: the score of every pair, paired gain, and the page."""

import json
import shutil

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.common.files import read_jsonl
from rlhf.errors import UserError
from rlhf.evaluation.compare import compare
from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.reports import write_comparison_report
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import last_reply
from rlhf.stats import difference


def rows(count, *, first=0, per_prompt=1):
    """The right reply contains the number of the prompt."""
    return [
        {
            "prompt": f"Say {i // per_prompt}",
            "chosen": f"{i // per_prompt} is {'long ' * (i % 3)}said {i}",
            "rejected": f"{'never ' * (i % 4)}no {i}",
        }
        for i in range(first, first + count)
    ]


def noisy(seed, rate):
    """A reward that is right except with a probability of ``rate``, the same for equal replies."""

    def score(conversation):
        reply = last_reply(conversation)
        number = np.random.default_rng([seed, *reply.encode()]).random()
        return float(("no" not in reply.split()) ^ (number < rate)) + number / 10

    return PerConversationReward(score, name="noisy")


def write(folder, reward, data, **keys):
    folder.mkdir()
    (folder / "config.yaml").write_text("command: reward-report\nseed: 0\n")
    write_pair_evaluation(reward, data, folder, name="pairs", stress_size=0, **keys)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    good = write(root / "good", noisy(0, 0.05), rows(120))
    return good, write(root / "bad", noisy(1, 0.4), rows(120))


def test_the_file_has_the_scores_of_every_pair(pair):
    found = read_jsonl(pair[0] / "evaluation/pairs/pair_scores.jsonl")
    assert len(found) == 120
    reward = noisy(0, 0.05)
    for row in found[::17]:
        scores = reward([[*row["messages"], *row[side]] for side in ("chosen", "rejected")])
        assert [row["score_chosen"], row["score_rejected"]] == scores
        assert row["correct"] == float(scores[0] > scores[1])
    summary = json.loads((pair[0] / "evaluation/pairs/summary.json").read_text())
    assert summary["accuracy"]["value"] == pytest.approx(np.mean([r["correct"] for r in found]))


def test_the_paired_gain_is_that_of_the_files(pair):
    result = compare([*pair])
    assert result.metric == "accuracy"
    [gain] = result.differences
    columns = [
        {
            row["pair"]: row["correct"]
            for row in read_jsonl(p / "evaluation/pairs/pair_scores.jsonl")
        }
        for p in (pair[1], pair[0])
    ]
    keys = sorted(columns[0])
    expected = difference(*([column[key] for key in keys] for column in columns))
    assert gain.estimate.value == pytest.approx(expected.value)
    assert (gain.estimate.low, gain.estimate.high) == pytest.approx((expected.low, expected.high))
    assert (gain.method, gain.winner, gain.unit) == ("bad", "good", "prompts")
    assert gain.estimate.units == 120


def test_the_command_and_its_tables(pair, tmp_path, capsys):
    assert main(["compare", *map(str, pair), "--tables", str(tmp_path / "tables")]) == 0
    shown = capsys.readouterr().out
    assert "good is better than bad on these prompts" in shown
    assert "every prompt has the same weight" in shown
    assert "because every return is 0" not in shown
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert names == {
        "differences.csv",
        "differences.tex",
        "scores.csv",
        "scores.tex",
        "tables.json",
    }
    page = write_comparison_report(pair, tmp_path / "c.html").read_text()
    assert "good is better than bad" in page.lower()
    assert "accuracy on held-out pairs" in page
    assert "report.html" not in page


def test_only_common_pairs_are_compared_and_prompts_are_the_units(tmp_path):
    a = write(tmp_path / "a", noisy(0, 0.1), rows(60, per_prompt=3))
    b = write(tmp_path / "b", noisy(1, 0.3), rows(60, first=12, per_prompt=3))
    result = compare([a, b])
    assert result.differences[0].estimate.units == 16
    assert any("only the 48 of 60 pairs" in note for note in result.notes)
    c = write(tmp_path / "c", noisy(1, 0.3), rows(9, first=300))
    with pytest.raises(UserError, match="a and c have no preference pair in common"):
        compare([a, c])


def test_equal_rewards_have_no_winner(tmp_path):
    a, b = (write(tmp_path / name, noisy(0, 0.2), rows(40)) for name in "ab")
    [gain] = compare([a, b]).differences
    assert gain.winner is None
    assert "equal values" in gain.verdict


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pair": None}, "no pair"),
        ({"prompt": 3}, "prompt is not a text"),
        ({"correct": "yes"}, "correct is not a finite number"),
        ({"correct": float("nan")}, "correct is not a finite number"),
    ],
)
def test_a_damaged_line_is_named(pair, tmp_path, change, reason):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]
    path = folders[0] / "evaluation/pairs/pair_scores.jsonl"
    found = read_jsonl(path)
    found[6] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    with pytest.raises(UserError, match=rf"pair_scores\.jsonl, line 7: {reason}"):
        compare(folders)
