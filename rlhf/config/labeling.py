"""Types of the options of the commands that collect and exchange people's labels."""

from __future__ import annotations

from typing import Literal

from rlhf.common.text import escape_invisible

LabelMode = Literal["pairs", "ratings", "rankings", "demonstrations"]
"""Kind of labels: preferences, ratings, rankings, or replies written by the annotator."""

LabelOrder = Literal["data", "random", "disagreement", "suspicion"]
"""Order of the items: that of the data, random, by the disagreement of an ensemble of reward
models, or by the suspicion that the label in the data is wrong."""

LabelFormat = Literal["argilla", "label-studio", "datasets"]
"""Format of labels for other tools: JSON of Argilla 2 or of Label Studio, or a dataset of the
library datasets."""

MAX_ANNOTATOR_LENGTH = 100
"""Maximum number of characters of an annotator's id."""


def check_annotator(name: str) -> None:
    """Check the id of an annotator.

    Raises:
        ValueError: The id is empty or too long, has invisible characters, tabs or line ends, or has
            spaces at its ends.
    """
    is_plain = name == name.strip() == escape_invisible(name) and not {"\t", "\n"} & set(name)
    if not name or len(name) > MAX_ANNOTATOR_LENGTH or not is_plain:
        raise ValueError(
            f"annotator must be a visible text of 1 to {MAX_ANNOTATOR_LENGTH} characters, without "
            f"spaces at its ends, got {name[:MAX_ANNOTATOR_LENGTH]!r}"
        )
