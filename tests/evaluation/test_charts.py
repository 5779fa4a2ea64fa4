"""Charts: geometry, ticks, and what is kept when a line is thinned."""

import json
import math
import re
from html import unescape

import pytest

from rlhf.common.numbers import centered_moving_average, short_number
from rlhf.reports.charts import Chart, Series, chart_html, tick_values


def payload(svg: str) -> dict:
    found = re.search(r'data-chart="([^"]*)"', svg)
    assert found
    return json.loads(unescape(found[1]))


def test_ticks_are_round_and_inside():
    assert tick_values(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert tick_values(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert tick_values(1e-5, 3e-5) == pytest.approx([1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5], rel=0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (-1234, "−1234"), (12_500, "12.5k"), (2e-6, "2e−6"), (3e7, "3e7")],
)
def test_short_numbers(value: float, text: str):
    assert short_number(value) == text


def test_points_lie_where_the_data_say():
    svg = chart_html(Chart("t", [Series("a", [0, 10], [1.0, 2.0])]))
    (path,) = re.findall(r'class="line c1" d="M([\d. ]+)L([\d. ]+)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in path)
    # x spans the plot from 44 to 340 - 12; y is padded by 6% on both sides of [1, 2], 164 high
    assert (x0, x1) == (44.0, 328.0)
    assert y0 == pytest.approx(182 - 164 * 0.06 / 1.12, abs=0.1)
    assert y1 == pytest.approx(182 - 164 * 1.06 / 1.12, abs=0.1)


def test_constant_and_single_points_draw():
    for ys in ([0.0], [3.0], [-2.0, -2.0], [0.0, 0.0]):
        svg = chart_html(Chart("t", [Series("a", list(range(len(ys))), ys)]))
        assert "nan" not in svg
        assert "inf" not in svg


def test_empty_chart_says_so():
    assert "nothing logged" in chart_html(Chart("t", [Series("a", [], [])]))


def test_thinning_keeps_every_spike_and_both_ends():
    ys = [math.sin(i / 50) for i in range(10_000)]
    ys[5_003], ys[7_777] = 9.0, -9.0
    kept = payload(chart_html(Chart("t", [Series("a", list(range(10_000)), ys)])))["series"][0]
    assert len(kept["x"]) <= 302
    assert kept["x"][0] == 0
    assert kept["x"][-1] == 9_999
    assert 9.0 in kept["y"]
    assert -9.0 in kept["y"]


def test_smoothing_keeps_straight_lines_and_averages_the_ends():
    line = [2.0 * i for i in range(60)]
    assert centered_moving_average(line, 5)[2:-2] == pytest.approx(line[2:-2])
    # By hand: (1 + 4) / 2, (1 + 4 + 1) / 3, (4 + 1) / 2.
    assert centered_moving_average([1.0, 4.0, 1.0], 3) == [2.5, 2.0, 2.5]


def test_a_smoothed_line_does_not_end_on_the_last_raw_value():
    ys = [0.0] * 59 + [1.0]
    svg = chart_html(Chart("t", [Series("a", list(range(60)), ys)]))
    raw, bold = (
        float(re.findall(r" ([\d.]+)$", path)[0])
        for path in re.findall(r'class="line[^"]*" d="([^"]*)"', svg)
    )
    # The window of the last point holds four values: the bold line rises by a quarter.
    bottom = 182.0  # an axis from 0 has no margin below
    assert (bottom - bold) / (bottom - raw) == pytest.approx(0.25, abs=0.01)


def test_steps_have_whole_ticks():
    assert tick_values(0, 2, 5, whole=True) == [0, 1, 2]
    assert tick_values(0, 2, 5) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    svg = chart_html(Chart("t", [Series("a", [0, 1, 2], [1.0, 2.0, 3.0])]))
    labels = re.findall(r'text-anchor="middle">([^<]*)<', svg)
    assert labels == ["1", "2"]
    svg = chart_html(Chart("t", [Series("a", [0.0, 0.5, 1.5], [1.0, 2.0, 3.0])]))
    assert "0.5" in re.findall(r'text-anchor="middle">([^<]*)<', svg)


def test_names_are_escaped():
    svg = chart_html(Chart("<b>", [Series('"><script>', [1], [1.0]), Series("b", [1], [2.0])]))
    assert "<script>" not in svg
    assert "<b><b>" not in svg
