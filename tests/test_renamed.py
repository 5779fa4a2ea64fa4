"""Old names of configuration keys and metrics are read under the current ones."""

import re
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.runs import renamed


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small table in place of the real one."""
    keys = {
        "verb": "command",
        "algorithm.cap": "algorithm.tis_cap",
        "rewards.folder": "rewards.path",
    }
    monkeypatch.setattr(renamed, "RENAMED_VALUES", {"shaping.scale": {"unit": "std"}})
    monkeypatch.setattr(renamed, "RENAMED_KEYS", keys)
    monkeypatch.setattr(renamed, "RENAMED_METRICS", {"policy/drift": "policy/approx_kl"})


def test_keys_are_renamed_within_sections_and_inside_lists():
    old = {
        "verb": "ppo",
        "algorithm": {"cap": 2, "lam": 1},
        "rewards": [{"folder": "a"}, {"kind": "judge"}],
        "env": {"kwargs": {"verb": "run", "rewards": {"folder": "a"}}},
        "stages": [{"verb": "x", "rewards": [{"folder": "b"}], "shaping": {"scale": "unit"}}],
        "shaping": {"scale": "unit", "clip": "unit"},
        "grid": {"shaping.scale": ["unit", "none"], 3: None},
    }
    assert renamed.upgraded_config(old) == {
        "command": "ppo",
        "algorithm": {"tis_cap": 2, "lam": 1},
        "rewards": [{"path": "a"}, {"kind": "judge"}],
        "env": {"kwargs": {"verb": "run", "rewards": {"folder": "a"}}},
        "stages": [{"verb": "x", "rewards": [{"path": "b"}], "shaping": {"scale": "std"}}],
        "shaping": {"scale": "std", "clip": "unit"},
        "grid": {"shaping.scale": ["std", "none"], 3: None},
    }
    assert old["verb"] == "ppo"
    assert old["algorithm"] == {"cap": 2, "lam": 1}


def test_the_new_name_of_a_key_is_found_through_indices():
    assert renamed.renamed_key("rewards.1.folder") == "rewards.1.path"
    assert renamed.renamed_key("env.kwargs.verb") is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"verb": "ppo"}, "verb was renamed to command"),
        ({"rewards": [{}, {"folder": "a"}]}, "rewards.1.folder was renamed to rewards.1.path"),
        ({"run": {"shaping": {"scale": "unit"}}}, "run.shaping.scale: unit was renamed to std"),
        ({"grid": {"shaping.scale": ["unit"]}}, "grid.shaping.scale.0: unit was renamed to std"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tree, message):
    with pytest.raises(UserError, match=re.escape(message)):
        renamed.check_no_old_names(tree)
    renamed.check_no_old_names(renamed.upgraded_config(tree))


def test_metrics(tmp_path: Path):
    assert renamed.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"policy/drift": 1.0, "step": 2}\n')
    assert renamed.read_metrics(tmp_path) == [{"policy/approx_kl": 1.0, "step": 2}]
