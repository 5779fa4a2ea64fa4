"""Show transcripts side by side: before and after training, or for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.numbers import is_number
from rlhf.evaluation.compare import Comparison
from rlhf.evaluation.records import RunRecord
from rlhf.evaluation.run_groups import method_evaluations
from rlhf.reports.markup import (
    capital_acronyms_html,
    capitalize_acronyms,
    esc,
    number_text,
    with_minus_signs,
)

_MAX_CASES = 4
"""Maximum number of seeds that are shown."""
_MAX_VISIBLE_CHARACTERS = 700
"""Number of characters of a message that are visible without unfolding."""
_MAX_CHARACTERS = 20_000
"""Maximum number of characters of a message on the page."""


@dataclass(frozen=True)
class TranscriptColumn:
    """A column of a transcript card: title, score and conversation."""

    title: str
    score: str
    messages: Sequence[Mapping[str, str]]


def samples_before_and_after_html(run: RunRecord) -> str:
    """Return cards with samples of the same seed before and after training, as HTML.

    At most `_MAX_CASES` seeds are selected by the change of the score. Without scores, these are
    the first seeds.
    """
    early = {int(row["seed"]): row for row in run.samples if row.get("split") == "before"}
    late = {int(row["seed"]): row for row in run.samples if row.get("split") == "after"}
    seeds = [seed for seed in early if seed in late]
    chosen = _select_seeds_by_change(
        [(_change(_sample_score(early[s]), _sample_score(late[s])), s) for s in seeds]
    )
    if not any("score" in row or "return_trained" in row for row in run.samples):
        # Samples of offline training have no scores.
        chosen = [("Held-out prompt", seed) for seed in seeds[:_MAX_CASES]]
    cards = []
    for description, seed in chosen:
        replies = [
            TranscriptColumn(
                "Before training",
                sample_scores_text(early[seed]),
                early[seed].get("messages") or [],
            ),
            TranscriptColumn(
                "After training", sample_scores_text(late[seed]), late[seed].get("messages") or []
            ),
        ]
        cards.append(transcript_card_html(description, f"seed {seed}", replies))
    return "".join(cards)


def methods_side_by_side_html(runs: Sequence[RunRecord], comparison: Comparison) -> str:
    """Return a card for each selected evaluation seed, with one episode of each trained method.

    The result is HTML, and empty with fewer than two trained methods. The evaluation seeds are
    selected by the difference between the last and the first method. The episodes are those of the
    smallest training seed that all methods have. If there is no common training seed, they are
    those of each method's first training seed.
    """
    columns = _episodes_by_method(runs)
    if len(columns) < 2:
        return ""
    first, last = next(iter(columns.values())), list(columns.values())[-1]
    shared = [seed for seed in first if all(seed in rows for rows in columns.values())]
    metric = comparison.metric
    chosen = _select_seeds_by_change(
        [(_change(_metric(first[s], metric), _metric(last[s], metric)), s) for s in shared]
    )
    methods = capitalize_acronyms(f"{list(columns)[-1]} against {next(iter(columns))}")
    cards = []
    for description, seed in chosen:
        replies = [
            TranscriptColumn(
                name,
                _score_text(metric, _metric(rows[seed], metric)),
                rows[seed]["messages"],
            )
            for name, rows in columns.items()
        ]
        cards.append(
            transcript_card_html(f"{description} ({methods})", f"evaluation seed {seed}", replies)
        )
    return "".join(cards)


def _episodes_by_method(runs: Sequence[RunRecord]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return method -> evaluation seed -> episode, for one training seed of each trained method."""
    episodes: dict[str, dict[int, dict[int, Mapping[str, Any]]]] = {}
    for item in method_evaluations(runs):
        rows = {row["seed"]: row for row in item.evaluation.episodes if row.get("messages")}
        if rows and not item.has_untrained_policy:
            episodes.setdefault(item.method, {}).setdefault(item.seed, rows)
    common = set.intersection(*(set(seeds) for seeds in episodes.values())) if episodes else set()
    return {
        name: seeds[min(common)] if common else next(iter(seeds.values()))
        for name, seeds in episodes.items()
    }


def transcript_card_html(description: str, label: str, columns: Sequence[TranscriptColumn]) -> str:
    """Return a card as HTML: the common first messages, then the rest of each column."""
    shared = _count_common_opening_messages(columns)
    opening = "".join(
        message_html(message, show_assistant_role=True) for message in columns[0].messages[:shared]
    )
    columns_html = "".join(
        f"<div><h4>{capital_acronyms_html(column.title)} <span>{esc(column.score)}</span></h4>"
        + "".join(message_html(m, show_assistant_role=False) for m in column.messages[shared:])
        + "</div>"
        for column in columns
    )
    return (
        f'<article class="case"><header class="prompt">'
        f"<small>{esc(description)} · {esc(label)}</small>"
        f'{opening}</header><div class="columns">{columns_html}</div></article>'
    )


def message_html(message: Mapping[str, str], *, show_assistant_role: bool) -> str:
    """Return a message as HTML; the end of a long message is folded.

    The role is shown, except for an assistant message if `show_assistant_role` is False.
    """
    content = str(message.get("content", ""))
    role = str(message.get("role", ""))
    shown = role != "assistant" or show_assistant_role
    name = f"<i>{esc(role)}</i>" if shown else ""
    head, rest = content[:_MAX_VISIBLE_CHARACTERS], content[_MAX_VISIBLE_CHARACTERS:_MAX_CHARACTERS]
    omitted = len(content) - _MAX_CHARACTERS
    end = f" [{omitted:,} characters omitted]" if omitted > 0 else ""
    if not content.strip():
        return f'<div class="turn">{name}<span class="note">(empty)</span></div>'
    fold = f"<details><summary>{len(rest):,} more characters</summary>{esc(rest + end)}</details>"
    return f'<div class="turn">{name}{esc(head)}{fold if rest else ""}</div>'


def _count_common_opening_messages(columns: Sequence[TranscriptColumn]) -> int:
    """Return the number of messages before the first reply that are equal in all columns."""
    shortest = min(len(column.messages) for column in columns)
    for index in range(shortest):
        messages = [column.messages[index] for column in columns]
        if messages[0].get("role") == "assistant" or any(m != messages[0] for m in messages):
            return index
    return shortest


def _select_seeds_by_change(changes: list[tuple[float | None, int]]) -> list[tuple[str, int]]:
    """Select the seeds with the largest and the smallest change, and two that rank between them.

    If at most `_MAX_CASES` seeds have a change that is not None, they are all selected, and the
    others are added at the end until the number of cards is `_MAX_CASES`.

    Returns:
        (description of the change, seed) pairs.
    """
    known = [(delta, seed) for delta, seed in changes if delta is not None]
    order = sorted(known, key=lambda pair: (-pair[0], pair[1]))
    if len(order) <= _MAX_CASES:
        selected = [(_change_text(delta), seed) for delta, seed in order]
        unknown = [("not scored", seed) for delta, seed in changes if delta is None]
        return [*selected, *unknown][:_MAX_CASES]
    ranks = [0, len(order) // 3, len(order) // 2, len(order) - 1]
    labels = ["Largest gain", "67th percentile", "Median", "Largest loss"]
    if order[0][0] < 0:
        labels[0] = "Smallest loss"
    if order[-1][0] >= 0:
        labels[-1] = "Smallest gain"
    return [
        (f"{name}: {_change_text(order[rank][0])}", order[rank][1])
        for name, rank in zip(labels, ranks, strict=True)
    ]


def _change_text(delta: float) -> str:
    """Return a change as text with its sign."""
    return with_minus_signs(f"{delta:+.3f}") if delta else "no difference"


def _change(before: Any, after: Any) -> float | None:
    """Return the change of a score; None if one of the two is not a number."""
    return float(after) - float(before) if is_number(before) and is_number(after) else None


def _sample_score(row: Mapping[str, Any]) -> Any:
    """Return the score of a sample; samples of version 0.1.0 have only `return_trained`."""
    return row.get("score", row.get("return_trained"))


def _metric(row: Mapping[str, Any], metric: str) -> Any:
    """Return the metric of an episode as it is recorded; None if it has none."""
    return (row.get("components") or {}).get(metric, row.get(metric))


def _score_text(name: str, value: Any) -> str:
    """Return a score as text with its name; "not scored" if it is not a number."""
    return f"{name} {number_text(float(value))}" if is_number(value) else "not scored"


def sample_scores_text(row: Mapping[str, Any]) -> str:
    """Return the scores of a sample as text, such as `score 0.4 · training reward 0.3 · proxy 1.2`.

    The text is empty for a reply of offline training, which has no score.
    """
    if "score" not in row and "return_trained" not in row:
        return ""
    value, name = _sample_score(row), "score" if "score" in row else "training reward"
    parts = [_score_text(name, value)]
    shaped = row.get("return_trained")
    if is_number(shaped) and shaped != value:
        parts.append(f"training reward {number_text(float(shaped))}")  # type: ignore[arg-type]
    rewards = row.get("rewards") or {}
    parts += [f"{name} {number_text(v)}" for name, v in rewards.items() if is_number(v)]
    return " · ".join(parts)
