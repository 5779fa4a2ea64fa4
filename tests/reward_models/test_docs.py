"""The examples of docs/rewards.md run, and its table names every kind."""

import re
import shutil
from pathlib import Path

import pytest

from rlhf.reward_models import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_examples_run_and_print_what_they_say(decoder_path, tmp_path, monkeypatch, capsys):
    shutil.copytree(decoder_path, tmp_path / "runs" / "reward" / "final")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    promised = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/rewards.md", "exec"), names)
        promised += re.findall(r"^print\(.*?\)\s+# (.*)$", block, re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    for line in promised:
        start = line.removesuffix(" ...")
        assert any(p.startswith(start) for p in printed), line


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_in_the_table(kind):
    assert f"| `{kind}` |" in PAGE
