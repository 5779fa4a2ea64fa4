"""lm-evaluation-harness against the server has the results of `rlhf evaluate`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.evaluate import HarnessTasksSpec
from rlhf.config.model import ModelSpec
from rlhf.evaluation.harness import evaluate_on_tasks, metrics_from_harness_output
from rlhf.models.loading import load_model
from rlhf.models.policy import Policy
from tests.helpers.models import tiny_model
from tests.helpers.training import write_rows
from tests.serving.conftest import Running, running

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of the extra lm-eval[api]
pytest.importorskip("aiohttp")

DOCUMENTS = 50
COLORS = ["blue", "green", "red", "black"]
THINGS = ["sky", "grass", "sea", "night", "rose", "leaf", "blood", "coal", "ice", "moss"]


def write_tasks(folder: Path, server: Running) -> None:
    """A task of log-likelihoods and one of generated texts, of which the model solves a half."""
    draw = random.Random(0)
    questions = [f"Which color is the {draw.choice(THINGS)} {i}?" for i in range(DOCUMENTS)]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "stop": ["\n"]}
    replies = [
        server.post("/v1/completions", {**body, "prompt": text})[1]["choices"][0]["text"]
        for text in questions
    ]
    rows = [
        {
            "question": text,
            "choices": draw.sample(COLORS, 3),
            "label": i % 3,
            "answer": reply if i % 2 else f"{reply}, no",
        }
        for i, (text, reply) in enumerate(zip(questions, replies, strict=True))
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        **shared,
        "task": "colors",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generation = {
        **shared,
        "task": "replies",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, generation):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


def compare_with_evaluate(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The metrics of both ways, which must be equal."""
    from lm_eval.tasks import TaskManager

    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "tokenizer")
    with running(model, tokenizer, parallel=8) as server:
        write_tasks(folder, server)
        arguments = {
            "base_url": f"{server.url}/completions",
            "model": "tiny",
            "tokenizer": str(folder / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "batch_size": 4,
            "max_length": 256,
        }
        names = ["colors", "replies"]
        output = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=names,
            task_manager=TaskManager(include_path=str(folder)),
            num_fewshot=None,
            limit=DOCUMENTS,
        )
    spec = HarnessTasksSpec(names, limit=DOCUMENTS, folder=str(folder))
    expected = evaluate_on_tasks(Policy(model, tokenizer), spec, seed=0)
    found = metrics_from_harness_output(output)
    assert found == expected
    assert {metric["n"] for metric in found.values()} == {DOCUMENTS}
    assert found["replies/exact_match"]["mean"] == 0.5
    return found


@pytest.mark.slow
def test_tasks_equal_rlhf_evaluate(tmp_path: Path):
    model, tokenizer = tiny_model(context=256)
    found = compare_with_evaluate(model, tokenizer, tmp_path)
    assert 0 < found["colors/acc"]["mean"] < 1


@pytest.mark.sweep
def test_tasks_with_a_trained_model_equal_rlhf_evaluate(tmp_path: Path):
    spec = ModelSpec(path="smollm2-135m-instruct", dtype="float32")
    model, tokenizer = load_model(spec, seed=0)
    compare_with_evaluate(model, tokenizer, tmp_path)
