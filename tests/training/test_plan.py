"""Estimates of memory and duration, against bytes of real tensors and hand-worked numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.algorithms.batch import TrainingBatch
from rlhf.cli.main import main
from rlhf.cli.table import configure
from rlhf.config.model import LoraSpec, ScratchSpec
from rlhf.models.activation_checkpointing import checkpoint_activations
from rlhf.models.adapters import add_lora
from rlhf.models.architecture import blocks_of, trunk_of
from rlhf.models.fast import chunked_logprobs
from rlhf.models.fast.chunked_logprobs import target_logprobs_and_entropies
from rlhf.models.fast.packing import flat_states_and_token_index, select_attention_without_packing
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.scratch import make_random_llama_model
from rlhf.models.trainable import make_trainable
from rlhf.rollout.sampling.base import Request, SamplingParams
from rlhf.rollout.sampling.decoder import (
    FusedDecoder,
    fused_weight_bytes,
    make_fastest_matching_decoder,
)
from rlhf.training.online import OnlineTrainer
from rlhf.training.optimizers import OptimizerSettings, make_optimizer
from rlhf.training.plan import batches, memory
from rlhf.training.plan.batches import RandomReplyEngine, play_and_make_online_batches
from rlhf.training.plan.calibration import PassSpeed
from rlhf.training.plan.communication import (
    CollectiveSpeed,
    add_communication,
    communication_seconds,
)
from rlhf.training.plan.duration import StepDuration, passes_seconds, sampling_seconds
from rlhf.training.plan.memory import (
    HeadSize,
    PassSize,
    TrainingState,
    best_model_restore_memory,
    kv_cache_bytes,
    onednn_kernel_bytes,
    optimizer_bytes,
    training_state,
    update_memory,
)
from rlhf.training.plan.online import estimate_online
from rlhf.training.plan.plan import Parallelism
from rlhf.training.plan.text import bytes_text, seconds_text
from rlhf.training.plan.tracing import LiveByteCounter, copy_with_first_blocks, traced_pass_size
from tests.helpers.models import tiny_gpt2, tiny_qwen2, tiny_tokenizer
from tests.helpers.training import (
    label_rows,
    offline_tree,
    online_tree,
    pair_rows,
    save_model,
    sft_rows,
    write_rows,
)


def llama(*, layers: int = 4) -> Any:
    spec = ScratchSpec(hidden_size=32, num_layers=layers, num_heads=2, context=128)
    return make_random_llama_model(spec, tiny_tokenizer(), seed=0).eval()


def llama_with_lora() -> Any:
    return add_lora(llama(), LoraSpec(rank=4), seed=0)


def checkpointed_llama() -> Any:
    model = llama()
    checkpoint_activations(trunk_of(model))
    return model


def padded_llama() -> Any:
    model = llama()
    select_attention_without_packing(model, "eager")
    return model


MODELS = {
    "llama": llama,
    "llama of two layers": functools.partial(llama, layers=2),
    "bfloat16": lambda: llama().bfloat16(),
    "adapters": llama_with_lora,
    "padded rows": padded_llama,
    "gpt2": lambda: tiny_gpt2()[0],
    "qwen2": lambda: tiny_qwen2()[0],
}


def rows(*lengths: int, same: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows of these lengths, whose first ``same`` tokens are equal, and their mask."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 250, (len(lengths), max(lengths)), generator=generator)
    tokens[:, :same] = tokens[0, :same]
    return tokens, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages of tensors."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def saved_storages(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[int, int]:
    """Storages that a forward pass of training keeps for the backward pass, without parameters."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states, _ = flat_states_and_token_index(model, tokens, mask)
    known = storages([*model.parameters(), *model.buffers(), tokens, mask])
    found = storages([*kept, states])
    return {key: size for key, size in found.items() if key not in known}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("lengths", "same"), [((60, 60, 60), 0), ((90, 70, 12), 0), ((80, 80), 64)]
)
def test_saved_bytes_are_those_of_a_real_pass(name, lengths, same):
    model = make_trainable(MODELS[name]())
    enable_fast_paths(model)
    tokens, mask = rows(*lengths, same=same)
    real = sum(saved_storages(model, tokens, mask).values())
    estimated = traced_pass_size(trunk_of(model), tokens, mask).saved
    assert estimated == pytest.approx(real, rel=0.03)


def test_recomputation_saves_the_inputs_of_the_blocks():
    model, plain = make_trainable(checkpointed_llama()), make_trainable(llama())
    tokens, mask = rows(60, 60, 60)
    for each in (model, plain):
        enable_fast_paths(each)
    found, whole = (traced_pass_size(trunk_of(each), tokens, mask) for each in (model, plain))
    real = sum(saved_storages(model, tokens, mask).values())
    # The blocks also keep the rotary embeddings, which the hooks of autograd do not see.
    assert real <= found.saved <= 1.3 * real
    # The backward pass recomputes one of the four blocks.
    assert found.backward - whole.backward == pytest.approx(whole.saved / 4, rel=0.3)


def test_tracing_allocates_no_gradients_and_leaves_the_model_unchanged():
    model = make_trainable(llama())
    enable_fast_paths(model)
    before = copy.deepcopy(model.state_dict())
    traced_pass_size(trunk_of(model), *rows(40, 40))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


def test_live_bytes_of_known_operations():
    given = torch.zeros(1000)
    with LiveByteCounter([given]) as counter:
        given.view(10, 100).t()  # no new storage
        assert counter.live == 0
        kept = given + 1
        assert counter.live == 4000
        (kept * 2).sum()
        assert counter.peak >= 8000
        assert counter.live == 4000
        del kept
    assert counter.live == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_has_the_estimated_bytes(dtype, name):
    model = make_trainable(llama().to(dtype))
    trained = list(model.parameters())
    optimizer = make_optimizer(name, trained, OptimizerSettings(learning_rate=1e-3))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = training_state(model, optimizer=name, blocks=blocks_of(trunk_of(model)))
    assert state.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    moments = [
        tensor
        for chunk in optimizer._chunks
        for values in chunk.inner.state.values()
        for key, tensor in values.items()
        if key != "step"
    ]
    masters = [master for group in optimizer.master_weights for master in group]
    known = storages(trained)
    extra = {k: v for k, v in storages([*moments, *masters]).items() if k not in known}
    assert state.optimizer == sum(extra.values())


def test_the_optimizer_of_a_plugin_is_assumed_to_have_the_state_of_adamw():
    trained = list(make_trainable(llama()).parameters())
    state = {name: optimizer_bytes(name, trained) for name in ("mine", "adamw", "sgd")}
    assert state["mine"] == state["adamw"] > state["sgd"]


def test_tied_weights_and_frozen_weights_count_as_they_are():
    model = make_trainable(llama_with_lora())
    state = training_state(model, optimizer="adamw", blocks=blocks_of(trunk_of(model)))
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert state.gradients == 4 * adapters
    assert state.optimizer == 8 * adapters
    head = model.get_output_embeddings().weight
    assert state.weights == sum(storages(model.parameters()).values())
    assert state.embeddings == head.nbytes + 4 * 32  # the tied table and the last norm
    assert 4 * state.largest_block == state.weights - state.embeddings


@pytest.mark.parametrize("limit", [10**9, 4 * 320])
def test_logits_are_saved_or_recomputed_as_estimated(monkeypatch, limit):
    monkeypatch.setattr(chunked_logprobs, "HEAD_CHUNK_LOGITS", limit)
    monkeypatch.setattr(memory, "HEAD_CHUNK_LOGITS", limit)
    model = llama()
    vocabulary, width = model.get_output_embeddings().weight.shape
    hidden = torch.randn(20, width, requires_grad=True)
    size = HeadSize(vocabulary=vocabulary, width=width, tokens=20, itemsize=4, trained=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target_logprobs_and_entropies(model, hidden, torch.arange(20))
    # The transposed weight of the head has the shape [width, vocabulary].
    logits = [t.nbytes for t in kept if t.shape[1:] == (vocabulary,) and len(t) != width]
    assert size.chunk_logit_bytes == 4 * vocabulary * min(20, limit // vocabulary)
    # Logits of several chunks are computed again in the backward pass.
    assert sum(logits) == (size.chunk_logit_bytes if limit >= 20 * vocabulary else 0)


STATE = TrainingState(
    weights=100, gradients=100, optimizer=600, embeddings=40, largest_block=10, master_weights=0
)
PASSES = PassSize(saved=500, backward=50, forward=30)


def test_gradients_and_activations_add_up():
    found = update_memory(STATE, PASSES, None)
    assert (found.weights, found.gradients, found.optimizer) == (100, 100, 600)
    assert (found.activations, found.temporary) == (500, 50)
    assert found.total == 1350


def test_logits_and_their_gradients_count():
    head = HeadSize(vocabulary=50, width=20, tokens=10, itemsize=4, trained=True)
    found = update_memory(STATE, PASSES, head)
    assert (found.logits, found.temporary) == (2 * 10 * 50 * 4, 50)
    # The gradient of the head (50 x 20 x 4) is added to that of the first micro-batch.
    assert update_memory(STATE, PASSES, head, micro_batches=2).temporary == 4000


def test_kernels_are_limited_by_the_cache_of_onednn():
    assert onednn_kernel_bytes(5, 2) == 30 * 3 * 2**18
    assert onednn_kernel_bytes(5, 1000) == 1024 * 3 * 2**18


def test_shards_divide_the_state_and_gather_blocks():
    found = update_memory(STATE, PASSES, None, shards=4, micro_batches=2)
    assert (found.weights, found.gradients, found.optimizer) == (25, 25, 150)
    assert found.activations == 500
    # The weights outside the blocks and two blocks, and the tensors of the backward pass.
    assert found.temporary == 40 + 2 * 10 + 50


def test_shards_free_activations_before_the_gradients_are_complete():
    start = update_memory(STATE, PASSES, None, shards=4)
    assert (start.activations, start.gradients) == (500, 0)
    end = update_memory(STATE, dataclasses.replace(PASSES, saved=5), None, shards=4)
    assert (end.activations, end.gradients) == (0, 25)
    # The gradients of a block and of the weights outside the blocks, and their copy for the sum
    # over the processes.
    assert end.temporary == 40 + 2 * 10 + 2 * (40 + 10) + 50


def test_the_best_model_is_restored_after_the_memory_of_the_update_is_returned():
    update = update_memory(STATE, PASSES, None, shards=4)
    assert (
        best_model_restore_memory(update, STATE, shards=4).total == 25 + 150 + 40 + 2 * 10 + 100 / 4
    )
    assert best_model_restore_memory(update, STATE).total == update.total + 100


def test_communication_of_a_step():
    speed = CollectiveSpeed(gather=10, reduce=5)
    passes = {"updates": 2, "backward_passes": 3, "forward_passes": 4}
    # Weights of 100 bytes: 3 x 2 + 4 gathers; 3 sums of the gradients.
    found = communication_seconds(STATE, speed, shards=4, **passes)
    assert found == (3 * 2 + 4) * 100 / 10 + 3 * 100 / 5
    half = dataclasses.replace(STATE, itemsize=2)  # the sums have twice the bytes of a gradient
    found = communication_seconds(half, speed, shards=4, **passes)
    assert found == (3 * 2 + 4) * 100 / 10 + 3 * 200 / 5
    found = communication_seconds(STATE, speed, shards=1, **passes)
    assert found == pytest.approx(2 * (100 / 10 + 100 / 5))


def test_collectives_are_measured_between_processes():
    duration = StepDuration(passes=2.0, optimizer=1.0)
    alone = add_communication(
        duration, STATE, Parallelism(), torch.device("cpu"), updates=1, backward_passes=1
    )
    assert alone == (duration, [])
    found, left_out = add_communication(
        duration,
        STATE,
        Parallelism(processes=4, shards=4, per_machine=2),
        torch.device("cpu"),
        updates=1,
        backward_passes=1,
    )
    assert (found.passes, found.optimizer) == (2.0, 1.0)
    assert found.communication > 0
    assert left_out == ["the lower speed of the communication between machines"]


def test_a_separate_critic_doubles_the_activations():
    found = update_memory(STATE, PASSES, None, decoders=2)
    assert found.activations == 1000


def test_the_sampler_allocates_the_estimated_cache_and_copies():
    model = llama().eval()
    with torch.no_grad(), LiveByteCounter([*model.parameters(), *model.buffers()]) as counter:
        decoder = FusedDecoder(model)
        copies = counter.live
        cache = decoder.new_cache(3)
        cache.ensure_capacity(70)
        cache.plan_forward_pass([0, 1, 2], [5, 5, 5])
        decoder(torch.arange(15), cache)
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.ragged)
    assert copies == fused_weight_bytes(model)
    assert stored == kv_cache_bytes(
        rows=3, tokens=128, layers=4, key_heads=2, head_width=16, itemsize=4
    )


def test_first_blocks_share_the_embedding_and_copy_the_blocks():
    model = make_trainable(llama())
    short = copy_with_first_blocks(model, trunk_of(model), 2)
    assert len(blocks_of(trunk_of(short))) == 2
    assert len(blocks_of(trunk_of(model))) == 4
    assert short.get_input_embeddings().weight is model.get_input_embeddings().weight
    first = short.model.layers[0].mlp.up_proj.weight
    assert first is not model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(first, model.model.layers[0].mlp.up_proj.weight)
    tokens = torch.arange(9)[None]
    expected = model(tokens, output_hidden_states=True).hidden_states[2]
    got = short(tokens, output_hidden_states=True).hidden_states[1]
    direct = short.model.layers[1](
        got, position_embeddings=short.model.rotary_emb(got, tokens), attention_mask=None
    )
    assert torch.allclose(direct, expected)
    assert isinstance(make_fastest_matching_decoder(short), FusedDecoder)


def batch_of(*lengths: int) -> TrainingBatch:
    tokens, mask = rows(*lengths)
    actions = mask.clone()
    actions[:, 0] = False
    return TrainingBatch(tokens=tokens, attention_mask=mask, action_mask=actions)


def test_the_slowest_process_determines_the_duration_of_the_passes():
    speed = PassSpeed(per_token=2.0, per_head_token=10.0, flops_per_second=1.0)
    batches = [batch_of(3), batch_of(5), batch_of(7)]
    count_tokens = lambda batch: int(batch.attention_mask.sum())  # noqa: E731
    seconds = [2 * 3 + 10 * 2, 2 * 5 + 10 * 4, 2 * 7 + 10 * 6]
    one = passes_seconds(batches, speed, count_tokens=count_tokens, processes=1)
    two = passes_seconds(batches, speed, count_tokens=count_tokens, processes=2)
    assert one == sum(seconds)
    assert two == seconds[0] + seconds[2]


def test_duration_of_sampling():
    speed = PassSpeed(per_token=0.01, per_head_token=1.0, flops_per_second=1.0)
    # 640 tokens in steps of 32 rows are 20 steps.
    found = sampling_seconds(
        sampled_tokens=640, rows=32, step_seconds=0.5, prompt_tokens=100, speed=speed
    )
    assert found == pytest.approx(20 * 0.5 + 1.0)


def test_random_replies_have_the_requested_length_and_no_stop_token():
    engine = RandomReplyEngine(10, excluded=[3, 4], seed=0)
    engine.submit([Request(i, [1], 50, (0,), SamplingParams()) for i in range(2)])
    replies = engine.poll()
    assert [len(reply.tokens) for reply in replies] == [50, 50]
    assert {token for reply in replies for token in reply.tokens} == {0, 1, 2, 5, 6, 7, 8, 9}
    assert engine.poll() == []


def test_batches_of_episodes_have_the_longest_replies(tmp_path):
    place = save_model(tmp_path / "model")
    tree = online_tree(tmp_path / "run", place, algorithm={"group_size": 4})
    trainer = OnlineTrainer("rloo", configure("rloo", tree))
    batches = play_and_make_online_batches(trainer)
    trainer.close()
    assert batches.sampled_tokens == 8 * 3  # eight episodes of one turn with three tokens
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches.scoring)
    assert sum(len(batch) for batch in batches.scoring) == 8
    # Two groups: each prompt is read once instead of four times.
    assert 4 * batches.prompt_tokens == tokens - batches.sampled_tokens


def config_file(tmp_path: Path, tree: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def sft_file(tmp_path: Path) -> str:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    return config_file(
        tmp_path, offline_tree(tmp_path / "run", save_model(tmp_path / "model"), data)
    )


def test_the_time_of_environments_is_that_of_all_episodes(echo_model, monkeypatch):
    """4 of 8 episodes are played; they take 3 seconds, also with a stopwatch of the collector."""
    monkeypatch.setattr(batches, "SAMPLED_EPISODES", 4)
    keys = {"rewards": [], "episodes_per_step": 8, "rollout": {"max_staleness": 1}}
    trainer = OnlineTrainer(
        "reinforce++", configure("reinforce++", online_tree("out", echo_model, **keys))
    )
    watch = trainer.collector.watch
    monkeypatch.setattr(watch, "pop_time_metrics", lambda: {"time/environments": 3.0})
    plan = estimate_online(trainer, Parallelism(1, 1, 1))
    trainer.close()
    assert plan.duration.environments == 6.0


def test_a_dry_run_states_memory_and_time_by_part(sft_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sft", "--config", sft_file, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in (
        "parallelism: 2 processes",
        "optimizer state",
        "activations",
        "overhead of the process (Python and the libraries)",
        "memory, upper bound:",
        "for 8 steps",
        "forward and backward passes",
        "average:",
    ):
        assert words in out, words
    assert "warning" not in out


@pytest.mark.parametrize(
    ("command", "data", "words"),
    [
        ("dpo", pair_rows, "log-probabilities of the reference"),
        ("reward", pair_rows, "average:"),
        ("kto", label_rows, "lower bound"),
    ],
)
def test_every_offline_command_has_an_estimate(command, data, words, tmp_path, capsys):
    rows_file = write_rows(tmp_path / "rows.jsonl", data())
    tree = offline_tree(tmp_path / "run", save_model(tmp_path / "model"), rows_file)
    assert main([command, "--config", config_file(tmp_path, tree), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "memory: about" in out
    assert "per step (forward and backward passes" in out
    assert words in out


def test_a_plan_is_that_of_the_given_number_of_processes(tmp_path, capsys, monkeypatch, echo_model):
    """The checks that depend on the number of processes are those of the run."""
    rows_file = write_rows(tmp_path / "rows.jsonl", label_rows())
    sizes = {"batch_size": 8, "micro_batch_size": 2}
    tree = offline_tree(tmp_path / "run", save_model(tmp_path / "model"), rows_file, **sizes)
    kto = ["kto", "--config", config_file(tmp_path, tree), "--dry-run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(kto) == 0
    line = "8 examples per step = 2 at once x 2 processes x 2 accumulated"
    assert line in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(kto) == 2
    assert "multiple of micro_batch_size x processes, got 8, 2 and 3" in capsys.readouterr().err
    (tmp_path / "online").mkdir()
    late = online_tree(tmp_path / "run", echo_model, rollout={"max_staleness": 1})
    grpo = ["grpo", "--config", config_file(tmp_path / "online", late), "--dry-run"]
    assert main(grpo) == 2
    assert "max_staleness needs a single training process" in capsys.readouterr().err
    for wrong in ("eight", "0", "-1", ""):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        assert main(kto) == 2
        assert f"WORLD_SIZE is {wrong!r}: set it to" in capsys.readouterr().err


def test_only_the_first_process_prints_the_plan(sft_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["sft", "--config", sft_file, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_warns_if_the_memory_is_too_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rlhf.runs.machine.total_memory_bytes", lambda device: 2**20)
    tree = online_tree(tmp_path / "run", save_model(tmp_path / "model"), critic="separate")
    assert main(["ppo", "--config", config_file(tmp_path, tree), "--dry-run"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert "more than the 1 MiB of this device" in line
    assert "model.lora" in line


def test_units():
    assert bytes_text(3 * 2**29) == "1.50 GiB"
    assert bytes_text(2**20) == "1 MiB"
    assert seconds_text(0.05) == "50 ms"
    assert seconds_text(90.0) == "90 s"
    assert seconds_text(3 * 3600) == "3 h"
