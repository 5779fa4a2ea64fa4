"""Scores of each benchmark on hand-worked rows; the text of a reply is its score."""

import math

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.benchmarks import (
    REWARD_BENCH_SECTIONS,
    judge_bench,
    reward_bench,
    reward_bench_2,
    rm_bench,
    ties_score,
)
from rlhf.reward_models.core import Unscorable, last_reply


def read(conversation):
    if last_reply(conversation) == "none":
        raise Unscorable("none")
    return float(last_reply(conversation))


REWARD = PerConversationReward(read, name="read")


def pair(subset, chosen, rejected):
    return {"prompt": "p", "chosen": str(chosen), "rejected": str(rejected), "subset": subset}


def test_reward_bench_weighs_sections_by_prompts():
    rows = [
        pair("alpacaeval-easy", 1, 0),
        pair("mt-bench-easy", 0, 1),
        pair("mt-bench-easy", 1, 1),  # a tie is wrong
        pair("math-prm", 1, 0),
        *[pair("hep-go", 0, 1)] * 16,
        pair("donotanswer", "none", 0),
    ]
    found = reward_bench(REWARD, rows)
    assert found["sections"] == pytest.approx(
        {"Chat": 1 / 3, "Safety": 0.0, "Reasoning": 984 / (984 + 16)}
    )
    assert found["score"] == pytest.approx((1 / 3 + 0.984) / 3)
    assert found["unscored"] == 1
    with pytest.raises(ValueError, match="no subset 'made-up'"):
        reward_bench(REWARD, [pair("made-up", 1, 0)])


def test_reward_bench_has_23_subsets():
    assert sum(len(names) for names in REWARD_BENCH_SECTIONS.values()) == 23


def best_of(subset, chosen, rejected, **more):
    texts = {"chosen": [str(c) for c in chosen], "rejected": [str(r) for r in rejected]}
    return {"prompt": "p", "subset": subset, **texts, **more}


def test_reward_bench_2_shares_the_point_among_the_top():
    rows = [
        best_of("Math", [3], [0, 1, 2]),
        best_of("Math", [3], [3, 1, 3]),
        best_of("Focus", [1], [0, 0, 2]),
        best_of("Focus", [1], [0, 0, "none"]),
    ]
    found = reward_bench_2(REWARD, rows)
    assert found["subsets"] == pytest.approx({"Focus": 0.0, "Math": (1 + 1 / 3) / 2})
    assert found["score"] == pytest.approx(1 / 3)
    assert found["unscored"] == 1


def test_ties_by_hand():
    a = np.array
    prompts = {
        "ref:1": (a([5.0]), a([1.0, 2.0])),  # gap 3
        "tied:1": (a([4.0, 5.0]), a([2.0])),  # gap 2, spread 1
        "ref:2": (a([1.0]), a([0.5])),  # gap 0.5
        "tied:2": (a([3.0, 4.0]), a([1.5])),  # gap 1.5 > spread 1, but not 0.5
        "ref:3": (a([0.0]), a([1.0])),  # wrong
        "tied:3": (a([0.0, 9.0]), a([1.0])),  # wrong
    }
    clear = (math.tanh(1.0) + math.tanh(-0.5) + math.tanh(-1 / 9 - 1)) / 3
    expected = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * clear
    assert ties_score(prompts) == pytest.approx(expected)
    rows = [
        best_of("Ties", good.tolist(), bad.tolist(), id=key) for key, (good, bad) in prompts.items()
    ]
    assert reward_bench_2(REWARD, rows)["subsets"]["Ties"] == pytest.approx(expected)


def test_an_unscored_reference_prompt_is_wrong():
    nan = np.array([math.nan])
    tied = (np.array([4.0, 5.0]), np.array([2.0]))  # gap 2, spread 1
    assert ties_score({"ref:1": (nan, np.array([1.0])), "tied:1": tied}) == pytest.approx(0.5)


@pytest.mark.parametrize("run", [reward_bench, reward_bench_2])
def test_an_unknown_subset_is_refused(run):
    row = best_of("Maths", [1], [0], id="ref:1")
    row |= {"chosen": "1", "rejected": "0"} if run is reward_bench else {}
    with pytest.raises(UserError, match="has no subset 'Maths'"):
        run(REWARD, [row])


def test_a_row_of_ties_needs_its_group():
    row = best_of("Ties", [1], [0], id="7")
    with pytest.raises(UserError, match=r"is ref:n or tied:n, got '7'"):
        reward_bench_2(REWARD, [row])


def test_rm_bench_levels():
    """Style 3 always adds a point, so all easy comparisons are won and hard ones lost."""
    row = {"prompt": "p", "chosen": ["1", "1.5", "2.5"], "rejected": ["0", "1.2", "2"]}
    fancy = row | {"domain": "chat"}
    found = rm_bench(REWARD, [fancy])
    # chosen i against rejected j: i>j: 1.5>0, 2.5>0, 2.5>1.2; i=j: all; i<j: 1>1.2, 1>2, 1.5>2 no
    assert (found["easy"], found["normal"], found["hard"]) == (1.0, 1.0, 0.0)
    bad = {"prompt": "p", "chosen": ["0"] * 3, "rejected": ["1"] * 3}
    rows = [fancy, bad | {"domain": "safety-refuse"}, row | {"domain": "safety-response"}]
    rows += [row | {"domain": "safety-response"}] * 3
    found = rm_bench(REWARD, rows)
    assert found["domains"]["safety"]["normal"] == 0.5
    assert found["normal"] == 0.75


@pytest.mark.parametrize(("chosen", "rejected"), [(1, 1), (2, 4)])
def test_rm_bench_needs_three_replies_of_each_kind(chosen, rejected):
    row = {"prompt": "p", "chosen": ["1"] * chosen, "rejected": ["0"] * rejected, "domain": "chat"}
    with pytest.raises(ValueError, match="three chosen"):
        rm_bench(REWARD, [row])


def test_judge_bench():
    def row(a, b, label):
        return {"question": "q", "response_A": a, "response_B": b, "label": label, "source": "s"}

    rows = [row("2", "1", "A>B"), row("2", "1", "B>A"), row("1", "2", "B>A"), row("1", "1", "A>B")]
    found = judge_bench(REWARD, rows)
    assert (found["score"], found["sources"], found["unscored"]) == (0.5, {"s": 0.5}, 0)
    assert found["rows"] == {"s": 4}
    # All four rows have one question: one unit of evidence.
    assert found["intervals"]["score"]["prompts"] == 1
    with pytest.raises(ValueError, match="got 'tie'"):
        judge_bench(REWARD, [row("1", "2", "tie")])


def test_parts_have_intervals_and_absent_ones_are_named():
    rows = [{**pair("alpacaeval-easy", 1, 0), "prompt": f"p{i}"} for i in range(10)] + [
        {**pair("math-prm", int(i < 5), 0.5), "prompt": f"q{i}"} for i in range(10)
    ]
    found = reward_bench(REWARD, rows)
    intervals = found["intervals"]
    # 10 of 10: half of p^10 is 2.5%; 5 of 10 is symmetric about one half.
    assert intervals["subsets / alpacaeval-easy"]["low"] == pytest.approx(
        0.05 ** (1 / 10), abs=1e-6
    )
    assert intervals["subsets / alpacaeval-easy"]["high"] == 1.0
    half = intervals["sections / Reasoning"]
    assert half["low"] + half["high"] == pytest.approx(1.0)
    below = math.hypot(0.5 * (1 - 0.05 ** (1 / 10)), 0.5 * (0.5 - half["low"]))
    assert intervals["score"]["low"] == pytest.approx(0.75 - below, abs=1e-6)
    assert intervals["score"]["prompts"] == 20
    assert found["rows"] == {"alpacaeval-easy": 10, "math-prm": 10}
    assert found["absent"][:2] == ["Chat Hard", "Safety"]
    assert "hep-go" in found["absent"]


def test_absent_parts_of_the_other_benchmarks():
    found = reward_bench_2(REWARD, [best_of("Math", [3], [0, 1, 2])] * 3)
    assert "Ties" in found["absent"]
    assert found["intervals"]["subsets / Math"]["prompts"] == 1  # three copies of one prompt
    row = {"prompt": "p", "chosen": ["1"] * 3, "rejected": ["0"] * 3, "domain": "chat"}
    found = rm_bench(REWARD, [row, row | {"prompt": "q"}])
    assert found["absent"] == ["code", "math", "safety"]
    assert found["rows"] == {"chat": 2}
    assert found["intervals"]["easy"]["low"] == pytest.approx(0.05 ** (1 / 2), abs=1e-6)
    assert found["intervals"]["domains / chat / easy"] == found["intervals"]["easy"]
    assert found["domains"]["chat"] == {"score": 1.0, "easy": 1.0, "normal": 1.0, "hard": 1.0}
    with pytest.raises(ValueError, match="at least one row"):
        rm_bench(REWARD, [])
