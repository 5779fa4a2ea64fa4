"""Runs whose configurations hold absolute paths, and their exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.table import run_command
from rlhf.config.export import ExportConfig
from rlhf.export import export_model
from tests.helpers.training import (
    offline_tree,
    online_tree,
    pair_rows,
    save_model,
    sft_rows,
    write_rows,
)

LORA = {"rank": 4, "alpha": 16}


@dataclass
class Runs:
    """A chain of runs in a folder with a name that must not appear in a card."""

    root: Path
    sft: Path
    """Full fine-tuning."""
    lora: Path
    """Adapters on the result of `sft`."""
    chain: Path
    """Adapters on the result of `lora`."""
    merged: Path
    """All weights of the merged result of `lora`."""
    ppo: Path
    """PPO with a value head on the result of `chain`, with a local reward model."""
    reward: Path


def short(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"evaluations": 1, "trainer": {"learning_rate": 1e-2, "max_steps": 2}}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("secret-folder") / "users with spaces"
    root.mkdir()
    base = save_model(root / "base-model", sharp=6.0)
    rows = write_rows(root / "answers.jsonl", sft_rows(24))
    pairs = write_rows(root / "pairs.jsonl", pair_rows(24))
    sft, lora, chain, merged = (root / name for name in ("sft", "lora", "chain", "merged"))
    run_command("sft", short(offline_tree(sft, base, rows)))
    adapters = {"path": str(sft / "final"), "lora": LORA}
    run_command("dpo", short(offline_tree(lora, base, pairs)) | {"model": adapters})
    adapters = {"path": str(lora / "final"), "lora": LORA}
    run_command("dpo", short(offline_tree(chain, base, pairs)) | {"model": adapters})
    run_command("dpo", short(offline_tree(merged, lora / "final", pairs)))
    reward = root / "reward"
    run_command("reward", short(offline_tree(reward, base, pairs)))
    ppo = root / "ppo"
    tree = online_tree(ppo, chain / "final", num_steps=2, save_every=2)
    tree["rewards"] = [{"kind": "learned", "path": str(reward / "final"), "weight": 0.5}]
    run_command("ppo", tree)
    return Runs(root, sft, lora, chain, merged, ppo, reward)


def export(source: Path, target: Path, **keys: Any) -> Path:
    """Export a model and return the folder."""
    return export_model(ExportConfig(str(source), str(target), **keys)).folder


@pytest.fixture(scope="session")
def exports(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a run -> its export."""
    folder = tmp_path_factory.mktemp("exports")
    names = ("sft", "lora", "chain", "merged", "ppo", "reward")
    return {name: export(getattr(runs, name), folder / name) for name in names}
