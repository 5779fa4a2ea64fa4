"""The deletion test: hand-worked decreases on a linear reward, beside random tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf.config.explain import AttributionSpec
from rlhf.explain.faithfulness import (
    FRACTIONS,
    AttributedText,
    measure_faithfulness,
    top_positions,
    without_positions,
)
from rlhf.explain.reward.explainer import RewardExplainer
from rlhf.explain.score_function import DifferentiableReward
from tests.explain.rewards import PAIRS, linear_reward, pair


def text(values, deletable):
    return AttributedText(list(range(len(values))), deletable, values)


def test_the_top_tokens_of_both_replies_are_selected_together():
    chosen = text([9.0, 1.0, 3.0, 2.0, 0.0, 8.0], [1, 2, 3, 4])
    rejected = text([0.0, 2.5, -1.0, 0.5, 0.1, 0.0, 0.0], [1, 2, 3, 4, 5, 6])
    assert top_positions((chosen, rejected), 0.3) == ([2, 3], [1])
    assert top_positions((chosen, rejected), 0.01) == ([2], [])


def test_each_reply_keeps_a_token():
    short, long = text([5.0, 4.0], [0, 1]), text([0.0] * 8, list(range(8)))
    selected = top_positions((short, long), 0.5)
    assert len(selected[0]) == 1
    assert len(selected[1]) == 4


def test_deletion_removes_positions():
    assert without_positions([5, 6, 7, 8], [3, 1]) == [5, 7]


def test_the_decrease_on_a_linear_reward_is_the_sum_of_the_deleted_attributions():
    reward, _ = linear_reward()
    score = DifferentiableReward(reward)
    options = AttributionSpec(methods=["gradient_x_input"])
    (explained,) = RewardExplainer(reward, options).explain_pairs(PAIRS[:1]).pairs
    sides = tuple(
        AttributedText(
            reward.encode(conversation),
            [i for i, part in enumerate(explanation.parts) if part == "reply"],
            explanation.attributions["gradient_x_input"],
        )
        for conversation, explanation in (
            (PAIRS[0].chosen, explained.chosen),
            (PAIRS[0].rejected, explained.rejected),
        )
    )
    result = measure_faithfulness(score, [sides], ["p"], method="gradient_x_input", draws=200)
    for fraction, row in zip(FRACTIONS, result.by_fraction, strict=True):
        deleted = top_positions(sides, fraction)
        expected = sum(
            s.attributions[i] for s, top in zip(sides, deleted, strict=True) for i in top
        )
        assert row.top.value == pytest.approx(expected, abs=1e-4)
        # A random deletion of k of n tokens removes k/n of the sum on average.
        mean = sum(
            len(top) * np.mean([s.attributions[i] for i in s.deletable])
            for s, top in zip(sides, deleted, strict=True)
        )
        spread = sum(len(top) for top in deleted) * np.std(
            sides[0].attributions + sides[1].attributions
        )
        assert abs(row.random.value - mean) < 5 * spread / np.sqrt(200)
    assert not result.overall.gain.known  # one pair has no interval


def test_attributions_of_a_linear_reward_are_faithful_and_their_negatives_are_not():
    reward, _ = linear_reward()
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "yes", "no"]
    generator = np.random.default_rng(0)
    pairs = [
        pair(f"prompt {i}", *(" ".join(generator.choice(words, 9)) for _ in range(2)))
        for i in range(20)
    ]
    options = AttributionSpec(methods=["gradient_x_input"], prefix_points=0, other_prompts=0)
    explainer = RewardExplainer(reward, options)
    (result,) = explainer.explain_pairs(pairs, shown=1, measure_on=20).faithfulness
    assert result.pairs == 20
    assert result.overall.gain.low > 0
    assert result.overall.top.units == 20
    assert result.overall.gain.value == pytest.approx(
        result.overall.top.value - result.overall.random.value
    )

    wrong_sides = [
        tuple(
            replace(side, attributions=[-value for value in side.attributions])
            for side in (
                explainer.attributor.attributed_text_for_deletion(
                    talk, num_prompt_messages=1, side=name, method="gradient_x_input", scale=1.0
                )
                for name, talk in (("chosen", item.chosen), ("rejected", item.rejected))
            )
        )
        for item in pairs
    ]
    clusters = [item.prompt_json for item in pairs]
    wrong = measure_faithfulness(
        explainer.attributor.reward, wrong_sides, clusters, method="gradient_x_input"
    )
    assert wrong.overall.gain.high < 0


def test_pairs_without_a_token_to_delete_are_not_measured():
    reward, _ = linear_reward()
    explainer = RewardExplainer(reward, AttributionSpec(methods=["gradient_x_input"]))
    short = [pair("fox", "1", "2"), pair("dog", "", "yes no")]
    assert explainer.explain_pairs(short, measure_on=2).faithfulness == []
    (result,) = explainer.explain_pairs([*short, *PAIRS], measure_on=5).faithfulness
    assert result.pairs == len(PAIRS)
