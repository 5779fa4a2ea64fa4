"""Convert labels to and from the files of other annotation tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.labeling.exchange.rows import ForeignLabel

ForeignNames = Mapping[str, str]
"""Name in this toolkit -> name of a field or a question in the other tool, if they differ."""

CountProblem = Callable[[str], Any]
"""Function that counts a reason why a label cannot be converted."""


def skip_and_count_unreadable(
    labels: Iterable[ForeignLabel | None],
    count_problem: CountProblem,
    *,
    malformed: str,
    unknown: str,
) -> Iterator[ForeignLabel]:
    """Yield the labels of one record of another tool.

    Args:
        labels: The labels, None for an answer that cannot be read, for example because its fields
            or questions have other names. The iteration fails at a malformed record.
        count_problem: Counts the labels that are not read.
        malformed: Reason for a malformed record, of which no label is used.
        unknown: Reason for None.
    """
    try:
        all_labels = list(labels)
    except (KeyError, TypeError, AttributeError, ValueError):
        count_problem(malformed)
        return
    for label in all_labels:
        if label is None:
            count_problem(unknown)
        else:
            yield label
