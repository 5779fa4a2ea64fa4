"""Draw forest plots: estimates with intervals on a common scale, as HTML without SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.reports.markup import acronym_label_html, esc
from rlhf.stats import Interval


@dataclass(frozen=True)
class ForestRow:
    """One row of a forest plot."""

    name: str
    detail: str
    """Secondary text under the name."""
    estimate: Interval
    value: str
    """Number at the end of the row."""
    remark: str
    """Secondary text under the number."""
    tone: str
    """CSS color class."""


def titled_forest_plot_html(
    title: str, detail: str, lines: Sequence[ForestRow], marks: Sequence[tuple[float, str]]
) -> str:
    """Return the HTML of a forest plot with a heading, or an empty string if there are no lines.

    `marks` are (position, label) pairs of vertical lines.
    """
    heading = f"<h3>{esc(title)} <small>{acronym_label_html(detail)}</small></h3>"
    return heading + forest_plot_html(lines, marks) if lines else ""


def forest_plot_html(lines: Sequence[ForestRow], marks: Sequence[tuple[float, str]]) -> str:
    """Return the HTML of a forest plot.

    `marks` are (position, label) pairs of vertical lines. The position has the unit of the
    estimates.
    """
    ends = [line.estimate.value for line in lines] + [value for value, _ in marks]
    known = [line.estimate for line in lines if line.estimate.known]
    ends += [end for estimate in known for end in (estimate.low, estimate.high)]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 1.0

    def to_percent_position(value: float) -> float:
        """Return the horizontal position of a value in percent."""
        return 100 * (value - low + pad) / (high - low + 2 * pad)

    ticks = "".join(
        f'<div class="mark" style="left:{to_percent_position(v):.2f}%"></div>' for v, _ in marks
    )
    rows = "".join(_row_html(line, to_percent_position, ticks) for line in lines)
    scale = "".join(
        _vertical_line_label_html(to_percent_position(value), name) for value, name in marks
    )
    foot = f'<div class="gap"></div><div class="scale">{scale}</div><div class="gap"></div>'
    return f'<div class="forest">{rows}{foot if marks else ""}</div>'


def _row_html(line: ForestRow, to_percent_position: Callable[[float], float], ticks: str) -> str:
    """Return the HTML of a row.

    `to_percent_position` converts a value to a horizontal position in percent. `ticks` is the HTML
    of the vertical lines.
    """
    e = line.estimate
    span = ""
    if e.known:
        left = to_percent_position(e.low)
        width = to_percent_position(e.high) - left
        span = f'<div class="span" style="left:{left:.2f}%;width:{width:.2f}%"></div>'
    point = f'<div class="point" style="left:{to_percent_position(e.value):.2f}%"></div>'
    return (
        f'<div class="line"><div class="who">{acronym_label_html(line.name)}'
        f"<small>{esc(line.detail)}</small></div>"
        f'<div class="track {line.tone} ink">{ticks}{span}{point}</div>'
        f'<div class="number">{esc(line.value)}<small>{esc(line.remark)}</small></div></div>'
    )


def _vertical_line_label_html(percent: float, name: str) -> str:
    """Return the label of a vertical line at a position in percent."""
    side = ' class="first"' if percent < 12 else ' class="final"' if percent > 88 else ""
    return f'<span{side} style="left:{percent:.2f}%">{acronym_label_html(name)}</span>'
