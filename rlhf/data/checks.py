"""Checks of a dataset; each returns a `Finding`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.common.conversation import Message, comparable_text
from rlhf.data.columns import FACT_FIELDS
from rlhf.data.conversation import REPLY_OF_WEIGHT_0
from rlhf.data.formats import ROW_OF_WEIGHT_0
from rlhf.data.leakage import (
    NGRAM_SIZE,
    indices_of_shared_prompts,
    indices_with_shared_prompt_ngrams,
)
from rlhf.data.load import LoadedRows
from rlhf.data.splits import prompt_key, prompt_text
from rlhf.data.suspects import cross_fitted_margins
from rlhf.stats import interval, share_interval

Row = Mapping[str, Any]
Level = Literal["ok", "note", "fault"]
CountTokens = Callable[[str], int]

MAX_QUOTED_ROWS = 3
"""Maximum number of quoted rows per finding."""
TOLERATED_SHARE = 0.01
"""Maximum fraction of unusable, repeated or over-long rows that is a note; a larger fraction is a
fault."""
MAX_SUSPECTS = 100
"""Maximum number of pairs that are listed as suspects."""
MIN_PROMPTS_FOR_SUSPECTS = 100
"""Minimum number of distinct prompts for which `suspicious_pair_labels` fits a model."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    level: Level
    verdict: str
    """The result in one line."""
    count: int
    """Number of affected rows. In "columns", it is the number of unused columns and ignored parts;
    in "length bias", of pairs whose longer reply is chosen; in "label balance", of rows with the
    most common label."""
    total: int
    """Number of checked rows; in "length bias", of pairs with replies of unequal length."""
    rows: tuple[int, ...] = ()
    """Indices of the affected rows in `LoadedRows.rows`; in the findings of `unusable_rows`,
    `unused_columns`, `length_bias` and `label_balance`, the tuple is empty."""
    examples: tuple[str, ...] = ()
    """Beginnings of the prompts of the first `MAX_QUOTED_ROWS` of `rows`. For unusable rows, each
    reason with the path and the number of its first row."""


def _finding(
    name: str, rows: Sequence[Row], affected_indices: Sequence[int], level: Level, verdict_end: str
) -> Finding:
    """Return the finding for the rows with the indices `affected_indices`.

    Args:
        name: Name of the check.
        rows: The checked rows.
        affected_indices: Indices of the affected rows.
        level: Level of the finding if a row is affected; otherwise it is "ok".
        verdict_end: Text that follows the number of affected rows in the verdict.
    """
    count = len(affected_indices)
    share = f" ({count / len(rows):.1%})" if count else ""
    return Finding(
        name=name,
        level=level if count else "ok",
        verdict=f"{count:,} of {len(rows):,} rows{share} {verdict_end}",
        count=count,
        total=len(rows),
        rows=tuple(affected_indices),
        examples=tuple(
            _prompt_beginning(rows[index]) for index in affected_indices[:MAX_QUOTED_ROWS]
        ),
    )


def unusable_rows(loaded: LoadedRows) -> Finding:
    """Count the rows that the loader dropped, by reason.

    Rows that the data itself excludes by a weight of 0 are no fault.
    """
    count = sum(loaded.dropped.values())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in loaded.dropped.items())
    verdict = f"{count:,} of {loaded.total:,} rows cannot be used" + (f": {reasons}" * bool(count))
    excluded = sum(loaded.dropped.get(why, 0) for why in (ROW_OF_WEIGHT_0, REPLY_OF_WEIGHT_0))
    level = _level_by_fraction(count - excluded, loaded.total)
    if excluded and level == "ok":
        level = "note"
    examples = tuple(f"{reason}: {where}" for reason, where in loaded.first_dropped.items())
    return Finding("unusable rows", level, verdict, count, loaded.total, examples=examples)


def unused_columns(loaded: LoadedRows) -> Finding:
    """List the columns and the parts of cells that the loader did not use."""
    columns = {name for names in loaded.unused_columns.values() for name in names}
    count = len(columns) + len(loaded.ignored)
    verdict = "; ".join(loaded.reading_notes()) or "every column is used"
    level: Level = "note" if count else "ok"
    return Finding("columns", level, verdict, count, loaded.total)


def duplicates(rows: Sequence[Row]) -> Finding:
    """Find rows that equal an earlier row, except for case, white space and Unicode forms.

    Prompts, tools, answers, tests, replies and labels are compared, but not margins.
    """
    seen: set[Hashable] = set()
    repeated = []
    for index, row in enumerate(rows):
        key = (
            _prompt_and_tools_key(row),
            _answers_and_tests_text(row),
            *_comparable_reply_and_label_texts(row),
        )
        if key in seen:
            repeated.append(index)
        seen.add(key)
    level = _level_by_fraction(len(repeated), len(rows))
    return _finding("duplicates", rows, repeated, level, "repeat an earlier row")


def contradictory_pairs(rows: Sequence[Row]) -> Finding:
    """Find pairs that also occur with chosen and rejected swapped."""
    keys = [(_prompt_and_tools_key(row), *_comparable_reply_and_label_texts(row)) for row in rows]
    known = set(keys)
    wrong = [i for i, (prompt, a, b) in enumerate(keys) if a != b and (prompt, b, a) in known]
    what = "also occur with chosen and rejected swapped"
    return _finding("contradictory pairs", rows, wrong, "fault", what)


def contradictory_labels(rows: Sequence[Row]) -> Finding:
    """Find rows whose prompt and reply, or text, also occur with a different label."""
    texts = [
        (_prompt_and_tools_key(row), *_comparable_reply_and_label_texts(row)[:-1]) for row in rows
    ]
    wrong = _rows_with_several_values(texts, [row["label"] for row in rows])
    what = "have a different label in another row"
    return _finding("contradictory labels", rows, wrong, "fault", what)


def contradictory_answers(rows: Sequence[Row]) -> Finding:
    """Find rows whose prompt also occurs with a different reference answer."""
    wrong = _rows_with_several_values(
        list(map(_prompt_and_tools_key, rows)), list(map(_reference_answer, rows))
    )
    what = "have a different answer in another row"
    return _finding("contradictory answers", rows, wrong, "fault", what)


def _rows_with_several_values(keys: Sequence[Hashable], values: Sequence[Hashable]) -> list[int]:
    """Return the indices of the rows with a value whose key occurs with more than one value.

    Args:
        keys: One key per row.
        values: One value per row; None if the row has no value.
    """
    by_key = defaultdict(set)
    for key, value in zip(keys, values, strict=True):
        if value is not None:
            by_key[key].add(value)
    return [
        index
        for index, (key, value) in enumerate(zip(keys, values, strict=True))
        if value is not None and len(by_key[key]) > 1
    ]


def _reference_answer(row: Row) -> str | None:
    """Return the answer of the last prompt message that has one, as text; None if none has."""
    answers = [str(turn["answer"]) for turn in row["prompt"] if "answer" in turn]
    return answers[-1] if answers else None


def pairs_equal_after_normalization(rows: Sequence[Row]) -> Finding:
    """Find pairs whose replies differ only in case, white space or Unicode forms."""
    ties = [
        index
        for index, row in enumerate(rows)
        if len(set(_comparable_reply_and_label_texts(row))) == 1
    ]
    what = "have replies that differ only in case, white space or Unicode forms"
    return _finding("near ties", rows, ties, "fault", what)


def reversed_scores(rows: Sequence[Row]) -> Finding:
    """Find pairs with a margin below 0, whose rejected reply has the higher score."""
    wrong = [index for index, row in enumerate(rows) if row.get("margin", 0.0) < 0]
    what = "have a rejected reply with a higher score than the chosen reply"
    return _finding("reversed scores", rows, wrong, "fault", what)


def length_bias(rows: Sequence[Row]) -> Finding:
    """Measure the fraction of pairs with replies of unequal length in which the longer is chosen.

    The level is "ok" if the 95% confidence interval contains 0.5. It is "fault" if the whole
    interval is above 0.6 or below 0.4. Otherwise, it is "note".
    """
    gaps = [len(text_of(row["chosen"])) - len(text_of(row["rejected"])) for row in rows]
    longer, unequal = sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)
    if not unequal:
        return Finding("length bias", "ok", "all pairs have replies of equal length", 0, 0)
    # Pairs with the same prompt are dependent, so the clusters of the interval are the prompts.
    prompts = [prompt_key(row) for row, gap in zip(rows, gaps, strict=True) if gap]
    rate = interval([float(g > 0) for g in gaps if g], prompts, kind="share", weigh="values")
    low, high = rate.low, rate.high
    level: Level = "ok" if low <= 0.5 <= high else "fault" if low > 0.6 or high < 0.4 else "note"
    verdict = (
        f"the longer reply is chosen in {longer / unequal:.1%} of pairs with replies "
        f"of unequal length [{low:.1%}, {high:.1%}]"
    )
    return Finding("length bias", level, verdict, longer, unequal)


def suspicious_pair_labels(rows: Sequence[Row], *, seed: int) -> Finding:
    """Find the pairs whose label a bag-of-words model, fitted on other prompts, contradicts most.

    No pair is listed if there are fewer than `MIN_PROMPTS_FOR_SUSPECTS` distinct prompts, or if the
    model does not predict labels better than chance.
    """
    prompts = len({prompt_key(row) for row in rows})
    if prompts < MIN_PROMPTS_FOR_SUSPECTS:
        verdict = f"not checked: fewer than {MIN_PROMPTS_FOR_SUSPECTS} different prompts"
        return Finding("suspects", "ok", verdict, 0, len(rows))
    margins = cross_fitted_margins(rows, seed=seed)
    accuracy = share_interval(margins.accuracy * prompts, prompts)
    low, high = accuracy.low, accuracy.high
    fit = f"a bag of words predicts {margins.accuracy:.1%} [{low:.1%}, {high:.1%}] of labels"
    if low <= 0.5:
        return Finding(
            "suspects", "ok", f"{fit}: not better than chance, so no pair is listed", 0, len(rows)
        )
    indices = margins.suspects(min(MAX_SUSPECTS, len(rows) // 20))
    verdict = f"{fit}; review the {len(indices):,} pairs that it contradicts most strongly"
    return replace(_finding("suspects", rows, indices, "note", ""), verdict=verdict)


def label_balance(rows: Sequence[Row]) -> Finding:
    """Measure the fraction of rows with the most common label.

    The level is "fault" if the fraction is 1, "note" if it is above 0.9, and "ok" otherwise.
    """
    counts = Counter(row["label"] for row in rows)
    ((label, count),) = counts.most_common(1)
    level: Level = "fault" if count == len(rows) else "note" if count > 0.9 * len(rows) else "ok"
    share = count / len(rows)
    verdict = f"{len(counts):,} different labels; the most common one ({label}) has {share:.1%}"
    return Finding("label balance", level, verdict, count, len(rows))


def over_long_rows(rows: Sequence[Row], count_tokens: CountTokens, *, max_length: int) -> Finding:
    """Find rows with more than `max_length` tokens, which training would truncate or drop.

    The tokens of the chat template are not counted. The verdict also states how many of these rows
    have a prompt that alone has at least `max_length` tokens. SFT, DPO and KTO drop such rows.
    Reward models remove the oldest tokens instead.
    """
    affected, by_prompt = [], 0
    for index, row in enumerate(rows):
        prompt = count_tokens(text_of(row["prompt"])) if "prompt" in row else 0
        lengths = {
            name: [count_tokens(text) for text in texts]
            for name, texts in texts_by_field(row).items()
            if name != "prompt"
        }
        steps = sum(lengths.pop("steps", ()))  # the steps of a solution are one text
        replies = [length for counts in lengths.values() for length in counts] + [steps]
        if prompt + max(replies) > max_length:
            affected.append(index)
            by_prompt += prompt >= max_length
    what = f"exceed max_length = {max_length:,} tokens, {by_prompt:,} by the prompt alone"
    return _finding(
        "over-long rows", rows, affected, _level_by_fraction(len(affected), len(rows)), what
    )


def leaked_prompts(rows: Sequence[Row], against: Sequence[Row]) -> Finding:
    """Find leakage: rows whose prompt is also a prompt of the dataset `against`."""
    affected = indices_of_shared_prompts(rows, against)
    return _finding(
        "shared prompts", rows, affected, "fault", "have a prompt that is also in the other set"
    )


def partly_leaked_prompts(rows: Sequence[Row], against: Sequence[Row]) -> Finding:
    """Find possible leakage: prompts that share many consecutive words with a prompt of `against`.

    Rows that `leaked_prompts` finds are not included.
    """
    affected = sorted(
        set(indices_with_shared_prompt_ngrams(rows, against))
        - set(indices_of_shared_prompts(rows, against))
    )
    what = (
        f"share {NGRAM_SIZE} consecutive words of their prompt with a different prompt "
        "of the other set"
    )
    return _finding("overlapping prompts", rows, affected, "note", what)


def texts_by_field(row: Row) -> dict[str, list[str]]:
    """Return field -> its texts, for the fields of a canonical row that contain text or messages.

    Only `replies` and `steps` can have several texts.
    """
    fields = ("prompt", "completion", "chosen", "rejected", "text")
    texts = {name: [text_of(row[name])] for name in fields if name in row}
    lists = ("replies", "steps")
    return texts | {name: list(map(text_of, row[name])) for name in lists if name in row}


def text_of(value: str | Sequence[Message]) -> str:
    """Return a text, or the reasoning, content and tool calls of messages, joined by newlines."""
    return value if isinstance(value, str) else "\n".join(map(_turn_text, value))


def _turn_text(turn: Message) -> str:
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join(filter(None, (turn.get("reasoning_content"), turn["content"], calls)))


def _prompt_and_tools_key(row: Row) -> tuple[str, ...]:
    """Return a key for the prompt, its system message, its tool calls and the row's tools."""
    tools = json.dumps(row.get("tools"), sort_keys=True, ensure_ascii=False)
    prompt = row.get("prompt", ())
    special = [turn for turn in prompt if turn["role"] == "system" or turn.get("tool_calls")]
    return prompt_key(row), comparable_text(text_of(special)), tools


def _answers_and_tests_text(row: Row) -> str:
    """Return the reference answers and tests of a row's prompt as one text."""
    turns = row.get("prompt", ())
    return str([turn[key] for turn in turns for key in FACT_FIELDS if key in turn])


def _comparable_reply_and_label_texts(row: Row) -> tuple[str, ...]:
    """Return the replies, steps and labels of a row as normalized texts, the label last."""
    texts = [
        text
        for name, texts_of_field in texts_by_field(row).items()
        if name not in ("prompt", "text")
        for text in texts_of_field
    ]
    texts += [str(row[key]) for key in ("labels", "label") if key in row]
    return tuple(map(comparable_text, texts))


def _level_by_fraction(count: int, total: int) -> Level:
    return "ok" if count == 0 else "note" if count <= TOLERATED_SHARE * total else "fault"


def _prompt_beginning(row: Row, length: int = 100) -> str:
    text = " ".join(prompt_text(row).split())
    return text if len(text) <= length else text[: length - 3] + "..."
