"""docs/environments.md: its own environment is sound, and its table equals the catalog."""

import re
from pathlib import Path

import gymnasium as gym
import pytest

from rlhf.envs.catalog import catalog
from rlhf.envs.check import check

PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_environment_of_the_example_passes_the_check():
    (example,) = (example for example in EXAMPLES if "class AddTwo" in example)
    exec(compile(example, "docs/environments.md", "exec"), {"__name__": "example"})
    findings = check("mine/AddTwo-v0", episodes=3)
    assert all("JSON" in finding for finding in findings)
    del gym.registry["mine/AddTwo-v0"]


def test_third_party_environment_example_has_twenty_lines():
    (example,) = (e for e in EXAMPLES if "class AddTwo" in e)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_table_of_tasks_equals_the_catalog():
    rows = {row["id"]: row for row in catalog()}
    shown = re.findall(
        r"^\| `(text/\S+)` \| [^|]+ \| (\d+) \| (\S+) \| (\S+) \| [^|]+ \|$", PAGE, flags=re.M
    )
    own = {env_id for env_id, row in rows.items() if row["extra"] is None}
    assert {line[0] for line in shown} == own
    for env_id, turns, random, optimum in shown:
        row = rows[env_id]
        assert int(turns) == row["horizon"], env_id
        for text, value in ((random, row["random"]), (optimum, row["optimum"])):
            if value is None:
                assert text == "–", env_id
            else:
                digits = len(text.partition(".")[2])
                assert float(text) == pytest.approx(value, abs=0.5001 * 10**-digits), env_id
