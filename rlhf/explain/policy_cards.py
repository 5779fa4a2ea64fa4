"""Cards of a page that show what a policy assigns to each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.common.text import count_text
from rlhf.explain.policy_view import PolicyExplanation
from rlhf.explain.token_markup import ShadedTokens
from rlhf.reports.markup import esc, number_text
from rlhf.reports.tokens import html_with_shading_selector
from rlhf.reports.transcripts import message_html

_NOTE = (
    "Point at a token to see its values. Log-probabilities and entropy are in nats. Each card has "
    "its own scale."
)


def policy_cards_html(replies: Sequence[PolicyExplanation]) -> str:
    """Return a card for each reply, whose tokens are shaded by a quantity of the policy."""
    if not replies:
        return ""
    names = list(dict.fromkeys(name for reply in replies for name in _token_quantities(reply)))
    cards = []
    for number, reply in enumerate(replies, start=1):
        table, columns = ShadedTokens(names), _token_quantities(reply)
        empty: list[float | None] = [None] * len(reply.tokens)
        body = table.append_tokens_html(
            reply.tokens, {name: columns.get(name, empty) for name in names}
        )
        prompt = "".join(message_html(m, show_assistant_role=True) for m in reply.prompt)
        cards.append(
            f'<article class="case tokens" data-tokens="{table.values_attribute_html}">'
            f'<header class="prompt">'
            f"<small>{esc(_summary_text(number, reply))}</small>{prompt}</header>"
            f'<div class="columns"><div>{body}</div></div></article>'
        )
    return html_with_shading_selector(names, names[0], _NOTE, cards)


def _token_quantities(reply: PolicyExplanation) -> Mapping[str, Sequence[float | None]]:
    """Return the quantities that a reply has, by their names on the page."""
    columns = {
        "log π/π_ref": reply.log_ratio,
        "advantage": reply.advantages,
        "value": reply.values,
        "entropy": reply.entropy,
        "log π": reply.logprobs,
    }
    return {name: column for name, column in columns.items() if column is not None}


def _summary_text(number: int, reply: PolicyExplanation) -> str:
    count = max(1, len(reply.tokens))
    facts = [f"reply {number}", count_text(len(reply.tokens), "token")]
    facts.append(f"mean entropy {number_text(sum(reply.entropy) / count)}")
    if reply.log_ratio is not None:
        facts.append(f"log π/π_ref {number_text(sum(reply.log_ratio))} in total")
    if reply.score is not None:
        facts.append(f"score {number_text(reply.score)}")
    return " · ".join(facts)
