"""The page, the JSON file and the notebook representation of an explanation."""

from __future__ import annotations

import html
import json
import re

import pytest

from rlhf.config.explain import AttributionSpec
from rlhf.explain import Explanation, RewardExplainer
from rlhf.explain.explanation import JSON_FILE, PAGE_FILE
from rlhf.explain.page import faithfulness_sentence
from rlhf.explain.reward.explanation import RewardExplanation
from rlhf.explain.token_markup import ShadedTokens
from rlhf.reports.markup import number_text
from rlhf.reward_models.learned import LearnedReward
from rlhf.stats import Interval
from tests.explain.rewards import PAIRS, linear_reward, pair


def test_every_text_of_the_page_is_escaped(explanation):
    page = explanation.to_html()
    assert page.count("<script") == 1  # the script of the page
    assert "<img" not in page
    assert "onerror=alert(1)>" not in page
    assert "\u202e" not in page
    assert "&lt;b&gt;base" in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []  # no requests


def test_the_page_shows_each_part(explanation):
    page = explanation.to_html()
    for text in (
        "Faithfulness", "top tokens deleted", "gradient × input", "integrated gradients",
        "Score if the reply ended here", "Counterfactual.", "Nearest training pairs", "Prompt.",
        "log π/π_ref", "Weights of each block", "Norms of the weights", "completeness gap",
    ):  # fmt: skip
        assert text in page


def test_the_page_says_why_integrated_gradients_color_it_first(explanation):
    page = explanation.to_html()
    assert "<option selected>integrated gradients</option>" in page
    assert "because gradient × input can miss decisive tokens" in page


def test_the_page_shows_what_is_attributed_to_no_token_of_a_reply(explanation):
    page = explanation.to_html()
    for found in explanation.reward.pairs:
        for text in (found.chosen, found.rejected):
            assert f"Reference score: {number_text(text.reference_score)}." in page
    assert "Template and special tokens" not in page  # their integrated gradients are always 0
    reward, _ = linear_reward()
    options = AttributionSpec(methods=["gradient_x_input"], neighbors=1)
    (found,) = RewardExplainer(reward, options).explain_pairs(PAIRS[:1]).pairs
    page = Explanation("x", reward=RewardExplanation("x", pairs=[found])).to_html()
    values = zip(found.chosen.parts, found.chosen.attributions["gradient_x_input"], strict=True)
    total = sum(value for part, value in values if part == "template")
    assert f"Template and special tokens: {number_text(total)}." in page
    assert "Reference score" not in page


def test_a_template_has_no_attribution_of_either_sign(explanation):
    """The attributions of a rejected text were −0.0, which the page showed as −0.000."""
    for found in explanation.reward.pairs:
        for text in (found.chosen, found.rejected):
            values = zip(text.parts, text.attributions["integrated_gradients"], strict=True)
            assert {str(value) for part, value in values if part == "template"} == {"0.0"}
    assert number_text(-0.0) == number_text(0.0) == "0.000"


def test_tokens_of_the_page_are_the_texts_and_their_values(explanation):
    page = explanation.to_html()
    card = page.split('<article class="case tokens"')[2]  # the first pair of PAIRS
    table = json.loads(html.unescape(re.search(r'data-tokens="([^"]*)"', card)[1]))
    tokens = [html.unescape(t) for t in re.findall(r'<span data-at="\d+">(.*?)</span>', card)]
    text = PAIRS[0]
    replies = [talk[-1]["content"] for talk in (text.prompt, text.chosen, text.rejected)]
    assert "".join(tokens) == "".join(replies)
    assert {len(column) for column in table.values()} == {len(tokens)}
    found = explanation.reward.pairs[1]
    method = "integrated_gradients"
    both = zip(found.chosen.parts, found.chosen.attributions[method], strict=True)
    chosen = [value for part, value in both if part == "reply"]
    start = len([part for part in found.chosen.parts if part == "prompt"])
    shown = table["integrated gradients"][start : start + len(chosen)]
    assert shown == pytest.approx(chosen, rel=1e-3, abs=1e-9)


def test_the_json_file_has_the_whole_explanation(explanation, tmp_path):
    page = explanation.save(tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / PAGE_FILE
    content = json.loads((page.parent / JSON_FILE).read_text(encoding="utf-8"))
    found = content["reward"]["pairs"][0]
    assert found["margin"] == explanation.reward.pairs[0].margin
    assert "onerror" in "".join(found["chosen"]["tokens"])
    assert len(found["chosen"]["tokens"]) == len(
        found["chosen"]["attributions"]["gradient_x_input"]
    )
    gain = content["reward"]["faithfulness"][0]["overall"]["gain"]
    assert gain["low"] is None  # four pairs have no interval
    assert "an interval needs" in gain["needs"]
    assert content["stages"][0]["kl"]["n"] == 1
    assert content["policy"][0]["values"] is None


def test_a_notebook_shows_the_page_in_a_frame(explanation):
    frame = explanation._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == explanation.to_html()


def test_an_explanation_of_texts_or_of_nothing_is_a_page_too():
    reward, _ = linear_reward(template=False)
    texts = [[{"role": "assistant", "content": "the fox"}], [{"role": "assistant", "content": ""}]]
    explained = RewardExplainer(reward).explain_texts(texts)
    page = Explanation("Texts", reward=explained).to_html()
    assert "text 1" in page
    assert "(empty)" in page
    assert "<h1>Nothing</h1>" in Explanation("Nothing").to_html()


def test_the_verdict_follows_from_the_interval():
    above, around = Interval(1.0, 0.5, 1.5, 20), Interval(0.1, -0.5, 0.7, 20)
    assert "lowers the margin more than" in faithfulness_sentence(above)
    assert "Do not rely" in faithfulness_sentence(around)
    assert "too few pairs" in faithfulness_sentence(Interval.without_bounds(1.0, 2, "2 units"))


def test_equal_replies_prefer_neither(decoder_path):
    reward = LearnedReward.load(decoder_path)
    explained = RewardExplainer(reward).explain_pairs([pair("fox", "yes", "yes")])
    assert explained.pairs[0].margin == 0
    assert explained.pairs[0].chosen.steps < 300  # the tolerance is not 0
    assert explained.largest_relative_completeness_gap is None
    page = Explanation("equal", reward=explained).to_html()
    assert "prefers neither reply" in page
    assert "largest completeness gap" not in page


def test_values_that_are_not_finite_are_missing_on_the_page():
    table = ShadedTokens(["value"])
    table.append_tokens_html(["a", "b", "c"], {"value": [float("nan"), float("inf"), 1.0]})
    assert json.loads(html.unescape(table.values_attribute_html)) == {"value": [None, None, 1.0]}
