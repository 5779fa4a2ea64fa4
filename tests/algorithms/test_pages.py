"""The pages of the algorithms are those of the registry, the code and the stored numbers."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.algorithm_curves import CURVES, METRICS, SETTINGS
from benchmarks.algorithm_pages import FOLDER, file_name, files, page
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.files import read_json

STORED = read_json(CURVES)
FILES = files(STORED)


def test_there_is_a_page_and_a_curve_for_every_algorithm_and_nothing_else():
    names = {file_name(name) for name in ALGORITHMS}
    found = {path.name for path in FOLDER.iterdir()}
    assert found == {f"{n}{s}" for n in names for s in (".md", ".svg")} | {CURVES.name}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_the_one_that_the_script_writes(path):
    written = path.read_text(encoding="utf-8")
    assert written == FILES[path], "run: python -m benchmarks.algorithm_pages"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_stored_curves_were_measured_with_the_settings_in_force(name):
    assert STORED["settings"] == SETTINGS
    row, result = ALGORITHMS[name], STORED["algorithms"][name]
    assert result["algorithm"] == {
        key: getattr(row.settings, key) for key in row.settings_with_effect
    }
    for metric in METRICS:
        curves = result["curves"][metric]
        assert len(curves) >= 5
        assert {len(curve) for curve in curves} == {SETTINGS["num_steps"]}


def test_a_changed_default_changes_the_page():
    import dataclasses

    row = ALGORITHMS["grpo"]
    settings = dataclasses.replace(row.settings, group_size=16)
    changed = page(dataclasses.replace(row, settings=settings), STORED)
    assert "| `group_size` | 16 |" in changed
    assert "| `group_size` | 8 |" in page(row, STORED)


def test_a_page_has_the_lines_of_code_without_the_metrics():
    text = page(ALGORITHMS["grpo"], STORED)
    assert "surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)" in text
    assert "centered / (variance.sqrt() + 1e-4)" in text
    assert "def k3(" in text
    assert "def _ratio_loss_metrics" not in text
    assert "def k3(" not in page(ALGORITHMS["dapo"], STORED)


def test_a_curve_is_a_valid_image_with_a_description():
    root = ET.fromstring(FILES[FOLDER / "ppo.svg"])
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert "score from" in (title.text or "")
