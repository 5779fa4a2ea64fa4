"""Caveats of an evaluation, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evaluation.metrics import opening_of, unit_name, unit_of

ENVIRONMENT = "environment: "
"""Start of the keys of `counts` that `EnvCalls` reports."""


def unscored_metrics(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return reward -> {"scored", "episodes", "reasons"}, for rewards with missing scores.

    `counts` are the counts that the rewards reported: "NAME: reason" -> number.
    """
    missing: Counter[str] = Counter()
    for row in rows:
        missing.update(name for name, value in row["components"].items() if value is None)
    return {
        name: {
            "scored": len(rows) - number,
            "episodes": len(rows),
            "reasons": {
                key.removeprefix(f"{name}: "): count
                for key, count in counts.items()
                if key.startswith(f"{name}: ") and not key.endswith(": truncated")
            },
        }
        for name, number in missing.items()
    }


def evaluation_caveats(
    rows: Sequence[Mapping[str, Any]],
    unscored: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, int],
) -> list[str]:
    """List caveats of a policy's episodes, given the result of `unscored_metrics` and `counts`."""
    notes = [unscored_text(name, entry) for name, entry in unscored.items()]
    notes += [
        f"{key.removesuffix(': truncated')}: {number} of {len(rows)} texts were truncated before "
        "they were scored"
        for key, number in counts.items()
        if key.endswith(": truncated") and number
    ]
    return [*notes, *_failures(rows, counts), *_repetitions(rows)]


def _failures(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> list[str]:
    """Return a note on the episodes that were dropped with `env.errors: count`."""
    failed = {key: number for key, number in counts.items() if key.startswith(ENVIRONMENT)}
    if not failed:
        return []
    dropped = sum(failed.values())
    reasons = "; ".join(f"{key.removeprefix(ENVIRONMENT)} ({n})" for key, n in failed.items())
    return [
        f"{dropped} of {len(rows) + dropped} episodes were dropped because their environment "
        f"failed, so the results are those of the others: {reasons}"
    ]


def unscored_text(name: str, entry: Mapping[str, Any]) -> str:
    """Format a caveat, such as `exact_match: 0 of 4 scored: no reference answer`."""
    missing = entry["episodes"] - entry["scored"]
    reasons = (entry.get("reasons") or {}).items()
    listed = ", ".join(what if n == missing else f"{what} ({n})" for what, n in reasons)
    scored = f"{name}: {entry['scored']} of {entry['episodes']} scored"
    return f"{scored}: {listed}" if listed else scored


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
    names = [unit_of(row) for row in rows]
    units = len(set(names))
    if units < len(rows):
        unit = unit_name(names)
        notes.append(
            f"{len(rows)} greedy episodes repeat {units} {unit}: n = {units}; more {unit} narrow "
            "the intervals, more episodes do not"
        )
    different = len({repr(row.get("messages")) for row in rows})
    openings = len({repr(opening_of(row.get("messages") or [])) for row in rows})
    if units == len(rows) and openings == different < len(rows) / 2:
        notes.append(
            f"{len(rows)} greedy episodes contain {different} different conversations: if the "
            "environment has a list of tasks, set info['prompt_index'] to the index of the task, "
            "which makes the task the unit of the intervals"
        )
    return notes
