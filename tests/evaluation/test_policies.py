"""What `rlhf evaluate` asks of a policy beside episodes: samples, examples, labels, tasks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli.table import run_command
from rlhf.config.data import DataSpec
from rlhf.config.evaluate import (
    EvaluateConfig,
    HarnessTasksSpec,
    PolicySpec,
    ZeroShotClassificationSpec,
)
from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.evaluation.classes import classification_report, label_logprobs
from rlhf.evaluation.harness import evaluate_on_tasks, metrics_from_harness_output
from rlhf.evaluation.records import read_summary_file
from rlhf.evaluation.text import CompletionLosses
from rlhf.models.policy import Policy
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.seeds import EVALUATION_BLOCK
from rlhf.stats import share_interval
from tests.helpers.models import tiny_model
from tests.helpers.training import read_rows, sft_rows, user, write_rows

ECHO = EnvSpec(id="text/Echo-v0")


def evaluate_tree(folder, place, **keys):
    return {
        "output_dir": str(folder),
        "env": {"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        "rollout": {"max_new_tokens": 3},
        "episodes": 4,
        "policies": [{"name": "mine", "model": {"path": str(place)}}],
    } | keys


def test_several_samples_of_each_seed(tmp_path, echo_model):
    run_command("evaluate", evaluate_tree(tmp_path / "run", echo_model, samples=3))
    folder = tmp_path / "run/evaluation/mine"
    rows = read_rows(folder / "episodes.jsonl")
    block = [EVALUATION_BLOCK + i for i in range(4)]
    assert [(row["seed"], row["sample"]) for row in rows] == [
        (s, m) for s in block for m in (0, 1, 2)
    ]
    for seed in block:
        own = [row["messages"] for row in rows if row["seed"] == seed]
        assert len({messages[0]["content"] for messages in own}) == 1
    assert len({row["messages"][-1]["content"] for row in rows}) > 4
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    right = {s: sum(row["success"] for row in rows if row["seed"] == s) for s in block}
    expected = np.mean([1 - math.comb(3 - c, 2) / 3 for c in right.values()])
    assert metrics["pass@2"]["mean"] == pytest.approx(expected)
    assert metrics["return"]["n"] == 4


def random_tree(folder):
    """Configuration of four episodes of the random policy."""
    env = {"id": "text/Echo-v0"}
    policies = [{"name": "random"}]
    return {"output_dir": str(folder), "policies": policies, "env": env, "episodes": 4}


def test_the_message_on_a_truncated_summary_states_the_remedy(tmp_path):
    path = tmp_path / "run/evaluation/mine/summary.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"metr')
    with pytest.raises(UserError, match=r"summary\.json, line 1: .*; remove .*mine and .*finished"):
        read_summary_file(path)


@pytest.mark.parametrize("missing", [["summary.json"], ["summary.json", "episodes.jsonl"]])
def test_an_incomplete_evaluation_is_repeated(tmp_path, missing):
    tree = random_tree(tmp_path / "run")
    run_command("evaluate", tree)
    folder = tmp_path / "run/evaluation/random"
    before = [row["messages"] for row in read_rows(folder / "episodes.jsonl")]
    for name in missing:
        (folder / name).unlink()
    (tmp_path / "run/finished").unlink()
    run_command("evaluate", tree | {"resume": True})
    assert [row["messages"] for row in read_rows(folder / "episodes.jsonl")] == before
    assert json.loads((folder / "summary.json").read_text())["episodes"] == 4


def test_a_wrong_model_does_not_cost_an_earlier_evaluation(tmp_path):
    tree = random_tree(tmp_path / "run")
    run_command("evaluate", tree)
    before = (tmp_path / "run/evaluation/random/episodes.jsonl").read_bytes()
    tree["policies"].append({"name": "b", "model": {"path": str(tmp_path / "nowhere")}})
    with pytest.raises(UserError, match="unknown model"):
        run_command("evaluate", tree | {"overwrite": True, "episodes": 2})
    assert (tmp_path / "run/evaluation/random/episodes.jsonl").read_bytes() == before


def test_examples_stand_before_every_episode(tmp_path, echo_model):
    shots = write_rows(tmp_path / "shots.jsonl", sft_rows(2))
    policies = [
        {"name": "plain", "model": {"path": str(echo_model)}},
        {"name": "shown", "model": {"path": str(echo_model)}, "examples": [{"path": str(shots)}]},
    ]
    tree = evaluate_tree(tmp_path / "run", echo_model, policies=policies, decoding="greedy")
    run_command("evaluate", tree | {"text": [{"path": str(shots)}]})
    home = tmp_path / "run/evaluation"
    plain, shown = (read_rows(home / name / "episodes.jsonl") for name in ("plain", "shown"))
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    for one, other in zip(plain, shown, strict=True):
        talk = [m for m in other["messages"] if m["role"] != "system"]
        assert [m["role"] for m in other["messages"]][-6:] == roles[-6:]
        assert talk[4] == next(m for m in one["messages"] if m["role"] == "user")
        assert sorted(talk[:4], key=str) == sorted(
            [m for row in read_rows(shots) for m in [*row["prompt"], *row["completion"]]], key=str
        )
    losses = [
        json.loads((home / name / "summary.json").read_text())["metrics"]["text_loss"]["mean"]
        for name in ("plain", "shown")
    ]
    assert losses[0] != losses[1]


def test_examples_stand_after_a_system_message(tmp_path, echo_model, monkeypatch):
    """In held-out text too: chat templates refuse a late system turn."""
    rules = {"role": "system", "content": "Repeat the word you are given, and nothing else."}
    plain, shots = sft_rows(3)[2], write_rows(tmp_path / "shots.jsonl", sft_rows(2))
    ruled = {**plain, "prompt": [rules, *plain["prompt"]]}
    seen = []

    def losses(policy, rows, **_):
        seen.extend(rows)
        return CompletionLosses([1.0, 1.0], [1, 1], [1, 1], 0, 0)

    monkeypatch.setattr("rlhf.evaluation.runner.completion_losses", losses)
    policy = {"name": "m", "model": {"path": str(echo_model)}, "examples": [{"path": str(shots)}]}
    data = write_rows(tmp_path / "text.jsonl", [plain, ruled])
    tree = evaluate_tree(
        tmp_path / "run", echo_model, policies=[policy], text=[{"path": str(data)}]
    )
    tree.pop("env")
    run_command("evaluate", tree)
    lengths = {len(row["prompt"]): [m["role"] for m in row["prompt"]] for row in seen}
    assert lengths[5] == ["user", "assistant", "user", "assistant", "user"]
    assert lengths[6] == ["system", *lengths[5]]


def test_label_scores_are_the_models_log_probabilities():
    model, tokenizer = tiny_model()
    source = DataSpec("unused.jsonl")
    spec = ZeroShotClassificationSpec(
        [source], ["blue", "green and high"], "Which color is {text}?"
    )
    texts = ["the sky", "the grass"]
    found = label_logprobs(Policy(model, tokenizer), texts, spec, max_length=100)
    chat_format = ChatFormat(tokenizer)
    for i, text in enumerate(texts):
        for k, label in enumerate(spec.labels):
            prompt = chat_format.encode_prompt(user(f"Which color is {text}?"))
            reply = tokenizer(label + "<|end|>")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + reply])).logits[0]
            steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected = steps[range(len(reply)), reply].sum().item()
            assert found[i, k] == pytest.approx(expected, rel=1e-4)


def test_labeled_texts_are_judged_beside_the_commonest_class(tmp_path, echo_model):
    words = ["apple", "river", "stone"]
    rows = [{"text": words[i % 3], "label": i % 3} for i in range(30)]
    data = write_rows(tmp_path / "words.jsonl", rows)
    classes = {"data": [{"path": str(data)}], "labels": words, "question": "Repeat: {text}"}
    tree = evaluate_tree(tmp_path / "run", echo_model, classes=classes)
    tree.pop("env")
    run_command("evaluate", tree)
    summary = json.loads((tmp_path / "run/evaluation/mine/summary.json").read_text())
    policy = Policy(
        AutoModelForCausalLM.from_pretrained(echo_model), AutoTokenizer.from_pretrained(echo_model)
    )
    spec = ZeroShotClassificationSpec([DataSpec(str(data))], words, "Repeat: {text}")
    scores = label_logprobs(policy, words, spec, max_length=100)
    accuracy = np.mean(scores.argmax(1) == np.arange(3))
    assert summary["metrics"]["class_accuracy"]["mean"] == pytest.approx(accuracy)
    assert summary["metrics"]["class_accuracy"]["n"] == 3  # ten copies of each text
    assert summary["classes"]["baselines"]["most common class"]["accuracy"][
        "mean"
    ] == pytest.approx(1 / 3)
    two = ZeroShotClassificationSpec([DataSpec(str(data))], words[:2])
    with pytest.raises(UserError, match=r"label 2, but classes\.labels names only 0 to 1"):
        classification_report(policy, rows, two, max_length=100)
    with pytest.raises(UserError, match="more than max_length = 2: increase max_length"):
        label_logprobs(policy, words, spec, max_length=2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"samples": 4}, "samples has no effect without env"),
        (
            {"samples": 4, "env": ECHO, "decoding": "greedy"},
            "samples has no effect with greedy decoding",
        ),
    ],
)
def test_settings_that_cannot_be_meant(keys, message):
    policies = [PolicySpec("random")]
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(output_dir="out", policies=policies, text=[DataSpec("x.jsonl")], **keys)


def test_specs_that_cannot_be_meant():
    source = [DataSpec("x.jsonl")]
    with pytest.raises(ValueError, match="at least two labels and no repeated one"):
        ZeroShotClassificationSpec(source, ["a", "a"])
    with pytest.raises(ValueError, match=r"classes.question must contain"):
        ZeroShotClassificationSpec(source, ["a", "b"], "Well?")
    with pytest.raises(ValueError, match="'random' has examples but no model"):
        PolicySpec("random", examples=source)
    with pytest.raises(ValueError, match=r"tasks\.names is empty"):
        HarnessTasksSpec([])


def test_a_missing_harness_is_told_before_anything_is_played(tmp_path, echo_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tree = evaluate_tree(tmp_path / "run", echo_model, tasks={"names": ["arc_easy"]})
    with pytest.raises(UserError, match=r'pip install "rlhf-kit\[tasks\]"'):
        run_command("evaluate", tree)
    assert not (tmp_path / "run/evaluation").exists()


def test_the_harness_results_become_metrics():
    found = {
        "results": {
            "arc": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "arc"},
            "long": {"brier,none": 0.4, "brier_stderr,none": 0.05},
            "gsm": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        },
        "n-samples": {"arc": {"original": 90, "effective": 25}, "long": {"effective": 400}},
    }
    metrics = metrics_from_harness_output(found)
    # Half of 25 documents: the exact interval of a share, whatever error the harness gives.
    share = share_interval(12.5, 25)
    assert metrics["arc/acc"]["low"] == pytest.approx(share.low)
    assert metrics["arc/acc"]["n"] == 25
    assert metrics["long/brier"]["high"] == pytest.approx(0.4 + 1.959964 * 0.05)
    assert metrics["gsm/exact_match (strict)"]["low"] is None
    assert "needs a standard error" in str(metrics["gsm/exact_match (strict)"]["needs"])
    found["n-samples"]["long"]["effective"] = 399
    needs = metrics_from_harness_output(found)["long/brier"]["needs"]
    assert needs == "an interval needs a standard error and at least 400 documents"
    assert len(metrics) == 3


@pytest.mark.slow
def test_a_task_through_the_harness_is_the_models_own_choice(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny_model()
    tokenizer.chat_template = None
    colors = ["blue", "green"]
    rows = [
        {"question": f"Which color is {thing}?", "choices": colors, "label": i % 2}
        for i, thing in enumerate(["the sky", "the grass", "a number", "the number", "grass"])
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    task = {
        "task": "colors",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colors.yaml").write_text(yaml.safe_dump(task))
    spec = HarnessTasksSpec(["colors"], folder=str(tmp_path / "tasks"))
    found = evaluate_on_tasks(Policy(model, tokenizer), spec, seed=0)["colors/acc"]
    right = []
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in colors:
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                steps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            scores.append(sum(steps[t - 1, whole[t]].item() for t in places))
        right.append(int(np.argmax(scores)) == row["label"])
    assert found["mean"] == pytest.approx(np.mean(right))
    assert found["n"] == 5
    with pytest.raises(UserError, match="'nonsense' is unknown"):
        evaluate_on_tasks(Policy(model, tokenizer), HarnessTasksSpec(["nonsense"]), seed=0)
