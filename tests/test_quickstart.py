"""The main job: the quickstart's pipeline from nothing to its report, and what it must show."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlhf
from rlhf.common.files import read_jsonl
from rlhf.stats import difference

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def episodes(root: Path, policy: str) -> list[dict[str, Any]]:
    path = root / "evaluate" / "evaluation" / policy / "episodes.jsonl"
    return read_jsonl(path)


def stamps(root: Path) -> dict[str, float]:
    """When each stage was finished."""
    return {path.parent.name: path.stat().st_mtime for path in root.glob("*/finished")}


SHORT = {
    "demos.files.0.count": 100,
    "sft.trainer.num_train_epochs": 1,
    "pairs.prompts": 40,
    "reward.trainer.num_train_epochs": 1,
    "reward.evaluations": 1,
    "ppo.num_steps": 2,
    "ppo.episodes_per_step": 16,
    "ppo.evaluation.every": 2,
    "ppo.evaluation.episodes": 8,
    "dpo.trainer.num_train_epochs": 1,
    "evaluate.episodes": 16,
}
"""Overrides with which all stages run in seconds, without learning much."""


@pytest.mark.sweep
def test_quickstart_improves_on_imitation(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG.parents[1])
    root = tmp_path / "quickstart"
    report = rlhf.run(CONFIG, output_dir=str(root))
    assert report == root / "report.html"
    assert report.stat().st_size > 20_000
    returns = {
        policy: np.array([row["return"] for row in episodes(root, policy)])
        for policy in ("random", "expert", "sft", "ppo", "dpo")
    }
    seeds = {p: [row["seed"] for row in episodes(root, p)] for p in returns}
    assert all(found == seeds["sft"] for found in seeds.values())
    assert returns["expert"].mean() == 1.0  # the optimum
    assert difference(returns["ppo"], returns["sft"]).low > 0
    assert difference(returns["dpo"], returns["sft"]).low > 0
    assert returns["ppo"].mean() >= 0.9


@pytest.mark.slow
def test_a_short_quickstart_runs_every_stage_once(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG.parents[1])
    root = tmp_path / "quickstart"
    options = {"output_dir": str(root)} | SHORT
    report = rlhf.run(CONFIG, **options)
    assert report == root / "report.html"
    assert report.stat().st_size > 20_000
    seeds = [[row["seed"] for row in episodes(root, p)] for p in ("random", "sft", "ppo", "dpo")]
    assert len(seeds[0]) == 16
    assert all(found == seeds[0] for found in seeds)

    # It is not overwritten, and resuming a finished pipeline does nothing again.
    with pytest.raises(rlhf.UserError, match="--resume"):
        rlhf.run(CONFIG, **options)
    before = stamps(root)
    time.sleep(0.01)
    rlhf.run(CONFIG, **options, resume=True)
    assert stamps(root) == before
    assert len(before) == 7

    # A lost stage, and only that one, is made again.
    os.remove(root / "evaluate" / "finished")
    rlhf.run(CONFIG, **options, resume=True)
    after = stamps(root)
    assert after.pop("evaluate") > before.pop("evaluate")
    assert after == before
