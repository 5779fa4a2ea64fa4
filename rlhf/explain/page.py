"""Build the page of an explanation, in the style of the other reports."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.common.text import count_text
from rlhf.explain.model_differences import StageDifference
from rlhf.explain.policy_cards import policy_cards_html
from rlhf.explain.policy_view import PolicyExplanation
from rlhf.explain.reward.cards import pair_cards_html, text_cards_html
from rlhf.explain.reward.explanation import RewardExplanation
from rlhf.explain.stage_section import stage_difference_html
from rlhf.reports.forest import ForestRow, titled_forest_plot_html
from rlhf.reports.markup import esc, interval_text, number_text, section_html
from rlhf.reports.page import page_html
from rlhf.reports.rewards import color_class_of_gain
from rlhf.stats import Interval

METHOD_NAMES = {
    "gradient_x_input": "gradient × input",
    "integrated_gradients": "integrated gradients",
    "shapley": "Shapley value",
}
"""Attribution method -> name on the page."""


def explanation_page_html(
    title: str,
    reward: RewardExplanation | None,
    policy: Sequence[PolicyExplanation],
    stages: Sequence[StageDifference],
) -> str:
    """Return the page as an HTML document."""
    parts = [
        f'<header><h1>{esc(title)}</h1><p class="lede">{esc(_subtitle_text(reward))}</p></header>'
    ]
    if reward is not None:
        parts += [
            section_html("Faithfulness", _faithfulness_html(reward)),
            section_html("Pairs", pair_cards_html(reward, METHOD_NAMES)),
            section_html("Texts", text_cards_html(reward, METHOD_NAMES)),
        ]
    parts.append(section_html("Policy", policy_cards_html(policy)))
    parts += [
        section_html(f"{stage.before} to {stage.after}", stage_difference_html(stage))
        for stage in stages
    ]
    return page_html(title, "\n".join(part for part in parts if part))


def _subtitle_text(reward: RewardExplanation | None) -> str:
    """Return the line below the title."""
    if reward is None:
        return ""
    facts = [f"reward {reward.reward}"]
    if reward.pairs:
        facts.append(count_text(len(reward.pairs), "pair"))
    if reward.texts:
        facts.append(count_text(len(reward.texts), "text"))
    if reward.margin_std is not None:
        facts.append(f"standard deviation of the margins {number_text(reward.margin_std)}")
    if reward.largest_relative_completeness_gap is not None:
        facts.append(f"largest completeness gap {reward.largest_relative_completeness_gap:.2%}")
    facts += [f"{count:,} skipped: {reason}" for reason, count in reward.skipped.items()]
    return " · ".join(facts)


def _faithfulness_html(reward: RewardExplanation) -> str:
    """Return the verdicts and the forest plots of the deletions."""
    parts = []
    for result in reward.faithfulness:
        name = METHOD_NAMES[result.method]
        rows = [
            _forest_row("top tokens deleted", result.overall.top, "c1"),
            _forest_row("random tokens deleted", result.overall.random, "c5"),
            _forest_row(
                "difference", result.overall.gain, color_class_of_gain(result.overall.gain)
            ),
        ]
        fractions = ", ".join(f"{item.fraction:.0%}" for item in result.by_fraction)
        detail = (
            f"decrease of the margin, {count_text(result.pairs, 'pair')}, {fractions} of tokens"
        )
        parts.append(titled_forest_plot_html(name, detail, rows, [(0.0, "no change")]))
        parts.append(f'<p class="note">{esc(faithfulness_sentence(result.overall.gain))}</p>')
    return "".join(parts)


def faithfulness_sentence(gain: Interval) -> str:
    """Return the verdict of the deletions as a sentence."""
    if not gain.known:
        return "There are too few pairs to compare the attributions with random tokens."
    if gain.low > 0:
        return (
            "Deleting the tokens with the largest attributions lowers the margin more than "
            "deleting as many random tokens of each reply."
        )
    return (
        "Deleting the tokens with the largest attributions does not lower the margin more than "
        "deleting random tokens. Do not rely on these attributions."
    )


def _forest_row(name: str, estimate: Interval, tone: str) -> ForestRow:
    units = count_text(estimate.units, "prompt")
    value = number_text(estimate.value)
    return ForestRow(name, units, estimate, value, interval_text(estimate), tone)
