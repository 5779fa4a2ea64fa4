"""A benchmark with functions as rows, and environments that differ in what they offer."""

import json

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.errors import UserError
from rlhf.studies.bench.manifest import make_bench
from tests.helpers.training import unknown_entries

pytestmark = pytest.mark.slow

CODE = '''
import gymnasium as gym

def apple(messages):
    return "apple"

class Plain(gym.Env):
    """Says yes; there is no expert and no known value."""

    def __init__(self):
        self.action_space = gym.spaces.Text(64, charset="abcdefghijklmnopqrstuvwxyz ")
        self.observation_space = gym.spaces.Text(64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Say apple.", {}

    def step(self, action):
        return "", float("apple" in action), True, False, {}

    def sample_action(self, rng):
        return ["apple", "river"][rng.integers(2)]
'''


def manifest(folder, place, **changes):
    (folder / "mine.py").write_text(CODE)
    return {
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "episodes": 6,
        "curve_points": 1,
        "model": {"path": str(place)},
        "sft": {"max_length": 48, "evaluations": 1, "trainer": {"max_steps": 2}},
        "run": {"num_steps": 1, "episodes_per_step": 8, "rollout": {"max_new_tokens": 3}},
        "environments": {
            "echo": {
                "env": {"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
                "demonstrations": {"count": 16},
            },
            "plain": {
                "env": {"id": f"{folder / 'mine.py'}:Plain"},
                "references": ["random"],
                "random": 0.5,
                "optimal": 1.0,
            },
        },
        "policies": {"rule": {"path": f"{folder / 'mine.py'}:apple"}},
        "algorithms": {"rloo": {}},
    } | changes


def test_a_function_is_a_row_and_an_expert_may_be_missing(tmp_path, echo_model, capsys):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(manifest(tmp_path, echo_model)))
    assert main(["bench", str(path)]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    result = json.loads((out / "bench.json").read_text())
    assert set(result["scores"]) == {"random", "expert", "rule", "initial", "rloo"}
    assert set(result["scores"]["expert"]) == {"echo"}
    assert result["scores"]["rule"]["plain"] == [1.0]
    assert "expert" not in result["aggregates"]
    assert {"rule", "random", "initial", "rloo"} <= set(result["aggregates"])
    text = (out / "bench.md").read_text()
    assert "The row expert exists only in echo" in text
    assert "(plain" not in text
    assert "| rule |" in text
    assert (out / "tables/cells.tex").read_text().count("\\\\") == 6
    assert not (out / "runs/plain/seed0/sft").exists()
    assert (out / "runs/echo/seed0/sft").exists()
    page = (out / "pages/plain.html").read_text()
    assert "rule" in page
    assert not unknown_entries(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": {"rloo": {"path": "a:b"}}}, "is reserved, the name of an algorithm"),
        ({"policies": {"initial": {"path": "a:b"}}}, "is reserved"),
        ({"policies": {"../x": {"path": "a:b"}}}, "no valid folder name"),
        ({"policies": {"x": {"model": {"path": "m"}}}}, "give path or api"),
        ({"policies": {"x": {}}}, "policies.x: .*needs a model, a path or an api"),
        ({"policies": {"x": 3}}, "policies.x: expected a mapping"),
        ({"baseline": "expert"}, "there is no row 'expert'"),
        ({"model": {"scratch": {}}}, "give demonstrations for plain"),
    ],
)
def test_mistakes_are_named(tmp_path, echo_model, changes, message):
    with pytest.raises(UserError, match=message):
        make_bench(manifest(tmp_path, echo_model, **changes), COMMANDS)
