"""Seconds by part, and what a profiled run tells."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rlhf.algorithms.batch import TrainingBatch
from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.models.flops import forward_and_backward_flops
from rlhf.models.policy import Policy
from rlhf.runs import profiling
from rlhf.runs.profiling import STEP_PARTS, Stopwatch
from rlhf.training import throughput
from tests.helpers.models import tiny_tokenizer
from tests.helpers.training import metrics_of, online_tree


def test_a_part_inside_another_stops_the_outer_clock(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 6.0, 10.0, 10.0])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch("update"), watch("rewards"):
        pass
        # 0 to 2 and 5 to 6 are the update's, 2 to 5 the rewards'.
    assert watch.pop_time_metrics() == {"time/update": 3.0, "time/rewards": 3.0}
    assert watch.pop_time_metrics() == {}


def test_operations_of_an_update_by_hand():
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    layer = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4  # projections, MLP, two norms
    trunk = 2 * layer + 4
    assert forward_and_backward_flops(model, tokens=7, head_tokens=3) == 6 * (trunk * 7 + 40 * 3)


def test_operations_of_frozen_weights_and_of_a_separate_critic_by_hand():
    """Two operations forward, two for the gradient of the input, two for that of the weight."""
    sizes: Any = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=10, num_attention_heads=2, tie_word_embeddings=False, **sizes)
    model = LlamaForCausalLM(config)
    trunk = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4 + 4
    critic = copy.deepcopy(model.model)
    found = forward_and_backward_flops(model, tokens=7, head_tokens=3, critic=critic)
    assert found == 6 * (2 * trunk * 7 + 40 * 3)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    found = forward_and_backward_flops(model, tokens=7, head_tokens=3)
    assert found == 4 * (trunk * 7 + 40 * 3) + 2 * 16 * 7


def test_operations_of_a_mixture_are_those_of_the_experts_that_a_token_uses():
    sizes: Any = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    experts: Any = {"num_local_experts": 4, "num_experts_per_tok": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=10, **sizes, **heads, **experts))
    trunk = 4 * 4 * 4 + 3 * 4 * 6 + 4 * 4 + 2 * 4 + 4  # one expert of four, and the router
    assert forward_and_backward_flops(model, tokens=7, head_tokens=3) == 6 * (trunk * 7 + 40 * 3)


def test_the_utilization_is_that_of_all_processes(monkeypatch, echo_model):
    monkeypatch.setattr(throughput, "measure_peak_flops", lambda *_: 1e9)
    policy = Policy(AutoModelForCausalLM.from_pretrained(echo_model), tiny_tokenizer())
    tokens = torch.ones(2, 4, dtype=torch.long)
    batch = TrainingBatch(tokens=tokens, attention_mask=tokens > 0, action_mask=tokens > 0)
    found = []
    for processes in (1, 4):
        measured = throughput.Throughput(policy, processes=processes)
        measured.add(batch, seconds=2.0)
        found.append(measured.pop_metrics())
    assert found[0]["profile/flop_utilization"] == 4 * found[1]["profile/flop_utilization"] > 0
    assert [row["profile/tokens_per_second"] for row in found] == [4.0, 4.0]


def test_a_profiled_run_tells_more_and_learns_the_same(tmp_path, echo_model):
    for name, keys in (("plain", {}), ("profiled", {"profile": True})):
        run_command("ppo", online_tree(tmp_path / name, echo_model, num_steps=2, **keys))
    plain, profiled = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("plain", "profiled")
    )
    for row in plain:
        assert {key for key in row if key.startswith("time/")} == {f"time/{p}" for p in STEP_PARTS}
    for row in profiled:
        assert row["profile/padding"] == 0.0
        assert 0 < row["profile/flop_utilization"] < 5
        assert row["profile/tokens_per_second"] > 0
        assert row["profile/peak_memory"] > 0.05
    kept = [
        {key: value for key, value in row.items() if not key.startswith("profile/")}
        for row in metrics_of(tmp_path / "profiled")
    ]
    assert kept == metrics_of(tmp_path / "plain")
    page = (tmp_path / "profiled/report.html").read_text()
    assert "Time by part of a step" in page
    assert "FLOP utilization" in page


@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
def test_a_profiled_offline_run_tells_more_and_learns_the_same(tmp_path, echo_model, command):
    rows = [
        {"prompt": f"p{i}", "completion": "yes", "chosen": "yes yes", "rejected": "no"}
        for i in range(24)
    ]
    columns = ("prompt", "completion") if command == "sft" else ("prompt", "chosen", "rejected")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({c: r[c] for c in columns}) + "\n" for r in rows))
    tree = {
        "model": {"path": str(echo_model)},
        "data": [{"path": str(data)}],
        "max_length": 32,
        "batch_size": 4,
        "micro_batch_size": 4,
        "evaluations": 1,
        "trainer": {"max_steps": 4, "logging_steps": 2},
    }
    found = {}
    for name, keys in (("plain", {}), ("profiled", {"profile": True})):
        run_command(command, {**tree, **keys, "output_dir": str(tmp_path / name)})
        found[name] = metrics_of(tmp_path / name)
    lines = [row for row in found["profiled"] if "profile/padding" in row]
    assert [row["step"] for row in lines] == [2, 4]
    for row in lines:
        assert row["profile/padding"] == row["profile/shared"] == 0.0
        assert 0 < row["profile/flop_utilization"] < 5
        assert row["profile/tokens_per_second"] > 0
    bare = [{k: v for k, v in r.items() if not k.startswith("profile/")} for r in found["profiled"]]
    assert bare == found["plain"]
    assert "FLOP utilization" in (tmp_path / "profiled/report.html").read_text()


def test_trl_is_not_profiled(tmp_path, echo_model):
    tree = {
        "model": {"path": str(echo_model)},
        "data": [{"path": "rows.jsonl"}],
        "engine": "trl",
        "profile": True,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(UserError, match="only the native engine is profiled"):
        run_command("sft", tree)


def test_seconds_of_a_failing_part_count():
    watch = Stopwatch()
    with pytest.raises(ValueError, match="x"), watch("update"):
        raise ValueError("x")
    with watch("rewards"):
        torch.ones(1)
    assert set(watch.pop_time_metrics()) == {"time/update", "time/rewards"}
