"""Choices of the commands that collect and exchange people's labels."""

from __future__ import annotations

from typing import Literal

LabelMode = Literal["pairs", "ratings", "rankings", "demonstrations"]
"""What an annotator gives: a preference, a rating, a ranking, or a reply."""

LabelOrder = Literal["data", "random", "disagreement", "suspicion"]
"""Order of the items: that of the data, random, by the disagreement of an ensemble of reward
models, or by the suspicion that the label in the data is wrong."""

LabelFormat = Literal["argilla", "label-studio", "datasets"]
"""Format of labels for other tools: JSON of Argilla 2 or of Label Studio, or a dataset of the
library datasets."""
