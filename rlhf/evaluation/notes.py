"""Caveats of an evaluation, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evaluation.metrics import opening_of, unit_of


def unscored_metrics(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Rewards that could not score every episode, with the number scored and the reasons.

    Args:
        rows: episodes.
        counts: counts reported by the rewards, by "NAME: reason".

    Returns:
        Reward -> {"scored", "episodes", "reasons"}, without rewards that scored every episode.
    """
    missing: Counter[str] = Counter()
    for row in rows:
        missing.update(name for name, value in row["components"].items() if value is None)
    return {
        name: {
            "scored": len(rows) - number,
            "episodes": len(rows),
            "reasons": {
                what: count
                for what, count in _counts_of(name, counts).items()
                if what != "truncated"
            },
        }
        for name, number in missing.items()
    }


def notes_on(
    rows: Sequence[Mapping[str, Any]],
    unscored: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, int],
) -> list[str]:
    """Caveats for the terminal, the summary and the page.

    Args:
        rows: episodes of one policy.
        unscored: result of `unscored_metrics`.
        counts: counts reported by the rewards, by "NAME: reason".
    """
    notes = [unscored_words(name, entry) for name, entry in unscored.items()]
    notes += [
        f"{name}: {number} of {len(rows)} texts were truncated before they were scored"
        for name, number in _truncated(counts).items()
    ]
    return notes + _repetitions(rows)


def unscored_words(name: str, entry: Mapping[str, Any]) -> str:
    """`exact_match: 0 of 4 scored: no reference answer`."""
    reasons = dict(entry.get("reasons") or {})
    words = ", ".join(
        what if count == entry["episodes"] - entry["scored"] else f"{what} ({count})"
        for what, count in reasons.items()
    )
    return f"{name}: {entry['scored']} of {entry['episodes']} scored" + (
        f": {words}" if words else ""
    )


def _counts_of(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    prefix = f"{name}: "
    return {key.removeprefix(prefix): n for key, n in counts.items() if key.startswith(prefix)}


def _truncated(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        key.removesuffix(": truncated"): number
        for key, number in counts.items()
        if key.endswith(": truncated") and number
    }


def _repetitions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    samples = Counter((row["seed"], row.get("sample", 0)) for row in rows)
    if repeated := sum(number - 1 for number in samples.values()):
        notes.append(
            f"{repeated} of {len(rows)} episodes repeat an evaluation seed; they count as one unit "
            "with the first"
        )
    if any(row.get("decoding") != "greedy" for row in rows):
        return notes
    units = len({unit_of(row) for row in rows})
    if units < len(rows):
        notes.append(
            f"{len(rows)} greedy episodes repeat {units} prompts: n = {units}; more prompts narrow "
            "the intervals, more episodes do not"
        )
    elif (different := _conversations(rows)) < len(rows) / 2 and _openings(rows) == different:
        notes.append(
            f"{len(rows)} greedy episodes hold {different} different conversations: an environment "
            "with a list of tasks should name the task in info['prompt_index'], which makes it the "
            "unit of the intervals"
        )
    return notes


def _conversations(rows: Sequence[Mapping[str, Any]]) -> int:
    return len({repr(row.get("messages")) for row in rows})


def _openings(rows: Sequence[Mapping[str, Any]]) -> int:
    return len({repr(opening_of(row.get("messages") or [])) for row in rows})
