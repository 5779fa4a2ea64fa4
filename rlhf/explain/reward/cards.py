"""Render the cards that explain the scores of a reward for pairs and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.explain.counterfactuals import Counterfactual
from rlhf.explain.neighbors import Neighbor
from rlhf.explain.prompt_influence import PromptInfluence
from rlhf.explain.reward.explanation import PairExplanation, RewardExplanation, TextExplanation
from rlhf.explain.token_markup import ShadedTokens, strongest_tokens_text
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.markup import esc, interval_text, number_text
from rlhf.reports.tokens import html_with_shading_selector

_MARGIN_NOTE = (
    "Green tokens support the chosen reply, red tokens the rejected reply. Point at a token to see "
    "its values. Each card has its own scale."
)
_SCORE_NOTE = (
    "Green tokens raise the score, red tokens lower it. Point at a token to see its values. Each "
    "card has its own scale."
)
_FIRST_COLOR_NOTE = (
    " Integrated gradients color the tokens first, because gradient × input can miss decisive "
    "tokens."
)
_MAX_CHARACTERS = 300
"""Maximum number of characters of a text of a training pair."""


def pair_cards_html(reward: RewardExplanation, method_names: Mapping[str, str]) -> str:
    """Return a card for each pair with both replies and the explanations of the margin.

    Args:
        reward: The explanation.
        method_names: Method -> name on the page.
    """
    if not reward.pairs:
        return ""
    methods = list(reward.pairs[0].chosen.attributions)
    cards = [
        _pair_card_html(number, pair, methods, method_names)
        for number, pair in enumerate(reward.pairs, start=1)
    ]
    return _shaded_cards_html(methods, method_names, _MARGIN_NOTE, cards)


def text_cards_html(reward: RewardExplanation, method_names: Mapping[str, str]) -> str:
    """Return a card for each single text."""
    if not reward.texts:
        return ""
    methods = list(reward.texts[0].attributions)
    cards = []
    for number, text in enumerate(reward.texts, start=1):
        table = ShadedTokens([method_names[m] for m in methods])
        prompt = _part_html(table, text, "prompt", method_names)
        body = _part_html(table, text, "reply", method_names)
        title = f"text {number} · score {number_text(text.score)}"
        title += _integration_steps_and_gap_text([text])
        cards.append(
            f'<article class="case tokens" data-tokens="{table.values_attribute_html}">'
            f'<header class="prompt">'
            f'<small>{esc(title)}</small>{prompt}</header><div class="columns"><div>{body}'
            f"{_strongest_tokens_html(text, methods[-1])}</div></div></article>"
        )
    return _shaded_cards_html(methods, method_names, _SCORE_NOTE, cards)


def _shaded_cards_html(
    methods: Sequence[str], method_names: Mapping[str, str], note: str, cards: Sequence[str]
) -> str:
    """Return cards that are first shaded by the last of the methods.

    If this is integrated gradients and there are other methods, the note gives the reason.
    """
    if len(methods) > 1 and methods[-1] == "integrated_gradients":
        note += _FIRST_COLOR_NOTE
    return html_with_shading_selector(
        [method_names[m] for m in methods], method_names[methods[-1]], note, cards
    )


def _pair_card_html(
    number: int, pair: PairExplanation, methods: Sequence[str], method_names: Mapping[str, str]
) -> str:
    table = ShadedTokens([method_names[m] for m in methods])
    prompt = _prompt_html(table, pair, method_names)
    columns = "".join(
        f"<div><h4>{title} <span>score {number_text(text.score)}</span></h4>"
        f"{_part_html(table, text, 'reply', method_names)}"
        f"{_strongest_tokens_html(text, methods[-1])}</div>"
        for title, text in (("Chosen", pair.chosen), ("Rejected", pair.rejected))
    )
    title = f"pair {number} · margin {number_text(pair.margin)}, {_verdict_text(pair.margin)}"
    title += _integration_steps_and_gap_text([pair.chosen, pair.rejected])
    details = _prompt_influence_html(pair.prompt_influence)
    details += _counterfactual_html(pair.counterfactual)
    return (
        f'<article class="case tokens" data-tokens="{table.values_attribute_html}">'
        f'<header class="prompt">'
        f'<small>{esc(title)}</small>{prompt}</header><div class="columns">{columns}</div>'
        f'<div class="details">{details}{_prefix_chart_html(pair)}'
        f"{_neighbors_html(pair.neighbors)}</div></article>"
    )


def _verdict_text(margin: float) -> str:
    if margin == 0:
        return "prefers neither reply"
    return "prefers the chosen reply" if margin > 0 else "prefers the rejected reply"


def _prompt_html(
    table: ShadedTokens, pair: PairExplanation, method_names: Mapping[str, str]
) -> str:
    """Return the tokens of the prompt, with the sums of their attributions in both texts.

    If the two texts do not have the same tokens of the prompt, as after truncation, the prompt of
    the chosen text is shown with its own attributions.
    """
    chosen, rejected = (_positions_of_part(text, "prompt") for text in (pair.chosen, pair.rejected))
    tokens = [pair.chosen.tokens[i] for i in chosen]
    same = tokens == [pair.rejected.tokens[i] for i in rejected]
    values = {}
    for method, name in method_names.items():
        if method in pair.chosen.attributions:
            of_chosen, of_rejected = (
                text.attributions[method] for text in (pair.chosen, pair.rejected)
            )
            values[name] = [
                of_chosen[i] + (of_rejected[j] if same else 0.0)
                for i, j in zip(chosen, rejected if same else chosen, strict=True)
            ]
    return table.append_tokens_html(tokens, values) if tokens else ""


def _part_html(
    table: ShadedTokens, text: TextExplanation, part: str, method_names: Mapping[str, str]
) -> str:
    """Return the tokens of one part of a text."""
    positions = _positions_of_part(text, part)
    if not positions:
        return (
            '<div class="turn"><span class="note">(empty)</span></div>' if part == "reply" else ""
        )
    values = {
        method_names[method]: [column[i] for i in positions]
        for method, column in text.attributions.items()
    }
    return table.append_tokens_html([text.tokens[i] for i in positions], values)


def _positions_of_part(text: TextExplanation, part: str) -> list[int]:
    return [i for i, name in enumerate(text.parts) if name == part]


def _strongest_tokens_html(text: TextExplanation, method: str) -> str:
    """Return the strongest tokens of the reply, and the part of the score from the template.

    With integrated gradients, this part is the reference score, because the reference text contains
    the tokens of the template. With other methods, it is the sum of their attributions.
    """
    values = text.attributions[method]
    strongest = strongest_tokens_text(text.tokens, values, _positions_of_part(text, "reply"))
    template = _positions_of_part(text, "template")
    lines = [f"Strongest: {strongest}."] if strongest else []
    if method == "integrated_gradients" and text.reference_score is not None:
        lines.append(f"Reference score: {number_text(text.reference_score)}.")
    elif template:
        total = number_text(sum(values[i] for i in template))
        lines.append(f"Template and special tokens: {total}.")
    return f'<p class="note">{esc(" ".join(lines))}</p>'


def _integration_steps_and_gap_text(texts: Sequence[TextExplanation]) -> str:
    """Return the steps and the completeness gap of integrated gradients, if they were computed."""
    if any(text.steps is None or text.gap is None for text in texts):
        return ""
    steps = sum(text.steps or 0 for text in texts)
    gap = sum(text.gap or 0.0 for text in texts)
    return f" · {steps:,} gradients, completeness gap {number_text(gap)}"


def _prompt_influence_html(influence: PromptInfluence | None) -> str:
    if influence is None:
        return ""
    parts = []
    if influence.share is not None:
        parts.append(f"{influence.share:.0%} of the absolute attributions are in the prompt")
    if influence.without_prompt is not None:
        parts.append(f"the margin is {number_text(influence.without_prompt)} with an empty prompt")
    if (other := influence.other_prompts) is not None:
        bounds = f" {interval_text(other)}" if other.known else ""
        after = "another prompt" if other.units == 1 else f"{other.units} other prompts"
        parts.append(f"it is {number_text(other.value)}{bounds} after {after}")
    return f"<p><b>Prompt.</b> {esc('; '.join(parts))}.</p>" if parts else ""


def _counterfactual_html(edit: Counterfactual | None) -> str:
    if edit is None:
        return ""
    words = ", ".join(f"“{word.text}” ({word.side})" for word in edit.words)
    outcome = "flips the verdict" if edit.flips else "does not flip the verdict"
    text = f"Deleting {words} {outcome}: the margin becomes {number_text(edit.margin)}"
    return f"<p><b>Counterfactual.</b> {esc(text)} ({edit.evaluations} pairs scored).</p>"


def _prefix_chart_html(pair: PairExplanation) -> str:
    series = [
        Series(name, curve.tokens, curve.scores, color)
        for name, color, curve in (
            ("chosen", "gold", pair.chosen.prefixes),
            ("rejected", "c6", pair.rejected.prefixes),
        )
        if curve is not None and curve.tokens
    ]
    if not series:
        return ""
    note = "Each prefix is followed by the tokens that end the conversation."
    return charts_html([Chart("Score if the reply ended here", series, note, "token")])


def _neighbors_html(neighbors: Sequence[Neighbor]) -> str:
    if not neighbors:
        return ""
    items = "".join(
        f"<li>cosine {number_text(n.similarity)}, margin {number_text(n.margin)}, row {n.index}"
        f'<div class="turn"><i>prompt</i>{esc(_shortened(n.prompt))}</div>'
        f'<div class="turn"><i>chosen</i>{esc(_shortened(n.chosen))}</div>'
        f'<div class="turn"><i>rejected</i>{esc(_shortened(n.rejected))}</div></li>'
        for n in neighbors
    )
    summary = f"<summary>Nearest training pairs ({len(neighbors)})</summary>"
    return f'<details class="fold">{summary}<ol>{items}</ol></details>'


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
