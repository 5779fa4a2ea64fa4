"""Live plots and representations of results, in a real notebook kernel and outside of one."""

from __future__ import annotations

import base64
import json
import logging
import re
import xml.etree.ElementTree as ET
from typing import Any

import rlhf
from rlhf.api.live_plot import charts_as_images_html
from rlhf.reports.charts import Chart, Series, standalone_chart_svg
from tests.helpers.notebook import executed

SCRATCH = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 128}}
SHORT: dict[str, Any] = {
    "model": SCRATCH,
    "env": "text/Echo-v0",
    "rollout": {"max_new_tokens": 3},
    "episodes_per_step": 8,
    "evaluation": {"episodes": 4, "every": 2},
}


def images(html: str) -> dict[str, ET.Element]:
    """Title -> root of the SVG images in HTML."""
    found = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/svg\+xml;base64,([^"]+)"', html)
    return {alt: ET.fromstring(base64.b64decode(data)) for alt, data in found}


def test_without_a_notebook_it_logs_one_line_and_records(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    plot = rlhf.LivePlot(["reward/mean", "eval/return", "no/metric"])
    with caplog.at_level(logging.INFO, "rlhf.api.live_plot"):
        run = rlhf.rloo(**SHORT, num_steps=2, callbacks=[plot])
    lines = [record for record in caplog.records if record.name == "rlhf.api.live_plot"]
    assert len(lines) == 1
    assert [step for step, _ in plot.points["reward/mean"]] == [1, 2]
    assert [value for _, value in plot.points["reward/mean"]] == run.metrics["reward/mean"].tolist()
    assert [step for step, _ in plot.points["eval/return"]] == [2]
    assert "no/metric" not in plot.points


def test_one_metric_needs_no_list():
    assert rlhf.LivePlot("reward/mean").metrics == ("reward/mean",)


def test_a_checkpoint_contains_the_points():
    plot, restored = rlhf.LivePlot(["reward/mean"]), rlhf.LivePlot(["reward/mean"])
    plot.points = {"reward/mean": [(1, 0.25), (2, 0.5)]}
    restored.load_state_dict(json.loads(json.dumps(plot.state_dict())))
    assert restored.points == plot.points


def test_a_live_plot_in_a_kernel_draws_one_output_that_is_updated(tmp_path):
    cells = executed(
        tmp_path,
        "import rlhf",
        f"run = rlhf.rloo(**{SHORT!r}, num_steps=3, callbacks=[rlhf.LivePlot(['reward/mean'])])",
        "run",
        "judged = rlhf.evaluate(policies={'random': None, 'expert': None}, env='text/Echo-v0',\n"
        "                       episodes=8)\nrlhf.compare(judged)",
    )
    (drawn,) = [o for o in cells[1] if o["output_type"] == "display_data"]
    (picture,) = images(drawn["data"]["text/html"]).values()
    text = "".join(picture.itertext())
    assert "reward/mean" in text
    lines = [path.get("d", "") for path in picture.iter("{http://www.w3.org/2000/svg}path")]
    assert any(line.count("L") == 2 for line in lines)  # a line through the three steps
    (shown,) = [o for o in cells[2] if o["output_type"] == "execute_result"]
    assert "reward/mean" in images(shown["data"]["text/html"])
    assert "rloo in runs/rloo" in shown["data"]["text/html"]
    (table,) = [o for o in cells[3] if o["output_type"] == "execute_result"]
    assert "expert - random" in table["data"]["text/html"]


def test_names_cannot_leave_their_element():
    name = '</text><script>alert("1")</script> "ä" 猫'
    html = charts_as_images_html({name: [(1, 0.5), (2, 1.0)]})
    assert "<script>" not in html
    (root,) = images(html).values()
    assert root.find(".//{http://www.w3.org/2000/svg}script") is None
    assert name in "".join(root.itertext())


def test_a_chart_without_points_says_so():
    root = ET.fromstring(standalone_chart_svg(Chart("empty", [Series("none", [], [])])))
    assert "nothing logged" in "".join(root.itertext())
    assert charts_as_images_html({}) == "<div></div>"
