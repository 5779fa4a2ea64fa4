"""Measure the agreement of annotators, and summarize the labels of each annotator."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.columns import Row
from rlhf.data.labels import labels_not_undone
from rlhf.data.splits import prompt_key
from rlhf.stats import Interval, interval, jackknife

Weights = Literal["quadratic"] | None
"""Weights of disagreements: equal, or proportional to the squared difference of two ratings."""


@dataclass(frozen=True)
class AnnotatorSummary:
    """Statistics of the labels of one annotator. Fractions are averaged over prompts."""

    annotator: str
    labels: int
    """Number of labels, without skipped items."""
    skipped: int
    undone: int
    ties: int
    median_seconds: float | None
    """Median time for a label, in seconds; None if no time is known."""
    first_shown: Interval | None
    """Fraction of preferences for the reply that was shown first. Its expected value is 0.5 without
    a bias, because the order is random. None if no preference has a recorded order."""
    checks: Interval | None
    """Fraction of correct answers to check items; None if there are none."""


@dataclass(frozen=True)
class PairAgreement:
    """Agreement of two annotators on the items that both labeled.

    In rankings, each pair of replies is an item.
    """

    first: str
    second: str
    items: int
    agreement: Interval
    """Fraction of items with equal labels, averaged over prompts."""
    kappa: Interval


@dataclass(frozen=True)
class AgreementReport:
    """The agreement of all annotators of some labels."""

    annotators: tuple[AnnotatorSummary, ...]
    pairs: tuple[PairAgreement, ...]
    fleiss: Interval | None
    """Fleiss' kappa of the items with several labels; None if there are no such items."""
    shared_items: int
    """Number of items that several annotators labeled; in rankings, of pairs of replies."""


def agreement_report(rows: Iterable[Row]) -> AgreementReport:
    """Return the agreement of the annotators of some labels (`rlhf.data.labels`) of one mode.

    The categories are the better reply or a tie, or the rating. A ranking counts as one label for
    each pair of its replies. Demonstrations have no categories. Intervals are over prompts.
    """
    rows = list(rows)
    live = [row for row in labels_not_undone(rows) if not row.get("skipped")]
    table = LabelTable.from_rows(live)
    weights: Weights = "quadratic" if live and live[0]["mode"] == "ratings" else None
    names = list(dict.fromkeys(row["annotator"] for row in rows))
    several = [item for item in table.categories if len(table.categories[item]) > 1]
    return AgreementReport(
        tuple(
            _annotator_summary(name, [row for row in rows if row["annotator"] == name])
            for name in names
        ),
        tuple(
            agreement
            for first, second in itertools.combinations(names, 2)
            if (agreement := _pair_agreement(table, first, second, weights)) is not None
        ),
        fleiss_kappa_interval(table, several) if several else None,
        len(several),
    )


@dataclass(frozen=True)
class LabelTable:
    """The category that each annotator gave to each item."""

    categories: Mapping[Hashable, Mapping[str, Hashable]]
    """Item -> annotator -> category. If an annotator labeled an item twice, the last label
    counts."""
    prompts: Mapping[Hashable, str]
    """Item -> key of its prompt. Items of a prompt are not independent."""

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> LabelTable:
        """Return the table of some labels, none of which was undone or skipped."""
        categories: dict[Hashable, dict[str, Hashable]] = {}
        prompts: dict[Hashable, str] = {}
        for row in rows:
            for item, category in _items_with_categories(row):
                categories.setdefault(item, {})[row["annotator"]] = category
                prompts[item] = prompt_key(row)
        return cls(categories, prompts)


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], *, weights: Weights = None
) -> float:
    """Return Cohen's (1960) kappa of two annotators' categories of N items.

    The kappa is (p_o - p_e) / (1 - p_e) with the observed agreement p_o and the agreement p_e that
    is expected by chance, from the frequencies of the categories of each annotator. With weights,
    disagreements count in part (Cohen 1968).

    Returns:
        The kappa, or nan if both annotators gave the same single category to all items.
    """
    from sklearn.metrics import cohen_kappa_score

    if len({*first, *second}) == 1:
        return float("nan")
    labels: list[Any] | None = None
    if weights:  # the weights depend on the index of a rating, so every rating needs an index
        ratings: list[Any] = [*first, *second]
        labels = list(range(min(ratings), max(ratings) + 1))
    return float(cohen_kappa_score(list(first), list(second), labels=labels, weights=weights))


def fleiss_kappa(items: Sequence[Sequence[Hashable]]) -> float:
    """Return Fleiss' (1971) kappa of items with the categories that several annotators gave.

    The agreement of an item is the fraction of its pairs of labels that are equal. Items can have
    different numbers of labels, at least two; with equal numbers this is Fleiss' definition.

    Returns:
        The kappa, or nan if all labels are equal.
    """
    totals: Counter[Hashable] = Counter()
    agreements = []
    for labels in items:
        counts, n = Counter(labels), len(labels)
        totals.update(counts)
        agreements.append(sum(c * (c - 1) for c in counts.values()) / (n * (n - 1)))
    size = totals.total()
    chance = sum((count / size) ** 2 for count in totals.values())
    return float("nan") if chance == 1 else (statistics.fmean(agreements) - chance) / (1 - chance)


def fleiss_kappa_interval(table: LabelTable, items: Sequence[Hashable]) -> Interval:
    """Return Fleiss' kappa of some items of a table, with its interval over prompts."""
    labels = [list(table.categories[item].values()) for item in items]
    return jackknife(
        lambda rows: fleiss_kappa([labels[row] for row in rows]),
        [table.prompts[item] for item in items],
        scale="fisher",
    )


def cohen_kappa_interval(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    prompts: Sequence[Hashable],
    *,
    weights: Weights = None,
) -> Interval:
    """Return Cohen's kappa of N items with its interval over prompts, see `cohen_kappa`."""
    return jackknife(
        lambda rows: cohen_kappa(
            [first[row] for row in rows], [second[row] for row in rows], weights=weights
        ),
        prompts,
        scale="fisher",
    )


def _pair_agreement(
    table: LabelTable, first: str, second: str, weights: Weights
) -> PairAgreement | None:
    """Return the agreement of two annotators; None if no item has labels of both."""
    shared = [
        item
        for item, by_annotator in table.categories.items()
        if {first, second} <= by_annotator.keys()
    ]
    if not shared:
        return None
    a, b = ([table.categories[item][name] for item in shared] for name in (first, second))
    prompts = [table.prompts[item] for item in shared]
    equal = [float(x == y) for x, y in zip(a, b, strict=True)]
    return PairAgreement(
        first,
        second,
        len(shared),
        interval(equal, prompts, kind="share"),
        cohen_kappa_interval(a, b, prompts, weights=weights),
    )


def _items_with_categories(label: Row) -> list[tuple[Hashable, Hashable]]:
    """Return the items of a label with their categories: one for each pair of a ranking.

    The list is empty for a demonstration.
    """
    item = label["item_id"]
    match label["mode"]:
        case "pairs":
            return [(item, label["winner"])]
        case "ratings":
            return [(item, label["rating"])]
        case "rankings":
            ranks = label["ranks"]
            return [
                ((item, i, j), "tie" if ranks[i] == ranks[j] else "ab"[ranks[i] > ranks[j]])
                for i, j in itertools.combinations(range(len(ranks)), 2)
            ]
    return []


def _annotator_summary(annotator: str, rows: Sequence[Row]) -> AnnotatorSummary:
    """Return the summary of all rows of an annotator, including undone labels."""
    live = labels_not_undone(rows)
    labeled = [row for row in live if not row.get("skipped")]
    seconds = [row["seconds"] for row in labeled if row.get("seconds") is not None]
    return AnnotatorSummary(
        annotator=annotator,
        labels=len(labeled),
        skipped=len(live) - len(labeled),
        undone=sum(bool(row.get("undoes")) for row in rows),
        ties=sum(row.get("winner") == "tie" for row in labeled),
        median_seconds=statistics.median(seconds) if seconds else None,
        first_shown=_share_interval(
            [
                (row["winner"] == row["shown_first"], row)
                for row in labeled
                if row.get("winner") in ("a", "b") and "shown_first" in row
            ]
        ),
        checks=_share_interval(
            [(row["winner"] == row["gold"], row) for row in labeled if row.get("gold")]
        ),
    )


def _share_interval(outcomes: Sequence[tuple[Any, Row]]) -> Interval | None:
    """Return the fraction of true outcomes with its interval over prompts; None if there are none.

    Args:
        outcomes: Outcome and label.
    """
    if not outcomes:
        return None
    values = [float(outcome) for outcome, _ in outcomes]
    return interval(values, [prompt_key(row) for _, row in outcomes], kind="share")
