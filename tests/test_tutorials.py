"""Every code block of the tutorials is executed, in the order of the page and in one folder.

A block with a title is a file that is written. Of shell blocks, every line is a command of `rlhf`.
Python blocks share their variables, and must print what their comments say.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.documentation import promised

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def script_of(page: Path) -> str:
    """The blocks of a page as one Python program."""
    return "\n".join(["from pathlib import Path", *statements(page)])


def statements(page: Path) -> Iterator[str]:
    for language, title, content in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            yield f"Path({title!r}).write_text({content!r})"
        elif language == "python":
            yield content
        else:
            assert language == "bash", language
            for line in content.splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "rlhf"
                yield "from rlhf.cli.main import main"
                yield f"assert main({words!r}) == 0, {line!r}"


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_says(page, tmp_path):
    code = script_of(page)
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RLHF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    printed = process.stdout.splitlines()
    assert promised(code)
    for line in promised(code):
        assert line in printed, (line, printed)


def test_the_four_audiences_have_a_tutorial():
    names = {page.stem for page in TUTORIALS}
    assert names == {"first-run", "alignment-researcher", "reward-model", "benchmark"}
