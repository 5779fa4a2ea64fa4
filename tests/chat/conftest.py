"""Three checkpoints of one model: a folder, a run with LoRA, and a run that has not ended."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from rlhf.cli.main import main
from rlhf.config.model import ScratchSpec
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from tests.helpers.training import offline_tree, sft_rows, write_rows

TEXTS = (
    "Which colour is the sky? It is blue, and the grass is green.",
    "Guess a number from 1 to 20. Higher, lower, correct. 4 guesses left.",
    "Answer with a number only. Be brief. Repeat: apple river stone cloud",
)


class Checkpoints(NamedTuple):
    """Arguments of `rlhf chat`, and the folders that they stand for."""

    paths: list[str]
    folders: list[str]


def save(folder: Path, *, seed: int, context: int = 512) -> Path:
    """Save a tiny model with sharp random weights, so that replies differ."""
    tokenizer = make_tokenizer(TEXTS * 4, 400)
    spec = ScratchSpec(hidden_size=16, num_layers=2, num_heads=2, context=context)
    model = make_random_llama_model(spec, tokenizer, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(15.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("checkpoints")
    base = save(root / "base", seed=0)
    data = write_rows(root / "rows.jsonl", sft_rows())
    tree = offline_tree(
        root / "lora",
        base,
        data,
        trainer={"max_steps": 2, "learning_rate": 0.3},
        model={"path": str(base), "lora": {"rank": 2}},
        evaluations=1,
    )
    config = root / "lora.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert main(["sft", "--config", str(config)]) == 0
    save(root / "unfinished" / "checkpoints" / "step-2", seed=1)
    newest = shutil.copytree(
        save(root / "other", seed=2), root / "unfinished" / "checkpoints" / "step-10"
    )
    paths = [str(base), str(root / "lora"), str(root / "unfinished")]
    return Checkpoints(paths, [str(base), str(root / "lora" / "final"), str(newest)])
