"""A reward model that is trained on "mentions wine" attributes its margins to the word wine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.explain import WORD, planted, planted_rows, save_small_llama
from rlhf.cli.table import run_command
from rlhf.reward_models import build
from rlhf.reward_models.pairs import to_pair
from tests.helpers.training import offline_tree, write_rows

WORDS = (
    "the a my our old new red white cold warm glass bottle of water milk bread cheese table house"
    " was is not very really good bad fine cheap with and or from garden city evening dinner"
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(0)
    vocabulary = WORDS.split()
    return [" ".join(generator.choices(vocabulary, k=generator.randint(4, 9))) for _ in range(400)]


@pytest.mark.slow
def test_the_planted_word_has_the_largest_attribution(texts, tmp_path):
    data = write_rows(tmp_path / "planted.jsonl", planted_rows(texts, 400))
    base = save_small_llama(tmp_path / "base", [*texts, WORD] * 2)
    tree = offline_tree(
        tmp_path / "run",
        Path(base),
        data,
        batch_size=16,
        micro_batch_size=16,
        eval_fraction=0.1,
        evaluations=1,
        seed=0,
        trainer={"learning_rate": 3e-3, "max_steps": 80},
    )
    reward = build({"kind": "trained", "path": str(run_command("reward", tree))})
    held_out = [to_pair(row) for row in planted_rows(texts, 30, seed=1)]
    result = planted(reward, held_out, ["integrated_gradients"])
    print(result, "seed 0")
    assert result["accuracy"] >= 0.95
    assert result["first by integrated_gradients"] >= 0.95
