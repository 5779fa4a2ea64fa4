"""Old names of configuration keys and metrics are read under the current ones."""

from pathlib import Path

import pytest

from rlhf.runs import renamed


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small table in place of the real one."""
    keys = {
        "verb": "command",
        "algorithm.cap": "algorithm.tis_cap",
        "rewards.folder": "rewards.path",
    }
    monkeypatch.setattr(renamed, "RENAMED_KEYS", keys)
    monkeypatch.setattr(renamed, "RENAMED_METRICS", {"policy/drift": "policy/approx_kl"})


def test_keys_are_renamed_within_sections_and_inside_lists():
    old = {
        "verb": "ppo",
        "algorithm": {"cap": 2, "lam": 1},
        "rewards": [{"folder": "a"}, {"kind": "judge"}],
        "env": {"kwargs": {"verb": "run"}},
    }
    assert renamed.upgraded_config(old) == {
        "command": "ppo",
        "algorithm": {"tis_cap": 2, "lam": 1},
        "rewards": [{"path": "a"}, {"kind": "judge"}],
        "env": {"kwargs": {"verb": "run"}},
    }
    assert old["verb"] == "ppo"
    assert old["algorithm"] == {"cap": 2, "lam": 1}


def test_the_new_name_of_a_key_is_found_through_indices():
    assert renamed.renamed_key("rewards.1.folder") == "rewards.path"
    assert renamed.renamed_key("env.kwargs.verb") is None


def test_metrics(tmp_path: Path):
    assert renamed.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"policy/drift": 1.0, "step": 2}\n')
    assert renamed.read_metrics(tmp_path) == [{"policy/approx_kl": 1.0, "step": 2}]
