"""Write the caveats of an evaluation, each as one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.text import count_text
from rlhf.evaluation.metrics import independent_unit_of, messages_before_first_reply, unit_name

ENVIRONMENT_PREFIX = "environment: "
"""Prefix of the keys of `counts` that count failures of environments, see `EnvironmentCaller`."""


def missing_scores_by_reward(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return, for each reward with missing scores, the number of scores and the reasons.

    Args:
        rows: Episodes of one policy.
        counts: Counts that the rewards reported: "NAME: reason" -> number.

    Returns:
        Name of the reward -> a dictionary with ``scored`` (number of episodes with a score),
        ``episodes`` (number of all episodes) and ``reasons`` (reason -> number of missing scores).
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
    """Return the caveats that apply to the episodes of a policy.

    The caveats are about missing scores, truncated texts, environment failures and repeated
    episodes.

    Args:
        rows: Episodes of the policy.
        unscored: Result of `missing_scores_by_reward`.
        counts: "NAME: reason" -> number, as for `missing_scores_by_reward`.
    """
    notes = [missing_scores_text(name, entry) for name, entry in unscored.items()]
    notes += [
        f"{key.removesuffix(': truncated')}: {number} of {len(rows)} texts were truncated before "
        "they were scored"
        for key, number in counts.items()
        if key.endswith(": truncated") and number
    ]
    return [*notes, *_environment_failure_notes(rows, counts), *_repetition_notes(rows)]


def _environment_failure_notes(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
) -> list[str]:
    """Return a note on episodes that were dropped because their environment failed.

    Episodes are dropped only with `env.errors: count`. The list is empty if none was dropped.
    """
    failed = {key: number for key, number in counts.items() if key.startswith(ENVIRONMENT_PREFIX)}
    if not failed:
        return []
    dropped = sum(failed.values())
    reasons = "; ".join(
        f"{key.removeprefix(ENVIRONMENT_PREFIX)} ({n})" for key, n in failed.items()
    )
    return [
        f"{dropped} of {len(rows) + dropped} episodes were dropped because their environment "
        f"failed; the results are those of the remaining episodes: {reasons}"
    ]


def missing_scores_text(name: str, entry: Mapping[str, Any]) -> str:
    """Return a caveat on missing scores, such as `exact_match: 0 of 4 scored: no reference answer`.

    `entry` is the value for the reward `name` in the result of `missing_scores_by_reward`.
    """
    missing = entry["episodes"] - entry["scored"]
    reasons = (entry.get("reasons") or {}).items()
    listed = ", ".join(what if n == missing else f"{what} ({n})" for what, n in reasons)
    scored = f"{name}: {entry['scored']} of {entry['episodes']} scored"
    return f"{scored}: {listed}" if listed else scored


def _repetition_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return notes on repeated seeds, and on repeated prompts or replies of a greedy policy."""
    notes = []
    samples = Counter((row["seed"], row.get("sample", 0)) for row in rows)
    if repeated := sum(number - 1 for number in samples.values()):
        notes.append(
            f"{repeated} of {len(rows)} episodes repeat an evaluation seed; all episodes of one "
            "seed count as one unit"
        )
    if any(row.get("decoding") != "greedy" for row in rows):
        return notes
    names = [independent_unit_of(row) for row in rows]
    units = len(set(names))
    if units < len(rows):
        unit = unit_name(names)
        episodes = count_text(len(rows), "greedy episode")
        found = count_text(units, unit.removesuffix("s"))
        notes.append(
            f"{episodes} repeat {found}: n = {units}; to narrow the "
            f"intervals, evaluate more {unit}, not more episodes"
        )
    different = len({repr(row.get("messages")) for row in rows})
    openings = len({repr(messages_before_first_reply(row.get("messages") or [])) for row in rows})
    if units == len(rows) and openings == different < len(rows) / 2:
        notes.append(
            f"{len(rows)} greedy episodes contain {different} different conversations: if the "
            "environment has a list of tasks, set info['prompt_index'] to the index of the task, "
            "so that the task is the unit of the intervals"
        )
    return notes
