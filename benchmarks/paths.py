"""Define the folders of the benchmarks' inputs, logs, virtual environments and results."""

from __future__ import annotations

from pathlib import Path

from rlhf.models.hub import cache_directory

ROOT = Path(__file__).resolve().parent.parent
RESULTS_FILE = ROOT / "benchmarks" / "results.jsonl"
PERFORMANCE_PAGE = ROOT / "docs" / "performance.md"
PERFORMANCE_FIGURE = ROOT / "docs" / "images" / "performance.png"


def work_directory(*parts: str) -> Path:
    """Return a folder under the user's cache or ``$RLHF_CACHE``; create it if it does not exist."""
    folder = cache_directory().joinpath("benchmarks", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
