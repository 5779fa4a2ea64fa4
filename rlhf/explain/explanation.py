"""An explanation of a reward, a policy or stages of training: as an object, as JSON, as a page."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.common.files import write_text
from rlhf.explain.model_differences import StageDifference
from rlhf.explain.page import explanation_page_html
from rlhf.explain.policy_view import PolicyExplanation
from rlhf.explain.reward.explanation import RewardExplanation
from rlhf.stats import Interval

PAGE_FILE, JSON_FILE = "explanation.html", "explanation.json"
"""File names of the page and of the JSON file."""


@dataclass(frozen=True)
class Explanation:
    """Explanations of a reward, of a policy, and of the differences between stages of training.

    A notebook shows the page.
    """

    title: str
    """Title of the page."""
    reward: RewardExplanation | None = None
    policy: list[PolicyExplanation] = field(default_factory=list)
    stages: list[StageDifference] = field(default_factory=list)
    """Differences between neighboring stages."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that are not finite are None."""
        return _to_plain_data(self)

    def to_json(self) -> str:
        """Return the explanation as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """Return the page, which makes no requests."""
        return explanation_page_html(self.title, self.reward, self.policy, self.stages)

    def save(self, directory: str | Path) -> Path:
        """Write `explanation.html` and `explanation.json`; return the path of the page."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON_FILE, self.to_json())
        write_text(folder / PAGE_FILE, self.to_html())
        return folder / PAGE_FILE

    def _repr_html_(self) -> str:
        """Return the page in a frame, which keeps its style apart from that of a notebook."""
        return (
            '<iframe sandbox="allow-scripts" style="width: 100%; height: 640px; border: 0" '
            f'srcdoc="{html.escape(self.to_html())}"></iframe>'
        )


def _to_plain_data(value: Any) -> Any:
    """Return plain data for dataclasses, intervals and numbers."""
    if isinstance(value, Interval):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
