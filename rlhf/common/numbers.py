"""Check, format and smooth logged numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def is_number(value: object) -> bool:
    """Return whether `value` is an int or float in the range of finite floats, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # the integer is too large for a float
        return False


def short_number(value: float) -> str:
    """Format a number in few characters: 12.5k, −0.031, 2e−6; an absolute value < 1e-12 is 0."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size >= 1e6 or size < 1e-3:
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    elif size >= 1e4:
        text = f"{value / 1e3:.3g}k"
    else:
        text = f"{value:.3g}" if size < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def decimal_text(value: float) -> str:
    """Format a number in ASCII: with three decimals below 100, one below 1,000 and none above.

    A number with an absolute value below 0.0005 has three significant digits. Zero has no sign.
    """
    value, size = value + 0.0, abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.0005 or size == 0 else f"{value:.3g}"


def centered_moving_average(values: Sequence[float], width: int) -> list[float]:
    """Return the moving average over centered windows of `width` values.

    At both ends of ``values``, the windows contain fewer values. The running sum is exact (Shewchuk
    1997), so a result does not depend on the values of earlier windows.
    """
    half, averages, partials = width // 2, [], []
    low = high = 0
    for index in range(len(values)):
        end = min(len(values), index - half + width)
        for value in values[high:end]:
            _add_exactly(partials, value)
        start = max(0, index - half)
        for value in values[low:start]:
            _add_exactly(partials, -value)
        low, high = start, end
        averages.append(math.fsum(partials) / (end - start))
    return averages


def _add_exactly(partials: list[float], value: float) -> None:
    """Add a value in place to an exact sum, which is stored as non-overlapping partial sums."""
    count, total = 0, float(value)
    for partial in partials:
        large, small = (total, partial) if abs(total) >= abs(partial) else (partial, total)
        total = large + small
        if rest := small - (total - large):
            partials[count] = rest
            count += 1
    partials[count:] = [total]
