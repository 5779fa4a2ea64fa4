"""The page of an explanation in a real browser: no error, no request, no side scroll, shades."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.explain import Explanation
from tests.helpers.probed_page import open_page

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("size", "scheme"), [("1280,900", 1), ("380,800", 0)])
def test_the_page_opens_cleanly_and_shades_its_tokens(
    explanation: Explanation, tmp_path: Path, size: str, scheme: int
):
    page = explanation.save(tmp_path)
    flags = (f"--window-size={size}", f"--blink-settings=preferredColorScheme={scheme}")
    seen, console = open_page(page, tmp_path / "profile", *flags)
    assert console == ""
    assert seen["requests"] == ["/probed.html"]
    assert seen["title"] != "owned"
    assert seen["scripts"] == 2  # that of the page and the probe
    assert seen["content"] <= seen["width"]
    assert seen["charts"] >= 4 + 3  # a prefix curve for each pair, and the blocks
    lines = seen["token"].splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "gradient × input",
        "integrated gradients",
    ]
