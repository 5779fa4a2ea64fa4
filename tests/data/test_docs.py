"""The examples of docs/data.md run and print the documented output."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_examples_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    printed = capsys.readouterr().out
    promised = re.findall(r"print\(.*\)   # (.*)", "\n".join(blocks))
    assert len(promised) == 9
    for line in promised:
        text, times = re.subn(", five times$", "", line)
        assert printed.splitlines().count(text) == (5 if times else 1), line
