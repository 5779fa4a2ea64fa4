"""Draw one point for each run, with a choice of the quantities on both axes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.common.text import escape_invisible
from rlhf.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from rlhf.reports.markup import esc


@dataclass(frozen=True)
class Point:
    """A run in a scatter plot."""

    label: str
    """Text that is shown next to the pointer."""
    values: Mapping[str, float]
    """Quantity -> value. A point without a finite value of each axis is not drawn."""
    color: str = "c1"
    """CSS class: c1 ... c6 or ref."""


def scatter_html(points: Sequence[Point], *, x: str, y: str, title: str, note: str) -> str:
    """Return a scatter plot as HTML; scatter.js draws the points and changes the axes.

    Args:
        points: The runs.
        x: Quantity of the horizontal axis at first.
        y: Quantity of the vertical axis at first.
        title: Heading of the plot.
        note: Text below the plot.
    """
    names = sorted({name for point in points for name in point.values})
    data = {
        "frame": [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM],
        "points": [
            {
                "label": escape_invisible(point.label),
                "color": point.color,
                "values": {k: v for k, v in point.values.items() if math.isfinite(v)},
            }
            for point in points
        ],
    }
    choices = "".join(
        f'<label>{axis} <select data-axis="{key}">{_options_html(names, chosen)}</select></label>'
        for key, axis, chosen in (("y", "vertical", y), ("x", "horizontal", x))
    )
    return (
        f'<figure class="chart scatter" data-scatter="{esc(json.dumps(data))}">'
        f"<figcaption><b>{esc(title)}</b>{choices}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}"></svg>'
        f'<p class="note">{esc(note)}</p></figure>'
    )


def _options_html(names: Sequence[str], chosen: str) -> str:
    return "".join(
        f'<option value="{esc(name)}"{" selected" if name == chosen else ""}>{esc(name)}</option>'
        for name in names
    )
