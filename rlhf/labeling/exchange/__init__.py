"""Convert labels to and from the files of other annotation tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[str, str]
"""Name in this toolkit -> name of a field or a question in the other tool, if they differ."""

Problem = Callable[[str], Any]
"""Function that counts a reason why a label cannot be converted."""
