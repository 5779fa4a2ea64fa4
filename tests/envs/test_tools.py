"""The checker, the terminal game and the catalog."""

import importlib.util
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from rlhf import envs
from rlhf.envs.catalog import catalog, find
from rlhf.envs.check import check
from rlhf.envs.core import TextEnv
from rlhf.envs.play import play

PLANTED = {
    "Sound": None,
    "GlobalDraws": "Python's global generator",
    "Shared": "two different episodes|shared state",
    "Fragile": "raised ValueError",
    "Gullible": "counts as success",
    "Changeling": "the types int and float",
    "Endless": "did not end within",
    "Boastful": r"optimal_value\(\) is 5.0000",
    "Alphabet": "Text space allows only its alphabet",
    "Stated": None,
    "Priced": None,
    "Idle": r"adversary: silence earns 0.0000 per episode, optimal_value\(\) is -3.0000",
    "Prolix": r"adversary: expert play with 8 times 'no' after it earns 1.8000",
    "Quitter": "exact: the exact optimum is -1.0000",
    "Unstated": "adversary: silence earns 0.0000 per episode, intended play earns -",
    "Substring": "adversary: all actions joined by ' ' earns 1.0000 per episode, intended play",
    "Quits": "junk: raised SystemExit: 3",
    "Numbers": r"a reply that is not a number \(rollout.invalid_reward: 0\) earns 0.0000",
    "Guess": None,
    "OwnGenerator": None,
    "Squares": None,
    "NoPlay": None,
    "Undefined": r"truth: optimal_value\(\) is nan, which is not finite",
    "Optimist": r"truth: optimal_value\(\) is 1.0000, but 100 episodes gave -2.0000",
    "AcceptsNan": "adversary: the junk 'nan' earns 1.0000",
    "Polite": "adversary: the instructions repeated earns 1.0000",
    "Late": "adversary: silence for 11 turns, then expert play earns 1.0000",
}


@pytest.fixture(autouse=True, scope="module")
def third_party_envs():
    """Make the faulty environments importable for `module:id`."""
    path = Path(__file__).parents[1] / "helpers" / "third_party_envs.py"
    spec = importlib.util.spec_from_file_location("third_party_envs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["third_party_envs"] = module
    spec.loader.exec_module(module)
    yield
    for name in [name for name in gym.registry if name.startswith("third_party/")]:
        del gym.registry[name]
    del sys.modules["third_party_envs"]


@pytest.mark.filterwarnings("ignore:.*is not within the observation space")
@pytest.mark.parametrize("name", PLANTED)
def test_the_checker_finds_the_planted_fault(name):
    findings = check(f"third_party_envs:third_party/{name}-v0", episodes=5)
    if PLANTED[name] is None:
        assert findings == []
    else:
        with pytest.raises(AssertionError, match=PLANTED[name]):
            raise AssertionError("\n".join(findings))


@pytest.mark.filterwarnings("ignore:.*is not within the observation space")
def test_the_number_zero_is_no_empty_observation():
    findings = check("third_party_envs:third_party/Zero-v0", episodes=2)
    assert "texts: an observation is int, not str" in findings
    assert not any("observation is empty" in finding for finding in findings)


@pytest.mark.parametrize("name", envs.TASKS)
def test_registered_environments_have_no_findings(name):
    assert check(f"text/{name}", episodes=5) == []


def test_the_checker_takes_an_instance():
    assert check(gym.make("text/Echo-v0")) == []
    from rlhf.envs.echo import Echo

    assert any("has no id" in finding for finding in check(Echo()))


def test_find_is_lenient_and_suggests():
    assert (
        find("tmaze").id
        == find("text/TMaze-v0").id
        == find("rlhf.envs:TMaze").id
        == "text/TMaze-v0"
    )
    with pytest.raises(ValueError, match="did you mean text/PreferenceBandit-v0"):
        find("PreferenceBandits")
    with pytest.raises(ValueError, match="cannot import 'nowhere'"):
        find("nowhere:Thing-v0")


def test_play_shows_everything_and_sums_the_rewards():
    lines = []
    answers = iter([":legal", ":hint", "left", "forward", "forward", "left"])
    total = play(
        "TMaze", seed=0, read=lambda prompt: next(answers), write=lines.append, length=2, steps=4
    )
    sign = "left" if "sign says left" in "\n".join(lines) else "right"
    assert total == float(sign == "left")
    assert "forward, left, right" in lines
    assert lines[-1] == f"Return: {total:g}"


@pytest.mark.parametrize("last", [":quit", None])
def test_play_quits(last):
    def read(prompt):
        if last is None:
            raise EOFError
        return last

    assert play("Bandit", read=read, write=lambda line: None) == 0.0


class ControlCodes(TextEnv):
    """An environment whose texts move the cursor and clear the screen."""

    system_prompt = "rules\x1b[2J"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "first\x1b]0;title\x07", {}

    def step(self, action):
        return f"you said {action}", 1.0, True, False, {"reason": "over\u202e"}

    def expert(self) -> str:
        return "hint\x9b31m"


def test_play_shows_no_control_codes(monkeypatch):
    monkeypatch.setattr("rlhf.envs.play.make", lambda _: ControlCodes())
    script, shown = iter([":hint", "\x1b[31mred"]), []
    play("codes", read=lambda _: next(script), write=shown.append)
    text = "\n".join(shown)
    for word in ("rules", "first", "hint", "you said", "over"):
        assert word in text
    assert all(character.isprintable() for line in text.splitlines() for character in line)


def test_play_reports_a_missing_hint():
    lines, answers = [], iter([":hint", ":quit"])
    play("Prompts", read=lambda prompt: next(answers), write=lines.append)
    assert any("does not compute" in line for line in lines)


def test_catalog_lists_every_id_with_its_values():
    rows = catalog()
    assert [row["id"] for row in rows] == sorted(
        f"text/{name}" for name in (*envs.TASKS, *envs.EXTRAS)
    )
    by_id = {row["id"]: row for row in rows}
    maze = by_id["text/TMaze-v0"]
    assert (maze["horizon"], maze["optimum"], maze["source"]) == (8, 1.0, "own")
    assert by_id["text/FrozenLake-v0"]["source"] == "gymnasium"
    assert by_id["text/TextArena-v0"]["extra"] == "textarena"
    assert all(row["summary"].endswith(".") for row in rows)
    assert catalog(compute_values=False)[0]["optimum"] is None
