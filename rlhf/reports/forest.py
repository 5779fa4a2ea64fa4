"""Draw forest plots: estimates with intervals on a common scale, as HTML without SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.reports.markup import capital_acronyms_html, esc
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
    title: str, detail: str, rows: Sequence[ForestRow], marks: Sequence[tuple[float, str]]
) -> str:
    """Return the HTML of a forest plot with a heading, or an empty string if there are no rows.

    `marks` are (position, label) pairs of vertical lines.
    """
    heading = f"<h3>{esc(title)} <small>{capital_acronyms_html(detail)}</small></h3>"
    return heading + forest_plot_html(rows, marks) if rows else ""


def forest_plot_html(rows: Sequence[ForestRow], marks: Sequence[tuple[float, str]]) -> str:
    """Return the HTML of a forest plot.

    `marks` are (position, label) pairs of vertical lines. The position has the unit of the
    estimates.
    """
    ends = [row.estimate.value for row in rows] + [value for value, _ in marks]
    known = [row.estimate for row in rows if row.estimate.known]
    ends += [end for estimate in known for end in (estimate.low, estimate.high)]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 1.0

    def to_percent_position(value: float) -> float:
        """Return the horizontal position of a value in percent."""
        return 100 * (value - low + pad) / (high - low + 2 * pad)

    ticks = "".join(
        f'<div class="mark" style="left:{to_percent_position(v):.2f}%"></div>' for v, _ in marks
    )
    rows_html = "".join(_row_html(row, to_percent_position, ticks) for row in rows)
    scale = "".join(
        _vertical_line_label_html(to_percent_position(value), name) for value, name in marks
    )
    foot = f'<div class="gap"></div><div class="scale">{scale}</div><div class="gap"></div>'
    return f'<div class="forest">{rows_html}{foot if marks else ""}</div>'


def _row_html(row: ForestRow, to_percent_position: Callable[[float], float], ticks: str) -> str:
    """Return the HTML of a row.

    `to_percent_position` converts a value to a horizontal position in percent. `ticks` is the HTML
    of the vertical lines.
    """
    e = row.estimate
    span = ""
    if e.known:
        left = to_percent_position(e.low)
        width = to_percent_position(e.high) - left
        span = f'<div class="span" style="left:{left:.2f}%;width:{width:.2f}%"></div>'
    point = f'<div class="point" style="left:{to_percent_position(e.value):.2f}%"></div>'
    return (
        f'<div class="line"><div class="who">{capital_acronyms_html(row.name)}'
        f"<small>{esc(row.detail)}</small></div>"
        f'<div class="track {row.tone} ink">{ticks}{span}{point}</div>'
        f'<div class="number">{esc(row.value)}<small>{esc(row.remark)}</small></div></div>'
    )


def _vertical_line_label_html(percent: float, name: str) -> str:
    """Return the label of a vertical line at a position in percent."""
    side = ' class="first"' if percent < 12 else ' class="final"' if percent > 88 else ""
    return f'<span{side} style="left:{percent:.2f}%">{capital_acronyms_html(name)}</span>'
