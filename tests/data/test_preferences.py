"""Label probabilities of simulated annotators; pairs from rankings and ratings."""

import math

import pytest

from rlhf.data.preferences import (
    SimulatedAnnotator,
    inject_label_noise,
    pairs_from_gold,
    pairs_from_rankings,
    pairs_from_ratings,
)
from rlhf.errors import UserError


def text(reply):
    return reply[-1]["content"]


def shout(conversations):
    """Gold score: number of exclamation marks in the last turn."""
    return [float(text(c).count("!")) for c in conversations]


def many(replies, n=4000):
    return [{"prompt": f"p{i}", "replies": replies} for i in range(n)]


def share(loaded, reply):
    return sum(text(row["chosen"]) == reply for row in loaded.rows) / len(loaded.rows)


def judge(replies, *, seed=0, n=4000, **annotator):
    return pairs_from_gold(
        many(replies, n),
        shout,
        annotator=SimulatedAnnotator(**annotator),
        pairs_per_prompt=1,
        seed=seed,
    )


# P(A) worked by hand; 4,000 verdicts have a standard error below 0.008
@pytest.mark.parametrize(
    ("replies", "annotator", "probability"),
    [
        (["a!", "b"], {"tau": 1.0}, 1 / (1 + math.exp(-1))),
        (["a!!!", "b"], {"tau": 2.0}, 1 / (1 + math.exp(-1.5))),
        (["a!", "b"], {"tau": 0.0}, 1.0),
        (["a!", "b"], {"tau": 0.0, "flip": 0.2}, 0.8),
        (["a", "b"], {"tau": 0.0}, 0.5),
        (["a" * 101, "b"], {"length_bias": 2.0}, 1 / (1 + math.exp(-2))),
        (["a!", "b"], {"position_bias": 9.0, "tau": 1.0}, 0.5),  # either may be shown first
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_verdicts_have_the_stated_probability(replies, annotator, probability, seed):
    loaded = judge(replies, seed=seed, **annotator)
    assert share(loaded, replies[0]) == pytest.approx(probability, abs=0.03)


def test_probabilities_in_closed_form():
    both = SimulatedAnnotator(tau=2.0, length_bias=0.5, position_bias=-0.25, flip=0.1)
    logit = 3 / 2 + 0.5 * -40 / 100 - 0.25
    judged = 1 / (1 + math.exp(-logit))
    assert both.first_reply_probability(3.0, -40) == pytest.approx(
        0.9 * judged + 0.1 * (1 - judged)
    )
    plain = SimulatedAnnotator(tau=0.3)
    assert plain.first_reply_probability(0.7, 0) + plain.first_reply_probability(
        -0.7, 0
    ) == pytest.approx(1.0)
    assert SimulatedAnnotator(tau=1e-9).first_reply_probability(-5.0, 0) == 0.0


def test_gold_margin_is_chosen_less_rejected():
    loaded = judge(["a!!", "b"], n=200)
    assert {(text(r["chosen"]), r["gold_margin"]) for r in loaded.rows} == {
        ("a!!", 2.0),
        ("b", -2.0),
    }


def test_pairs_per_prompt_are_distinct():
    rows = [{"prompt": "p", "replies": ["a", "b!", "c!!"]}]
    for number, expected in [(1, 1), (3, 3), (9, 3)]:
        loaded = pairs_from_gold(
            rows, shout, annotator=SimulatedAnnotator(), pairs_per_prompt=number, seed=0
        )
        found = {frozenset((text(r["chosen"]), text(r["rejected"]))) for r in loaded.rows}
        assert len(found) == len(loaded.rows) == expected


def test_pairs_depend_only_on_the_seed():
    rows = judge(["a!", "b"], n=50).rows
    assert rows == judge(["a!", "b"], n=50).rows
    assert rows != judge(["a!", "b"], n=50, seed=1).rows


def test_scores_of_episodes_belong_to_the_episode_and_not_to_its_text():
    """Equal conversations can have different returns, because of a hidden state."""
    rows = [
        {"prompt": "guess", "replies": ["1", "2"], "scores": [1.0, 0.0]},
        {"prompt": "guess", "replies": ["1", "2"], "scores": [0.0, 1.0]},
        {"prompt": "guess", "replies": ["1", "", "2"], "scores": [0.0, 9.0, 1.0]},
    ]
    loaded = pairs_from_gold(
        rows, None, annotator=SimulatedAnnotator(tau=0), pairs_per_prompt=3, seed=0
    )
    assert [text(row["chosen"]) for row in loaded.rows] == ["1", "2", "2"]
    assert [row["gold_margin"] for row in loaded.rows] == [1.0, 1.0, 1.0]


def test_unusable_replies_are_counted():
    def gold(conversations):
        assert all(text(c) for c in conversations)
        return [None if text(c) == "?" else 1.0 for c in conversations]

    rows = [{"prompt": "p", "replies": replies} for replies in (["a", "a"], ["a", "?"], ["a", ""])]
    rows.append({"prompt": "p", "replies": ["a", "b"], "source": "me"})
    loaded = pairs_from_gold(rows, gold, annotator=SimulatedAnnotator(), pairs_per_prompt=1, seed=0)
    assert loaded.dropped == {
        "equal replies": 1,
        "reply without a gold score": 1,
        "empty reply": 1,
    }
    assert [row["source"] for row in loaded.rows] == ["me"]
    assert loaded.total == 4


def pairs(loaded):
    return [(text(r["chosen"]), text(r["rejected"])) for r in loaded.rows]


def test_rankings():
    best_first = [{"prompt": "p", "replies": ["a", "b", "c"]}]
    assert pairs(pairs_from_rankings(best_first)) == [("a", "b"), ("a", "c"), ("b", "c")]
    ranked = pairs_from_rankings([{"prompt": "p", "replies": ["a", "b", "c"], "ranks": [2, 1, 2]}])
    assert pairs(ranked) == [("b", "a"), ("b", "c")]
    assert ranked.dropped == {"tie": 1}
    assert "margin" not in ranked.rows[0]


def test_ratings():
    rows = [{"prompt": "p", "replies": ["a", "b", "c"], "ratings": [1, 4, 3.5]}]
    loaded = pairs_from_ratings(rows)
    assert pairs(loaded) == [("b", "c"), ("b", "a"), ("c", "a")]
    assert [row["margin"] for row in loaded.rows] == [0.5, 3.0, 2.5]
    assert pairs(pairs_from_ratings(rows, min_gap=0.5)) == [("b", "a"), ("c", "a")]
    with pytest.raises(UserError, match="row 0: 1 replies but 2 ratings"):
        pairs_from_ratings([{"prompt": "p", "replies": ["a"], "ratings": [1, 2]}])
    with pytest.raises(UserError, match="row 0: empty prompt"):
        pairs_from_ratings([{"prompt": "", "replies": ["a"], "ratings": [1]}])


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_label_noise_reverses_the_exact_fraction(rate):
    clean = [
        {"chosen": [f"c{i}"], "rejected": [f"r{i}"], "n": i, "gold_margin": i - 5.0}
        for i in range(20)
    ]
    noisy = inject_label_noise(clean, rate, seed=5)
    assert sum(row["flipped"] for row in noisy) == 20 * rate
    for before, after in zip(clean, noisy, strict=True):
        swapped = after["chosen"] == before["rejected"] and after["rejected"] == before["chosen"]
        assert swapped == after["flipped"]
        assert after["n"] == before["n"]
        sign = -1 if after["flipped"] else 1
        assert after["gold_margin"] == sign * before["gold_margin"]
    assert "flipped" not in clean[0]


def test_a_wrong_number_of_ranks_is_named():
    with pytest.raises(UserError, match="row 0: 2 replies but 1 ranks"):
        pairs_from_rankings([{"prompt": "p", "replies": ["a", "b"], "ranks": [1]}])


def test_noise_on_labels():
    noisy = inject_label_noise([{"label": True}, {"label": False}], 1.0, seed=0)
    assert [row["label"] for row in noisy] == [False, True]


@pytest.mark.parametrize("wrong", [{"tau": -1.0}, {"flip": 0.5}, {"tau": float("nan")}])
def test_impossible_annotators(wrong):
    with pytest.raises(UserError, match="annotator"):
        SimulatedAnnotator(**wrong)
