"""Moving average of a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centered moving average over `width` values; the window is clipped at both ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i - half + width] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]
