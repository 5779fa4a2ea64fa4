"""The environment that the documentation shows, written by a stranger, trains with PPO."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.cli.table import run_command
from tests.helpers.training import metrics_of, online_tree

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


def test_the_documented_environment_trains(tmp_path, echo_model, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (source,) = [block for block in blocks if "class AddTwo" in block]
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "strangers_addition.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2)
    tree["env"] = {"id": "strangers_addition:mine/AddTwo-v0"}
    run_command("ppo", tree)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
