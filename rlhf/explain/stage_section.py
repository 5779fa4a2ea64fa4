"""Render the section of a page on the differences between two stages of training."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.explain.model_differences import StageDifference, TokenChange
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.markup import Table, esc


def stage_difference_html(stage: StageDifference) -> str:
    """Return the changes of tokens, layers and norms as HTML."""
    name = f"{stage.before}-{stage.after}"
    tables = [
        Table(
            f"tokens-{name}",
            "Reply tokens",
            ["quantity", "estimate"],
            [
                ["change of the log-probability per token", stage.logprob_change],
                ["KL of the later to the earlier stage per token", stage.kl],
                ["same most likely token", stage.same_top_token],
            ],
        ),
        _token_table(f"gained-{name}", "Tokens that became more likely", stage.gained),
        _token_table(f"lost-{name}", "Tokens that became less likely", stage.lost),
        Table(
            f"norms-{name}",
            "Norms of the weights",
            ["weights", "before", "after", "relative change"],
            [[n.group, n.before, n.after, n.change] for n in stage.norms],
        ),
    ]
    replies = "1 reply" if stage.replies == 1 else f"{stage.replies:,} replies"
    head = f'<p class="note">{replies} compared; log-probabilities and KL are in nats.</p>'
    shown = "".join(f"<h3>{esc(t.title)}</h3>{t.to_html()}" for t in tables if t.rows)
    return head + charts_html(_layer_charts(stage)) + shown


def _layer_charts(stage: StageDifference) -> list[Chart]:
    layers = [float(layer.layer) for layer in stage.layers]
    weights = [layer.weights for layer in stage.layers]
    states = [layer.states for layer in stage.layers]
    cosines = [layer.cosine for layer in stage.layers]
    return [
        Chart("Weights of each block", [Series("‖ΔW‖/‖W‖", layers, weights, "c1")], "", "block"),
        Chart("Outputs of each block", [Series("‖Δh‖/‖h‖", layers, states, "c2")], "", "block"),
        Chart("Direction of the outputs", [Series("cosine", layers, cosines, "c3")], "", "block"),
    ]


def _token_table(slug: str, title: str, changes: Sequence[TokenChange]) -> Table:
    rows = [
        [f"…{change.context}" if change.context else "", change.token, change.before, change.after]
        for change in changes
    ]
    return Table(slug, title, ["text before", "token", "log p before", "log p after"], rows)
