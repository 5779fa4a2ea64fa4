"""Draw line charts as inline SVG; colors are CSS variables, and report.js adds the cursor."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from rlhf.common.numbers import centered_moving_average, short_number
from rlhf.reports.markup import esc
from rlhf.stats import Interval

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 18, 28
_MAX_POINTS = 300
"""Approximate maximum number of points of a drawn line."""
_MIN_SMOOTHED_POINTS = 40
"""Minimum number of points of a line that is also drawn smoothed."""
_MAX_DOTTED_POINTS = 20
"""Maximum number of points of a line whose points are all drawn as dots."""
_IMAGE_MARGIN, _IMAGE_TOP = 10, 38
"""Margins of a chart as an image, and the height of its title and names, in pixels."""
_CHARACTER_WIDTH = 6.3
"""Approximate width of a character of a tick label, in pixels."""
_CHART_RULES = (
    ".grid {",
    ".tick {",
    ".line",
    ".band {",
    ".dot {",
    ".shade {",
    ".mark-line {",
    ".proxy {",
    ".c1 {",
    ".c4 {",
)
"""Starts of the lines of report.css that style the parts of a chart."""


@dataclass(frozen=True)
class Series:
    """A line of a chart, with an optional band from `low` to `high`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "c1"
    """CSS class: proxy, gold, ref, or c1 ... c6."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    @classmethod
    def from_estimates(
        cls, name: str, x: Sequence[float], estimates: Sequence[Interval], color: str
    ) -> Series:
        """Return a line through estimates, with their intervals as its band.

        The band has width 0 at a point without an interval.
        """
        values = [e.value for e in estimates]
        if not any(e.known for e in estimates):
            return cls(name, x, values, color)
        low = [e.low if e.known else e.value for e in estimates]
        high = [e.high if e.known else e.value for e in estimates]
        return cls(name, x, values, color, low, high)


@dataclass(frozen=True)
class Chart:
    """A panel with a title, lines and a note."""

    title: str
    series: Sequence[Series]
    note: str = ""
    x_label: str = "step"
    """Short name of x, which is shown on the axis and next to the values at the cursor."""
    mark: tuple[float, str] | None = None
    """(x, label) of a vertical line."""
    shade: tuple[float, float] | None = None
    """Range of x that is shaded, such as the interval of `mark`; it is clipped to the axis."""
    y_label: str = ""
    """Unit of y, which is shown above the axis."""


@dataclass(frozen=True)
class _AxisRanges:
    """Ranges of the axes, and the transformation from data coordinates to the SVG view box."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x_position(self, x: float) -> float:
        """Return the horizontal position of x in the view box."""
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y_position(self, y: float) -> float:
        """Return the vertical position of y in the view box."""
        return HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def charts_html(charts: Sequence[Chart]) -> str:
    """Return the charts side by side, as HTML."""
    return f'<div class="charts">{"".join(map(chart_html, charts))}</div>'


def chart_html(chart: Chart) -> str:
    """Return a chart as an HTML figure. A chart without points has a message instead of axes."""
    lines = _thinned_lines(chart)
    heading = f"<b>{esc(chart.title)}</b>{_legend_html(lines, chart.title)}"
    title = f"<figcaption>{heading}</figcaption>"
    note = f'<p class="note">{esc(chart.note)}</p>' if chart.note else ""
    if not lines:
        return f'<figure class="chart">{title}<p class="empty">nothing logged</p>{note}</figure>'
    frame = _axis_ranges_around(lines)
    return (
        f'<figure class="chart">{title}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{esc(_screen_reader_text(chart, lines))}" '
        f'data-chart="{_cursor_data_json(chart, lines, frame)}">{_drawing_svg(chart, lines, frame)}'
        f'<g class="cursor"></g></svg>{note}</figure>'
    )


def standalone_chart_svg(chart: Chart) -> str:
    """Return a chart as an SVG file of its own, with its title and the names of its lines.

    The image has the colors of the report page, light or dark according to the reader's system. It
    is displayed correctly in an ``<img>`` element, which no other style sheet can change.
    """
    lines = _thinned_lines(chart)
    body = f'<text class="title" x="0" y="{-_IMAGE_TOP + 13}">{esc(chart.title)}</text>'
    x = 0.0
    for series in lines:
        name = series.name if len(lines) > 1 else f"{series.name} {short_number(series.y[-1])}"
        body += f'<path class="line {esc(series.color)}" d="M{x:.0f} -9h12"/>'
        body += f'<text class="tick" x="{x + 16:.0f}" y="-5">{esc(name)}</text>'
        x += 32 + _CHARACTER_WIDTH * len(name)
    if lines:
        body += _drawing_svg(chart, lines, _axis_ranges_around(lines))
    else:
        body += f'<text class="tick" x="{LEFT}" y="{HEIGHT / 2:.0f}">nothing logged</text>'
    width, height = WIDTH + 2 * _IMAGE_MARGIN, HEIGHT + _IMAGE_TOP + 2 * _IMAGE_MARGIN
    left, top = -_IMAGE_MARGIN, -_IMAGE_TOP - _IMAGE_MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}" '
        f'width="{width}" height="{height}" role="img">'
        f"<title>{esc(_screen_reader_text(chart, lines))}</title>"
        f"<style>\n{_image_style()}</style>"
        f'<rect class="paper" x="{left}" y="{top}" width="{width}" height="{height}"/>'
        f"{body}</svg>\n"
    )


def _image_style() -> str:
    """Return the rules of the report's style sheet that concern the parts of a chart."""
    css = files("rlhf.reports").joinpath("report.css").read_text(encoding="utf-8")
    colors = css[: css.index("* { box-sizing")]
    rules = [line for line in css.splitlines(keepends=True) if line.startswith(_CHART_RULES)]
    own = (
        "text { font-family: -apple-system, 'Segoe UI', Roboto, Arial, sans-serif; }\n"
        ".title { fill: var(--ink); font-size: 13.5px; font-weight: 600; }\n"
        ".paper { fill: var(--card); }\n"
    )
    return colors + "".join(rules) + own


def _thinned_lines(chart: Chart) -> list[Series]:
    """Return the lines of a chart that have points, with few enough points to draw."""
    return [_thinned_series(series) for series in chart.series if series.x]


def _drawing_svg(chart: Chart, lines: Sequence[Series], frame: _AxisRanges) -> str:
    """Return the axes, lines, bands and marks of a chart."""
    body = [_shaded_range_svg(*chart.shade, frame)] if chart.shade else []
    whole = all(float(x).is_integer() for line in lines for x in line.x)
    body += [_grid_svg(frame, chart.y_label), _x_axis_svg(frame, chart.x_label, whole=whole)]
    body += [_vertical_line_svg(*chart.mark, frame)] if chart.mark else []
    body += [_band_svg(series, frame) for series in lines if series.low]
    body += [_line_svg(series, frame) for series in lines]
    return "".join(body)


def tick_values(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """Return about `count` multiples of a number that is 1, 2 or 5 times a power of ten.

    They are all its multiples in [low, high], where `low` must be below `high`. If `whole` is set,
    they are integers, as on an axis of training steps.
    """
    raw = (high - low) / max(1, count)
    if whole:
        raw = max(1.0, raw)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis_ranges_around(lines: Sequence[Series]) -> _AxisRanges:
    """Return the ranges of the axes that contain all lines and bands."""
    xs = [x for s in lines for x in s.x]
    ys = [y for s in lines for y in (*s.y, *s.low, *s.high)]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    # The vertical axis starts at 0 if the smallest value is positive and small.
    if 0 < y0 < 0.35 * y1:
        y0 = 0.0
    pad = 0.06 * (y1 - y0) or 0.5 * abs(y1) or 1.0
    return _AxisRanges(x0, x1 if x1 > x0 else x0 + 1, y0 if y0 == 0 else y0 - pad, y1 + pad)


def _grid_svg(frame: _AxisRanges, unit: str) -> str:
    """Return the horizontal grid lines with their labels, and the unit above them."""
    parts = [f'<text class="tick" x="0" y="11">{esc(unit)}</text>'] if unit else []
    for value in tick_values(frame.y0, frame.y1):
        y = frame.y_position(value)
        kind = "zero" if value == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{short_number(value)}</text>"
        )
    return "".join(parts)


def _x_axis_svg(frame: _AxisRanges, label: str, *, whole: bool) -> str:
    """Return the horizontal axis with its ticks and its name `label`."""
    base = HEIGHT - BOTTOM
    marks = tick_values(frame.x0, frame.x1, 5, whole=whole)
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    parts += [
        f'<text class="tick" x="{min(frame.x_position(value), WIDTH - RIGHT - 6):.1f}" '
        f'y="{base + 16}" text-anchor="middle">{short_number(value)}</text>'
        for value in marks
        if frame.x_position(value) > LEFT + 14
    ]
    parts.append(
        f'<text class="tick" x="{LEFT - 6}" y="{base + 16}" text-anchor="end">{esc(label)}</text>'
    )
    return "".join(parts)


def _shaded_range_svg(low: float, high: float, frame: _AxisRanges) -> str:
    """Return a rectangle that shades the range [low, high] of x."""
    left, right = frame.x_position(max(low, frame.x0)), frame.x_position(min(high, frame.x1))
    return (
        f'<rect class="shade" x="{left:.1f}" y="{TOP}" width="{max(0.0, right - left):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
    )


def _vertical_line_svg(x: float, label: str, frame: _AxisRanges) -> str:
    """Return a labeled vertical line at x."""
    at, left = frame.x_position(x), x > (frame.x0 + frame.x1) / 2
    line = (
        f'<line class="mark-line" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    )
    return (
        f'{line}<text class="mark-text" x="{at - 5 if left else at + 5:.1f}" '
        f'y="{HEIGHT - BOTTOM - 6}" text-anchor="{"end" if left else "start"}">'
        f"{esc(label)}</text>"
    )


def _line_svg(series: Series, frame: _AxisRanges) -> str:
    """Return the path of a line, and a dot at its last point.

    A short line has dots at all points. A long line is drawn faintly, with its moving average over
    it.
    """
    color, values, parts = esc(series.color), series.y, []
    if len(series.x) >= _MIN_SMOOTHED_POINTS:
        raw = _path_data(series.x, series.y, frame)
        parts.append(f'<path class="line raw {color}" d="{raw}"/>')
        values = centered_moving_average(series.y, 2 * max(3, len(series.y) // 30) + 1)
    parts.append(f'<path class="line {color}" d="{_path_data(series.x, values, frame)}"/>')
    points = [
        (frame.x_position(x), frame.y_position(y)) for x, y in zip(series.x, values, strict=True)
    ]
    dots = [(point, "1.8") for point in points if len(points) <= _MAX_DOTTED_POINTS]
    for (x, y), radius in [*dots, (points[-1], "3")]:
        parts.append(f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
    return "".join(parts)


def _band_svg(series: Series, frame: _AxisRanges) -> str:
    """Return the polygon of a line's band."""
    upper = [
        (frame.x_position(x), frame.y_position(y))
        for x, y in zip(series.x, series.high, strict=True)
    ]
    lower = [
        (frame.x_position(x), frame.y_position(y))
        for x, y in zip(series.x, series.low, strict=True)
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    return f'<polygon class="band {esc(series.color)}" points="{points}"/>'


def _path_data(xs: Sequence[float], ys: Sequence[float], frame: _AxisRanges) -> str:
    """Return the data of an SVG path through points."""
    points = (
        f"{frame.x_position(x):.1f} {frame.y_position(y):.1f}" for x, y in zip(xs, ys, strict=True)
    )
    return "M" + "L".join(points)


def _legend_html(lines: Sequence[Series], title: str) -> str:
    """Return the names of several lines, or the last value of a single line."""
    if len(lines) == 1:
        name = "" if lines[0].name.lower() in title.lower() else esc(lines[0].name) + " "
        return f'<span class="last">{name}{short_number(lines[0].y[-1])}</span>'
    return "".join(f'<span class="key {esc(s.color)}">{esc(s.name)}</span>' for s in lines)


def _screen_reader_text(chart: Chart, lines: Sequence[Series]) -> str:
    """Return a text description of a chart for screen readers."""
    parts = [f"{s.name} from {short_number(s.y[0])} to {short_number(s.y[-1])}" for s in lines]
    return f"{chart.title}: {'; '.join(parts)}"


def _cursor_data_json(chart: Chart, lines: Sequence[Series], frame: _AxisRanges) -> str:
    """Return the data that report.js needs for the cursor, as escaped JSON."""
    data = {
        "label": chart.x_label,
        "frame": [frame.x0, frame.x1, frame.y0, frame.y1, LEFT, RIGHT, TOP, BOTTOM],
        "series": [
            {
                "name": s.name,
                "color": s.color,
                "x": list(s.x),
                "y": [float(f"{y:.5g}") for y in s.y],
            }
            for s in lines
        ],
    }
    return esc(json.dumps(data, separators=(",", ":")))


def _thinned_series(series: Series) -> Series:
    """Reduce a line to about `_MAX_POINTS` points.

    The minimum and the maximum of each bin are kept, so that spikes remain visible.
    """
    size = len(series.x)
    if size <= _MAX_POINTS:
        return series
    width = math.ceil(2 * size / _MAX_POINTS)
    selected = {0, size - 1}
    for start in range(0, size, width):
        indices = range(start, min(start + width, size))
        selected |= {min(indices, key=series.y.__getitem__), max(indices, key=series.y.__getitem__)}
    order = sorted(selected)

    def pick_selected(values: Sequence[float]) -> list[float]:
        return [values[i] for i in order] if values else []

    columns = {key: pick_selected(getattr(series, key)) for key in ("x", "y", "low", "high")}
    return replace(series, **columns)
