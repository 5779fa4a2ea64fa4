"""Shapley values of words for rewards without gradients."""

from __future__ import annotations

import sys

import pytest

from rlhf.config.explain import AttributionSpec
from rlhf.errors import UserError
from rlhf.explain import Explanation
from rlhf.explain.reward.explainer import RewardExplainer
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import Unscorable, last_reply
from tests.explain.rewards import PAIRS, pair

VALUES = {"wine": 5.0, "good": 1.0, "bad": -2.0}
SHAPLEY = AttributionSpec(methods=["shapley"], orders=30)


@pytest.fixture(autouse=True)
def captum():
    pytest.importorskip("captum")


def words_reward(function):
    return PerConversationReward(lambda talk: function(last_reply(talk).split()), name="rule")


def explained(reward, item, options=SHAPLEY):
    (found,) = RewardExplainer(reward, options).explain_pairs([item]).pairs
    return found


def test_words_of_an_additive_reward_have_their_own_values():
    reward = words_reward(lambda words: sum(VALUES.get(word, 0.0) for word in words))
    found = explained(reward, pair("tell me", "good wine, good", "bad  good\nwine"))
    assert found.chosen.tokens == ["tell me\n", "good", " wine,", " good"]
    assert found.chosen.parts == ["prompt", "reply", "reply", "reply"]
    assert found.chosen.attributions["shapley"] == pytest.approx([0.0, 1.0, 0.0, 1.0])
    assert found.rejected.tokens[1:] == ["bad", "  good", "\nwine"]
    assert found.rejected.attributions["shapley"][1:] == pytest.approx([2.0, -1.0, -5.0])
    assert found.margin == 2.0 - 4.0
    assert found.counterfactual.flips
    assert found.counterfactual.words[0].text == "wine"


def test_words_that_only_count_together_share_their_value():
    reward = words_reward(lambda words: 6.0 * ("a" in words and "b" in words) + len(words))
    options = AttributionSpec(methods=["shapley"], orders=400)
    found = explained(reward, pair("q", "a x b", "y"), options)
    values = found.chosen.attributions["shapley"][1:]
    assert values[1] == pytest.approx(1.0)
    assert values[0] + values[2] == pytest.approx(8.0)  # exact in every order
    assert 3.4 < values[0] < 4.6  # 4 on average, with a standard error of 0.15; seed 0
    assert sum(values) == pytest.approx(found.chosen.score)


def test_the_same_seed_gives_the_same_values():
    reward = words_reward(lambda words: float(len(set(words)) ** 2))
    first, second, other = (
        RewardExplainer(reward, AttributionSpec(methods=["shapley"], orders=3), seed=seed)
        .explain_pairs([pair("q", "a b a c a d", "b")])
        .pairs[0]
        .chosen.attributions["shapley"]
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


def test_texts_that_cannot_be_scored_without_words_are_skipped():
    def no_score_of_short_texts(words):
        if len(words) < 2:
            raise Unscorable("too short")
        return 1.0

    reward = words_reward(no_score_of_short_texts)
    explanation = RewardExplainer(reward, SHAPLEY).explain_pairs([pair("q", "a b", "c d")])
    assert explanation.pairs == []
    assert explanation.skipped == {"rule: too short": 1}
    assert "skipped: rule: too short" in Explanation("Rule", reward=explanation).to_html()


def test_an_empty_reply_has_no_words():
    reward = words_reward(lambda words: float(len(words)))
    found = explained(reward, pair("q", "", "a"))
    assert found.chosen.attributions["shapley"] == [0.0]
    page = Explanation(
        "Rule", reward=RewardExplainer(reward, SHAPLEY).explain_pairs(PAIRS)
    ).to_html()
    assert "Shapley value" in page
    assert "Template and special tokens" not in page


def test_a_missing_captum_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(UserError, match=r'needs captum: pip install "rlhf-kit\[explain\]"'):
        RewardExplainer(words_reward(len), SHAPLEY)


def test_a_reward_without_a_model_needs_shapley_values():
    with pytest.raises(UserError, match=r"set attribution.methods to \[shapley\]"):
        RewardExplainer(words_reward(len))
    with pytest.raises(UserError, match="train_pairs needs a reward with a model"):
        RewardExplainer(words_reward(len), SHAPLEY, train_pairs=PAIRS)
