"""Where the benchmarks keep what they make: inputs, logs, environments of their own, results."""

from __future__ import annotations

from pathlib import Path

from rlhf.models.hub import cache_directory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance.png"


def work_directory(*parts: str) -> Path:
    """A folder under the user's cache (``$RLHF_CACHE`` moves it), made if it is not there."""
    folder = cache_directory().joinpath("benchmarks", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
