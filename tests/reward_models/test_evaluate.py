"""Estimates recover the parameters of simulated annotators with an exact gold reward."""

import json
import math
import re
import zlib

import numpy as np
import pytest
from scipy import stats

from rlhf.errors import UserError
from rlhf.reward_models import PerConversationReward, as_reward
from rlhf.reward_models.annotator import fit_annotator
from rlhf.reward_models.core import last_reply
from rlhf.reward_models.pairs import data_card, to_pair
from rlhf.reward_models.report.baselines import bag_of_words_margins, length_differences
from rlhf.reward_models.report.calibration import (
    calibration_metrics,
    fit_temperature,
    temperature_interval,
)
from rlhf.reward_models.report.intervals import (
    clustered_mean_interval,
    proportion_interval,
    spearman,
)
from rlhf.reward_models.report.markdown import pairs_report_markdown
from rlhf.reward_models.report.pairs import evaluate_reward_model as evaluate
from rlhf.reward_models.report.pairs import score_statistics_on_samples


def simulate(n, *, seed, temperature=1.0, noise=0.0, length_bias=0.0, per_prompt=1):
    """Gold and length differences chosen - rejected of ``n`` labeled pairs."""
    rng = np.random.default_rng(seed)
    gold, gap = rng.normal(size=n) * 2, rng.normal(size=n) * 50
    p = noise + (1 - 2 * noise) / (1 + np.exp(-gold / temperature - length_bias * gap))
    sign = np.where(rng.random(n) < p, 1.0, -1.0)
    return gold * sign, gap * sign


def text_pairs(n, *, seed, temperature=0.5, noise=0.0, prefer_long=False):
    """Pairs whose replies are their gold scores as text; every prompt occurs twice."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        gold = rng.normal(size=2)
        words = ["word " * int(k) for k in rng.integers(1, 30, 2)]
        z = (len(words[0]) - len(words[1])) if prefer_long else (gold[0] - gold[1]) / temperature
        p = noise + (1 - 2 * noise) / (1 + math.exp(-z))
        a, b = (0, 1) if rng.random() < p else (1, 0)
        replies = [f"{words[k]}{gold[k]:.6f}." for k in (a, b)]
        row = {"prompt": f"p{i // 2}", "chosen": replies[0], "rejected": replies[1], "who": i % 2}
        pairs.append(to_pair(row, source_column="who"))
    return pairs


def read_gold(conversation):
    """The gold score in the reply; 0 if a stress test has truncated it."""
    found = re.search(r"-?\d+\.\d+", last_reply(conversation))
    return float(found.group()) if found else 0.0


GOLD = PerConversationReward(read_gold, name="gold")


@pytest.mark.parametrize("seed", range(4))
def test_annotator_temperature_bias_and_noise_are_recovered(seed):
    gold, gap = simulate(6000, seed=seed, temperature=0.5, noise=0.1, length_bias=0.02)
    fit = fit_annotator({"reward": gold, "length": gap})
    # 12 checks: intervals of 99.9% (1.68 times the 95% ones), so that chance does not fail us
    for estimate, truth in [
        (fit.weights["reward"], 2.0),
        (fit.weights["length"], 0.02),
        (fit.noise, 0.1),
    ]:
        assert abs(estimate.value - truth) <= 1.68 * (estimate.high - estimate.low) / 2
        assert estimate.high - estimate.low < truth
    assert fit.temperature().value == pytest.approx(1 / fit.weights["reward"].value)


def test_coverage_of_the_annotator_intervals():
    covered = []
    for seed in range(150):
        gold, _ = simulate(400, seed=1000 + seed, temperature=0.8)
        estimate = fit_annotator({"reward": gold}, fit_noise=False).weights["reward"]
        covered.append(estimate.low <= 1 / 0.8 <= estimate.high)
    assert np.mean(covered) >= 0.90


def test_robust_intervals_widen_when_pairs_come_in_copies():
    gold, _ = simulate(500, seed=0)
    copies, groups = np.repeat(gold, 4), np.repeat(np.arange(500), 4)
    width = lambda fit: fit.weights["reward"].high - fit.weights["reward"].low  # noqa: E731
    naive = width(fit_annotator({"reward": copies}, fit_noise=False))
    robust = width(fit_annotator({"reward": copies}, fit_noise=False, groups=groups))
    single = width(fit_annotator({"reward": gold}, fit_noise=False))
    assert naive == pytest.approx(single / 2, rel=0.02)
    assert robust == pytest.approx(single, rel=0.15)


def test_annotator_refuses_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="two pairs more than features"):
        fit_annotator({"reward": [1.0]})
    with pytest.raises(ValueError, match="are collinear"):
        fit_annotator({"a": np.arange(1.0, 50), "b": 2 * np.arange(1.0, 50)})


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_fitted_temperature_is_the_annotators(temperature):
    margins, _ = simulate(20_000, seed=1, temperature=temperature)
    assert fit_temperature(margins) == pytest.approx(temperature, rel=0.05)
    assert calibration_metrics(margins, temperature=temperature).ece < 0.015


def test_temperature_minimizes_the_likelihood_found_by_brute_force():
    margins, _ = simulate(300, seed=2, noise=0.2)
    grid = np.exp(np.linspace(-2, 4, 4001))
    nll = [np.log1p(np.exp(-margins / t)).mean() for t in grid]
    assert fit_temperature(margins) == pytest.approx(grid[int(np.argmin(nll))], rel=0.002)


def test_temperature_at_the_edges():
    assert fit_temperature(np.array([-1.0, -2.0, 0.5])) == math.inf
    assert fit_temperature(np.zeros(3)) == math.inf
    assert 0 < fit_temperature(np.array([1.0, 2.0])) < 0.01


def test_calibration_by_hand():
    found = calibration_metrics(np.array([0.0, 2.0, -1.0]), temperature=1.0, num_bins=1)
    p = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.e)]
    assert found.nll == pytest.approx(-sum(math.log(x) for x in p) / 3)
    assert found.brier == pytest.approx(sum((1 - x) ** 2 for x in p) / 3)
    [only] = found.bins
    confidence = (p[0] + p[1] + 1 - p[2]) / 3
    assert (only.count, only.accuracy) == (3, 0.5)
    assert only.confidence == pytest.approx(confidence)
    assert found.ece == pytest.approx(abs(0.5 - confidence))


def test_cluster_interval_sees_that_copies_are_not_evidence():
    x = np.random.default_rng(0).random(200)
    single = clustered_mean_interval(x, range(200))
    copied = clustered_mean_interval(np.tile(x, 5), np.tile(np.arange(200), 5))
    assert copied["value"] == pytest.approx(single["value"])
    width = single["high"] - single["low"]
    assert copied["high"] - copied["low"] == pytest.approx(width, rel=0.05)
    assert width == pytest.approx(2 * 1.96 * x.std() / math.sqrt(200), rel=0.1)
    assert math.isnan(clustered_mean_interval([1.0, 0.0], ["a", "a"])["low"])


def test_coverage_of_the_cluster_interval():
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(200):
        shared = rng.random(80).repeat(4)
        wins = (rng.random(320) < 0.3 + 0.4 * shared).astype(float)
        found = clustered_mean_interval(wins, np.arange(80).repeat(4))
        hits.append(found["low"] <= 0.5 <= found["high"])
    assert np.mean(hits) >= 0.90


def test_share_interval_of_certain_wins_still_doubts():
    found = proportion_interval(np.ones(20), np.arange(20))
    # Mid-p: half of P(all 20 right) = p^20 is 2.5%.
    assert found["low"] == pytest.approx(0.05 ** (1 / 20), rel=1e-4)
    assert found["high"] == 1.0
    copies = proportion_interval(np.ones(80), np.arange(20).repeat(4))
    assert copies["low"] == pytest.approx(found["low"])
    assert math.isnan(proportion_interval([1.0, 0.0], ["a", "a"])["low"])


@pytest.mark.parametrize(("groups", "share"), [(8, 0.6), (12, 0.9), (60, 0.6)])
def test_coverage_of_the_share_interval(groups, share):
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(1000):
        # P(win) of a prompt is 0 or 1 for a third of them: strong clusters
        p = np.where(rng.random(groups) < 1 / 3, rng.random(groups) < share, share)
        won = (rng.random((groups, 4)) < p[:, None]).astype(float).ravel()
        found = proportion_interval(won, np.arange(groups).repeat(4))
        hits.append(found["low"] <= share <= found["high"])
    assert np.mean(hits) >= 0.93


def test_cluster_intervals_of_few_groups_cover():
    rng = np.random.default_rng(6)
    hits = []
    for _ in range(400):
        found = clustered_mean_interval(rng.normal(size=5), range(5))
        hits.append(found["low"] <= 0 <= found["high"])
    assert np.mean(hits) >= 0.92


def test_data_card_counts_copies_contradictions_and_leaks():
    rows = [("p", "a", "b"), ("p", "a", "b"), ("p", "b", "a"), ("q", "ccc", "d")]
    pairs = [to_pair(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) for r in rows]
    card = data_card(pairs, training_pairs=[pairs[3]])
    assert (card["pairs"], card["prompts"], card["duplicates"]) == (4, 2, 1)
    assert (card["contradictions"], card["prompts_in_training"], card["training_pairs"]) == (
        3,
        1,
        1,
    )
    assert card["median_characters"] == {"chosen": 1.0, "rejected": 1.0}
    assert data_card(pairs)["prompts_in_training"] is None
    report = evaluate(GOLD, pairs, train_pairs=pairs[3:], stress_size=0)
    assert any("prompts are also in the training pairs" in line for line in report["verdict"])
    assert "3 pairs also occur with chosen and rejected exchanged." in report["verdict"]


def test_rank_correlation():
    assert spearman(np.array([1, 2, 3]), np.array([10, 100, 1000])) == pytest.approx(1.0)
    assert math.isnan(spearman(np.array([1, 1]), np.array([1, 2])))


def test_report_on_the_gold_reward_recovers_the_annotator():
    report = evaluate(GOLD, text_pairs(1500, seed=1, temperature=0.5, noise=0.1))
    exact = 0.1 + 0.8 * np.mean(
        1 / (1 + np.exp(-np.abs(np.random.default_rng(1).normal(size=200_000) * 2**0.5) / 0.5))
    )
    assert report["accuracy"]["low"] < exact < report["accuracy"]["high"]
    assert report["accuracy"]["groups"] == 750
    noise, weight = report["annotator"]["noise"], report["annotator"]["weights"]["score"]
    assert noise["low"] < 0.1 < noise["high"]
    assert weight["low"] < 2.0 < weight["high"]
    assert abs(report["length"]["spearman"]) < 0.1
    moved = report["invariance"]
    assert moved.pop("texts") == 32
    assert set(moved) == {"batch", "order", "padding", "largest_difference", "share"}
    assert set(moved.values()) == {0.0}
    temperature = report["calibration"]["temperature"]
    assert temperature["low"] < temperature["value"] < temperature["high"]
    assert temperature["value"] == pytest.approx(report["calibration"]["fitted"]["temperature"])
    assert any(line.startswith('Better than "longer wins"') for line in report["verdict"])
    assert {row["accuracy"]["n"] for row in report["by_margin"]} == {150}
    assert (
        report["by_margin"][-1]["accuracy"]["value"] > report["by_margin"][0]["accuracy"]["value"]
    )
    assert set(report["by_source"]) == {"0", "1"}


def test_report_is_json_and_markdown():
    report = evaluate(
        GOLD,
        text_pairs(60, seed=1),
        samples=[[p.chosen, p.rejected] for p in text_pairs(5, seed=2)],
    )
    json.dumps(report, allow_nan=False)
    page = pairs_report_markdown(report)
    assert page.startswith("# Reward report: gold\n\n## Verdict")
    assert "| longer wins |" in page
    assert "within a prompt" in page


def test_the_temperature_of_few_prompts_has_no_interval():
    few, enough = (
        evaluate(GOLD, text_pairs(n, seed=1), stress_size=0)["calibration"] for n in (19, 80)
    )
    assert few["temperature"] is None
    assert few["fitted"]["temperature"] is not None
    assert enough["temperature"]["low"] < enough["temperature"]["high"]


def test_a_reward_that_is_length_is_called_no_better_than_length():
    length = PerConversationReward(lambda c: float(len(last_reply(c))), name="length")
    report = evaluate(length, text_pairs(400, seed=3, prefer_long=True))
    text = "\n".join(report["verdict"])
    assert 'No better than "longer wins"' in text
    assert "Depends on length: longer" in text
    assert 'Stress test "filler" raises the score' in text
    assert 'Stress test "shuffled_prompt" does not lower the score' in text


def test_noise_is_called_a_coin_and_ties_are_counted():
    coin = as_reward(
        lambda cs: [float(zlib.crc32(last_reply(c).encode()) % 2) for c in cs], name="coin"
    )
    report = evaluate(as_reward(coin), text_pairs(300, seed=4), stress_size=0)
    assert "Accuracy is not significantly above chance on these pairs." in report["verdict"]
    assert report["data"]["ties"] > 100
    constant = evaluate(as_reward(lambda cs: [0.0] * len(cs), name="zero"), text_pairs(40, seed=5))
    assert constant["accuracy"]["value"] == 0.5
    assert constant["data"]["ties"] == 40


def test_stress_tests_of_equal_scores_are_not_divided_by_rounding_errors():
    def short(conversations):
        return [-0.94 if len(last_reply(c)) < 170 else -0.5 for c in conversations]

    pairs = text_pairs(40, seed=5)
    assert np.std(short([pair.chosen for pair in pairs])) > 0  # 1e-17
    report = evaluate(as_reward(short), pairs)
    assert max(abs(test["change"]["value"]) for test in report["stress"].values()) < 1


def test_unscored_pairs_are_left_out_and_counted():
    def some(conversations):
        return [None if "7" in last_reply(c)[-3:] else 1.0 for c in conversations]

    pairs = text_pairs(200, seed=6)
    report = evaluate(as_reward(some), pairs, stress_size=0)
    expected = sum(None in some([pair.chosen, pair.rejected]) for pair in pairs)
    assert report["data"]["unscored"] == expected > 10
    assert report["accuracy"]["n"] == 200 - expected
    with pytest.raises(UserError, match="no pair could be scored"):
        evaluate(as_reward(lambda cs: [None] * len(cs)), pairs)


def test_batch_dependence_is_found():
    leaky = as_reward(lambda cs: [float(len(cs))] * len(cs), name="leaky")
    report = evaluate(leaky, text_pairs(40, seed=7), stress_size=0)
    found = report["invariance"]
    # alone 1; 32 together; 32 and a long one
    assert (found["batch"], found["order"], found["padding"]) == (31.0, 31.0, 32.0)
    assert found["share"] is None  # of no spread at all
    assert any(
        "changes by up to 32, although all scores of the pairs are equal." in line
        for line in report["verdict"]
    )
    padded = as_reward(
        lambda cs: [read_gold(c) + 1e-2 * max(len(last_reply(x)) for x in cs) for c in cs],
        name="padded",
    )
    report = evaluate(padded, text_pairs(40, seed=7), stress_size=0)
    assert report["invariance"]["padding"] > 2 * report["invariance"]["batch"] > 0
    assert any(line.startswith("Scores depend on padding") for line in report["verdict"])
    assert evaluate(leaky, text_pairs(40, seed=7), invariance_size=0)["invariance"] is None


def test_bag_of_words_learns_words_and_folds_share_no_prompt():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(300):
        good, bad = ("thanks", "never") if rng.random() < 0.9 else ("never", "thanks")
        filler = " ".join(rng.choice(["alpha", "beta", "gamma"], 5))
        rows.append(
            to_pair(
                {"prompt": f"q{i}", "chosen": f"{filler} {good}", "rejected": f"{filler} {bad}"}
            )
        )
    assert np.mean(bag_of_words_margins(rows) > 0) == pytest.approx(0.9, abs=0.04)
    # prompts that leak their label through a unique word must not help when cross-fitted
    leaks = [
        to_pair({"prompt": f"q{i // 4}", "chosen": f"u{i // 4}x", "rejected": f"u{i // 4}y"})
        for i in range(80)
    ]
    assert np.mean(bag_of_words_margins(leaks) > 0) == 0.0
    signs = np.sign(length_differences(rows))
    assert set(signs) == {-1.0, 1.0}
    assert length_differences(
        [to_pair({"prompt": "q", "chosen": "abc", "rejected": "z"})]
    ).tolist() == [2.0]


def test_spread_within_prompts():
    talk = lambda v: [{"role": "assistant", "content": str(v)}]  # noqa: E731
    found = score_statistics_on_samples(GOLD, [[talk(0.0), talk(2.0)], [talk(10.0), talk(10.0)]])
    assert found["mean"] == 5.5
    assert found["within_prompt_std"] == 0.5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_every_shape_of_row_becomes_the_same_pair(row):
    pair = to_pair(row)
    assert [m["content"] for m in pair.chosen] == ["q", "a"]
    assert [m["content"] for m in pair.rejected] == ["q", "b"]
    assert pair.lengths == (1, 1)


@pytest.mark.parametrize("row", [{"chosen": "a"}, {"chosen": "a", "rejected": "b"}])
def test_rows_that_are_no_pairs_are_refused(row):
    with pytest.raises(ValueError, match="a pair needs"):
        to_pair(row)


def test_noise_on_few_pairs_is_not_said_to_lean_on_length():
    said = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = PerConversationReward(lambda c, rng=rng: float(rng.normal()), name="noise")
        report = evaluate(noise, text_pairs(10, seed=seed), stress_size=0, invariance_size=0)
        said += any("Depends on length" in line for line in report["verdict"])
    assert said == 0  # ten prompts have no interval of a rank correlation
    said = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = PerConversationReward(lambda c, rng=rng: float(rng.normal()), name="noise")
        report = evaluate(noise, text_pairs(30, seed=seed), stress_size=0, invariance_size=0)
        said += any("Depends on length" in line for line in report["verdict"])
    assert said <= 4


def test_a_reward_whose_scores_are_all_equal_is_called_that():
    flat = PerConversationReward(lambda c: 1.0, name="flat")
    report = evaluate(flat, text_pairs(30, seed=0))
    assert report["verdict"][0] == "All scores are equal: the reward does not distinguish replies."
    assert "nan" not in json.dumps(report).lower()


def test_the_interval_of_the_temperature_is_that_of_the_likelihood_ratio():
    margins, _ = simulate(60, seed=3, temperature=0.5)
    margins = np.asarray(margins)
    found = temperature_interval(margins, list(range(60)))
    grid = np.geomspace(0.05, 20, 200_001)
    loss = np.zeros(len(grid))
    for margin in margins:
        loss += np.logaddexp(0, -margin / grid)
    inside = grid[2 * (loss - loss.min()) <= stats.t.ppf(0.975, 59) ** 2]
    assert (found.low, found.high) == pytest.approx((inside[0], inside[-1]), rel=1e-3)
    copies = temperature_interval(np.repeat(margins, 5), np.repeat(np.arange(60), 5).tolist())
    assert (copies.low, copies.high) == pytest.approx((found.low, found.high), rel=1e-6)
    assert temperature_interval(np.abs(margins), list(range(60))).needs
    assert temperature_interval(margins[:19], list(range(19))).needs.startswith("19 prompts")


def test_unscored_pairs_are_reported_even_if_one_prompt_is_left():
    rows = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(4)]
    only_p1 = PerConversationReward(
        lambda c: 1.0 if c[0]["content"] == "p1" else math.nan, name="r"
    )
    report = evaluate(only_p1, [to_pair(row) for row in rows], stress_size=0, invariance_size=0)
    assert report["verdict"] == [
        "All scored pairs have the same prompt, so there is no estimate for other prompts.",
        "3 pairs (75.0%) could not be scored and are omitted.",
    ]
