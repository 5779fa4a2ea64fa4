"""One question each about a data set; every answer is a `Finding` with its numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.leakage import GRAM, overlapping_prompts, shared_prompts
from rlhf.data.load import Loaded
from rlhf.data.splits import prompt_key, prompt_text
from rlhf.data.suspects import cross_fitted_margins
from rlhf.stats import interval, share_interval

Row = Mapping[str, Any]
Level = Literal["ok", "note", "fault"]
CountTokens = Callable[[str], int]

EXAMPLES = 3
"""Rows quoted per finding."""
TOLERATED = 0.01
"""Share of unusable, repeated or over-long rows up to which they are noted, not faulted."""
NUM_SUSPECTS = 100
"""Most pairs listed as suspects."""
MIN_FOR_SUSPECTS = 100
"""Different prompts below which a cross-fitted model learns nothing worth saying."""


@dataclass(frozen=True)
class Finding:
    """One question asked of the data, and the answer."""

    name: str
    level: Level
    verdict: str
    """The answer in one line."""
    count: int
    """Rows concerned."""
    total: int
    """Rows looked at."""
    rows: tuple[int, ...] = ()
    """Indices of the rows concerned in `Loaded.rows`, all of them."""
    examples: tuple[str, ...] = ()
    """Openings of the first of these rows' prompts; for unusable rows, where the first stands."""


def _finding(
    name: str, rows: Sequence[Row], concerned: Sequence[int], level: Level, what: str
) -> Finding:
    """A finding of `level` if it concerns any row; `what` follows the count."""
    count = len(concerned)
    share = f" ({count / len(rows):.1%})" if count else ""
    return Finding(
        name=name,
        level=level if count else "ok",
        verdict=f"{count:,} of {len(rows):,} rows{share} {what}",
        count=count,
        total=len(rows),
        rows=tuple(concerned),
        examples=tuple(_opening(rows[index]) for index in concerned[:EXAMPLES]),
    )


def unusable(loaded: Loaded) -> Finding:
    """Rows that the loader had to drop, by reason."""
    count = sum(loaded.dropped.values())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in loaded.dropped.items())
    verdict = f"{count:,} of {loaded.total:,} rows cannot be used" + (f": {reasons}" * bool(count))
    level = _graded(count, loaded.total)
    examples = tuple(f"{reason}: {place}" for reason, place in loaded.first_dropped.items())
    return Finding("unusable rows", level, verdict, count, loaded.total, examples=examples)


def unread(loaded: Loaded) -> Finding:
    """Columns, and parts of cells, that nothing is read from."""
    columns = {name for names in loaded.unused_columns.values() for name in names}
    count = len(columns) + len(loaded.ignored)
    verdict = "; ".join(loaded.account()) or "every column is used"
    level: Level = "note" if count else "ok"
    return Finding("columns", level, verdict, count, loaded.total)


def duplicates(rows: Sequence[Row]) -> Finding:
    """Rows that say the same as an earlier row, up to case and white space."""
    seen: set[tuple[str, ...]] = set()
    again = []
    for index, row in enumerate(rows):
        key = (prompt_key(row), *_answers(row))
        if key in seen:
            again.append(index)
        seen.add(key)
    level = _graded(len(again), len(rows))
    return _finding("duplicates", rows, again, level, "repeat an earlier row")


def contradictory_pairs(rows: Sequence[Row]) -> Finding:
    """Pairs that another row holds with chosen and rejected exchanged."""
    keys = [(prompt_key(row), *_answers(row)) for row in rows]
    known = set(keys)
    wrong = [i for i, (prompt, a, b) in enumerate(keys) if a != b and (prompt, b, a) in known]
    return _finding(
        "contradictory pairs", rows, wrong, "fault", "stand elsewhere the other way round"
    )


def contradictory_labels(rows: Sequence[Row]) -> Finding:
    """Rows whose text has another label elsewhere."""
    keys = [(prompt_key(row), *_answers(row)[:-1]) for row in rows]
    labels = defaultdict(set)
    for key, row in zip(keys, rows, strict=True):
        labels[key].add(row["label"])
    wrong = [index for index, key in enumerate(keys) if len(labels[key]) > 1]
    return _finding("contradictory labels", rows, wrong, "fault", "have another label elsewhere")


def near_ties(rows: Sequence[Row]) -> Finding:
    """Pairs whose replies differ in case or white space only."""
    ties = [index for index, row in enumerate(rows) if len(set(_answers(row))) == 1]
    what = "have replies that differ in case or white space only"
    return _finding("near ties", rows, ties, "fault", what)


def length_bias(rows: Sequence[Row]) -> Finding:
    """Does length tell the label? A fault only if the 95% interval lies outside 0.4 to 0.6."""
    gaps = [len(text_of(row["chosen"])) - len(text_of(row["rejected"])) for row in rows]
    longer, unequal = sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)
    if not unequal:
        return Finding("length bias", "ok", "all pairs have replies of equal length", 0, 0)
    # Pairs of one prompt are one observation.
    prompts = [prompt_key(row) for row, gap in zip(rows, gaps, strict=True) if gap]
    found = interval([float(g > 0) for g in gaps if g], prompts, kind="share", weigh="values")
    low, high = found.low, found.high
    level: Level = "ok" if low <= 0.5 <= high else "fault" if low > 0.6 or high < 0.4 else "note"
    verdict = (
        f"the longer reply is chosen in {longer / unequal:.1%} of pairs [{low:.1%}, {high:.1%}]"
    )
    return Finding("length bias", level, verdict, longer, unequal)


def suspects(rows: Sequence[Row], *, seed: int) -> Finding:
    """Pairs that a bag of words, fitted on other prompts, contradicts most strongly."""
    prompts = len({prompt_key(row) for row in rows})
    if prompts < MIN_FOR_SUSPECTS:
        verdict = f"not looked for: fewer than {MIN_FOR_SUSPECTS} different prompts"
        return Finding("suspects", "ok", verdict, 0, len(rows))
    margins = cross_fitted_margins(rows, seed=seed)
    sure = share_interval(margins.accuracy * prompts, prompts)
    low, high = sure.low, sure.high
    told = f"a bag of words tells {margins.accuracy:.1%} [{low:.1%}, {high:.1%}] of labels"
    if low <= 0.5:
        return Finding("suspects", "ok", f"{told}: too few to accuse a pair", 0, len(rows))
    found = margins.suspects(min(NUM_SUSPECTS, len(rows) // 20))
    return Finding(
        name="suspects",
        level="note" if found else "ok",
        verdict=f"{told}; the {len(found):,} most contradicted pairs are worth reading",
        count=len(found),
        total=len(rows),
        rows=tuple(found),
        examples=tuple(_opening(rows[index]) for index in found[:EXAMPLES]),
    )


def label_balance(rows: Sequence[Row]) -> Finding:
    """How far one label dominates: a fault when there is no other, a note above nine in ten."""
    counts = Counter(row["label"] for row in rows)
    (label, most), *_ = counts.most_common(1)
    level: Level = "fault" if most == len(rows) else "note" if most > 0.9 * len(rows) else "ok"
    verdict = f"{len(counts):,} different labels, the commonest ({label}) on {most / len(rows):.1%}"
    return Finding("label balance", level, verdict, most, len(rows))


def over_long(rows: Sequence[Row], count_tokens: CountTokens, *, max_length: int) -> Finding:
    """Rows that training would cut off or drop, template tokens not counted.

    Where the prompt alone fills the length, truncation leaves chosen equal to rejected.
    """
    found, by_prompt = [], 0
    for index, row in enumerate(rows):
        prompt = count_tokens(text_of(row["prompt"])) if "prompt" in row else 0
        replies = [count_tokens(text_of(row[part])) for part in parts(row) if part != "prompt"]
        if prompt + max(replies, default=0) > max_length:
            found.append(index)
            by_prompt += prompt >= max_length
    what = f"exceed max_length = {max_length:,} tokens, {by_prompt:,} by the prompt alone"
    return _finding("over-long rows", rows, found, _graded(len(found), len(rows)), what)


def shared(rows: Sequence[Row], against: Sequence[Row]) -> Finding:
    """Leakage: rows whose prompt is also in the other set."""
    found = shared_prompts(rows, against)
    return _finding("shared prompts", rows, found, "fault", "have a prompt of the other set")


def overlapping(rows: Sequence[Row], against: Sequence[Row]) -> Finding:
    """Possible leakage: rows whose prompt quotes a long run of words from the other set."""
    found = sorted(set(overlapping_prompts(rows, against)) - set(shared_prompts(rows, against)))
    what = f"have a new prompt, but {GRAM} words in a row as in a prompt of the other set"
    return _finding("overlapping prompts", rows, found, "note", what)


def parts(row: Row) -> list[str]:
    """The text-bearing fields of a canonical row."""
    return [p for p in ("prompt", "completion", "chosen", "rejected", "text") if p in row]


def text_of(value: str | Sequence[Mapping[str, str]]) -> str:
    """The contents of a field, turns on lines of their own, without role names."""
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def _answers(row: Row) -> tuple[str, ...]:
    """Replies and label, normalised as prompts are: what makes two rows with one prompt differ."""
    texts = [text_of(row[part]) for part in parts(row) if part not in ("prompt", "text")]
    labels = [str(row["label"])] if "label" in row else []
    return tuple(" ".join(text.split()).casefold() for text in texts + labels)


def _graded(count: int, total: int) -> Level:
    return "ok" if count == 0 else "note" if count <= TOLERATED * total else "fault"


def _opening(row: Row, length: int = 100) -> str:
    text = " ".join(prompt_text(row).split())
    return text if len(text) <= length else text[: length - 3] + "..."
