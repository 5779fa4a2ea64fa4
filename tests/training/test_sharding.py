"""Sharded training: two processes with FSDP2 do what one process does without it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import sharding
from rlhf.cli.main import main
from rlhf.config.model import ScratchSpec
from rlhf.models.precision import MasterAdamW
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.models.sharding import deferred
from rlhf.models.sharding.saving import write_safetensors
from rlhf.models.sharding.tensors import StoredWeights, WholeTensors, row_range
from rlhf.runs.directory import Run
from rlhf.training.checkpoint import remove_damaged_and_find_latest
from rlhf.training.distributed import World
from tests.helpers import sharded_runs
from tests.helpers.processes import finish, free_port, start, start_two, steps_before
from tests.helpers.training import (
    Tree,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    same,
    save_model,
    sft_rows,
    tensors_of,
    write_rows,
)

STEPS = 3
"""Optimizer steps of the compared runs."""
LORA = {"rank": 4, "alpha": 8}
WIDTH = 20
"""Hidden size of the compared models. Odd numbers of rows are among its shards."""
BATCHES = {"batch_size": 5, "micro_batch_size": 1, "max_length": 16, "evaluations": 1}
"""Five micro-batches in a step, so that one of two processes repeats one."""


# Parts, in one process


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_row_ranges_are_those_of_torch(rows: int, size: int) -> None:
    numbers = torch.arange(rows)
    chunks = list(numbers.chunk(size)) if rows else []
    chunks += [numbers[:0]] * (size - len(chunks))
    for rank in range(size):
        first, last = row_range(rows, rank=rank, world_size=size)
        assert numbers[first:last].tolist() == chunks[rank].tolist()


def test_processes_make_equal_numbers_of_passes() -> None:
    items = [[0, 1], [2], [3, 4]]
    parts = [
        list(World(rank, 2, sharded_model=True).own_micro_batches_with_weights(items))
        for rank in (0, 1)
    ]
    assert parts == [[([0, 1], 1.0), ([3, 4], 1.0)], [([2], 1.0), ([2], 0.0)]]
    assert list(World(1, 2).own_micro_batches_with_weights(items)) == [([2], 1.0)]
    assert list(World(3, 4, sharded_model=True).own_micro_batches_with_weights(items)) == [
        ([2], 0.0)
    ]
    assert list(World(1, 2, sharded_model=True).own_micro_batches_with_weights([])) == []


@pytest.mark.parametrize("seed", [0, 5])
def test_rows_of_initial_values_are_those_of_the_whole_model(seed: int) -> None:
    tokenizer: Any = make_tokenizer(["apple river stone"] * 4, 300)
    spec = ScratchSpec(hidden_size=WIDTH, num_layers=2, num_heads=2, context=32)
    whole = dict(make_random_llama_model(spec, tokenizer, seed=seed).named_parameters())
    state = torch.get_rng_state()
    for rank in range(2):
        values = deferred._InitialRowsRecorder(rank=rank, world_size=2)
        with deferred.init_empty_weights(include_buffers=False), values:
            model = make_random_llama_model(spec, tokenizer, seed=seed)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            first, last = row_range(len(parameter), rank=rank, world_size=2)
            _, start, rows = values.rows_by_id[id(parameter)]
            assert start == first
            assert torch.equal(rows, whole[name][first:last]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert not whole["model.embed_tokens.weight"][tokenizer.pad_token_id].any()


def test_a_file_that_is_written_in_parts_is_read_by_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = torch.randn(5, 3)
    tensors = {
        "half": torch.randn(3, 3).bfloat16(),
        "number": torch.tensor(2.5),
        "tied": tied,
        "again": tied,
        "ids": torch.arange(3),
    }
    write_safetensors(tmp_path / "model.safetensors", WholeTensors(tensors), writes=True)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys() - {"again"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert all(found[name].dtype == tensors[name].dtype for name in found)
    stored = StoredWeights(tmp_path)
    assert torch.equal(stored.tensor_rows("tied", 1, 4), tied[1:4])
    assert torch.equal(stored.whole_tensor("number"), tensors["number"])
    assert stored.shapes["half"] == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_an_optimizer_is_restored_by_parameter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.models.precision.OPTIMIZER_CHUNK_ELEMENTS", 8)

    def optimizer_of(seed: int) -> MasterAdamW:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((5, 4), (3,), (2, 2), (0, 4))  # a process may have no rows of a weight
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        return MasterAdamW([nn.Parameter(weight) for weight in weights], lr=0.1)

    def step(optimizer: MasterAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        optimizer.step()

    trained, fresh = optimizer_of(0), optimizer_of(1)
    for seed in (10, 11):
        step(trained, seed)
    states = list(fresh.parameter_states())
    for (parameter, target), (source_parameter, source) in zip(
        states, trained.parameter_states(), strict=True
    ):
        parameter.data.copy_(source_parameter)
        assert target.keys() == source.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert ("master" in target) == (dtype == torch.bfloat16)
        for name, tensor in target.items():
            assert tensor.shape == source[name].shape
            tensor.copy_(source[name])
    fresh.load_parameter_states(states)
    for optimizer in (trained, fresh):
        step(optimizer, 12)
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (fresh, trained)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_process_does_not_take_the_overwritten_run_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process can look before the first has removed the old files.

    It then ended with "nothing to do", and the first process waited for it.
    """
    (tmp_path / "finished").touch()
    tree = {"output_dir": str(tmp_path), "overwrite": True}
    monkeypatch.setenv("RANK", "1")
    assert not Run.open(tree).finished
    assert Run.open(tree | {"overwrite": False, "resume": True}).finished


# Runs


def jobs_of(folder: Path) -> dict[str, Tree]:
    """Name -> configuration of a run of each kind, with sharding."""
    model = save_model(folder / "model", width=WIDTH, sharp=8.0)
    sft = write_rows(folder / "sft.jsonl", sft_rows())
    pairs = write_rows(folder / "pairs.jsonl", pair_rows())
    trainer = {"max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1}
    offline = BATCHES | {"sharding": "fsdp", "trainer": trainer}
    scratch = {"hidden_size": WIDTH, "num_layers": 3, "num_heads": 2, "context": 64}
    online = {
        "sharding": "fsdp",
        "num_steps": STEPS,
        "save_every": STEPS,
        "micro_batch_tokens": 16,
        "episodes_per_step": 6,
    }
    # Adam divides the gradient by its size, which hides errors of the gradient. SGD shows them.
    sgd = {"optim": "sgd", "learning_rate": 0.3}
    steep = {"name": "sgd", "learning_rate": 0.3}
    return {
        "sft": offline_tree(folder / "sft", model, sft, **offline)
        | {"model": {"scratch": scratch}, "activation_checkpointing": True}
        | {"trainer": {**trainer, **sgd}},
        "reward": offline_tree(folder / "reward", model, pairs, **offline),
        "dpo": offline_tree(folder / "dpo", model, pairs, **offline),
        "ppo": online_tree(folder / "ppo", model, **online),
        "ppo-separate": online_tree(folder / "ppo-separate", model, critic="separate", **online)
        | {"optimizer": steep},
        "ppo-separate-lora": online_tree(
            folder / "ppo-separate-lora", model, critic="separate", **online
        )
        | {"model": {"path": str(model), "lora": LORA}},
        "grpo": online_tree(folder / "grpo", model, **online)
        | {"model": {"path": str(model), "lora": LORA}, "algorithm": {"group_size": 2}},
    }


def words_of(folder: Path, name: str, tree: Mapping[str, Any], *options: str) -> list[str]:
    """Words of the command line of a run, whose configuration is written to a file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, "output_dir": str(folder / name)}))
    return [name.split("-")[0], "--config", str(path), *options]


def run_two(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run jobs in two processes."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    words = ("-m", "tests.helpers.sharded_runs", str(path))
    for process in [start(*words, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]:
        finish(process)


def compare(folder: Path, trees: Mapping[str, Tree], *, dtype: str) -> None:
    """Run each configuration in one process, and compare metrics and weights with those of two."""
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    # Positive and negative advantages cancel in the policy loss, but their rounding errors do not.
    absolute = {"float64": 1e-14, "float32": 5e-7}[dtype]
    for name, tree in trees.items():
        plain = {**tree, "sharding": "none"}
        assert sharded_runs.run(words_of(folder / "one", name, plain), dtype=dtype) == 0
        one, two = (folder / side / name for side in ("one", "two"))
        pairs = list(zip(metrics_of(one), metrics_of(two), strict=True))
        keys = {"train/loss", "policy/loss", "value/loss", "train/grad_norm", "eval/loss"}
        assert any(keys & alone.keys() for alone, _ in pairs)
        assert pairs[-1][0]["train/moved"] > 0.9
        for alone, together in pairs:
            assert alone.keys() == together.keys()
            for key in keys & alone.keys():
                expected = pytest.approx(alone[key], rel=tolerance, abs=absolute)
                assert together[key] == expected, (name, key)
        found, wanted = (tensors_of(run / "final") for run in (two, one))
        assert found.keys() == wanted.keys()
        difference = torch.stack([(found[k] - wanted[k]).double().norm() for k in found]).norm()
        size = torch.stack([wanted[k].double().norm() for k in found]).norm()
        print(f"{name}: relative difference of the weights {float(difference / size):.1e}")
        # In float32, Adam turns the sign of a tiny gradient into a whole step.
        assert float(difference / size) <= (1e-10 if dtype == "float64" else 1e-4), name


def resumable(folder: Path) -> Tree:
    """Configuration of an SFT run with checkpoints after the steps 1, 2 and 3."""
    tree = jobs_of(folder)["sft"]
    adam = {"max_steps": STEPS, "learning_rate": 1e-3}
    return {**tree, "trainer": adam, "evaluations": STEPS, "keep_last": STEPS}


COMPARED = ("sft", "ppo-separate")
"""The kinds of runs that are compared in every test run; the others need more time."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all runs in two processes that the tests below compare, in ``two``.

    ``one/resumable`` is a run in one process. ``one-two`` and ``two-two`` are runs in one and two
    processes that two processes resumed after step 2.
    """
    folder = tmp_path_factory.mktemp("runs")
    trees, again = jobs_of(folder), resumable(folder)
    assert sharded_runs.run(words_of(folder / "one", "sft-resumable", again)) == 0
    jobs: list[dict[str, Any]] = [
        {"words": words_of(folder / "two", name, trees[name]), "dtype": "float64"}
        for name in COMPARED
    ]
    jobs.append({"words": words_of(folder / "two", "sft-resumable", again)})
    for source in ("one", "two"):
        target = folder / f"{source}-two"
        words = words_of(target, "sft-resumable", again, "--resume")
        copied = [str(place / "sft-resumable") for place in (folder / source, target)]
        jobs.append({"words": words, "copy": copied})
    run_two(folder, jobs)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(runs: Path) -> None:
    trees = jobs_of(runs)
    compare(runs, {name: trees[name] for name in COMPARED}, dtype="float64")
    for name in COMPARED:  # ordinary folders of Transformers
        finals = [runs / side / name / "final" for side in ("one", "two")]
        ids = torch.arange(5)[None]
        one, two = (AutoModelForCausalLM.from_pretrained(f)(input_ids=ids).logits for f in finals)
        torch.testing.assert_close(one, two)
        configs = [json.loads((final / "config.json").read_text()) for final in finals]
        assert configs[0] == configs[1]


@pytest.mark.slow
def test_a_checkpoint_is_resumed_by_another_number_of_processes(runs: Path) -> None:
    name, target = "sft-resumable", runs / "two-one"
    words = words_of(target, name, resumable(runs), "--resume")
    sharded_runs.copy_without_last_checkpoint(runs / "two" / name, target / name)
    assert sharded_runs.run(words) == 0
    expected = tensors_of(runs / "two" / name / "checkpoints/step-3")
    again = tensors_of(runs / "two-two" / name / "checkpoints/step-3")
    assert same(again, expected)
    assert metrics_of(runs / "two-two" / name) == metrics_of(runs / "two" / name)
    # The optimizer is loaded as well: without its moments, step 3 would be far from the expected.
    for side in ("two-one", "one-two", "one"):
        found = tensors_of(runs / side / name / "checkpoints/step-3")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-6)
    before = tensors_of(runs / "two" / name / "checkpoints/step-2")
    assert not any(torch.equal(before[key], value) for key, value in expected.items())


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_method_trains_in_two_processes_as_in_one(tmp_path: Path, dtype: str) -> None:
    trees = jobs_of(tmp_path)
    jobs = [
        {"words": words_of(tmp_path / "two", name, tree), "dtype": dtype}
        for name, tree in trees.items()
    ]
    run_two(tmp_path, jobs)
    compare(tmp_path, trees, dtype=dtype)


def test_one_process_with_sharding_equals_the_run_without_it(tmp_path: Path) -> None:
    tree = jobs_of(tmp_path)["dpo"]
    for name, value in (("plain", "none"), ("fsdp", "fsdp")):
        words = words_of(tmp_path / name, "dpo", {**tree, "sharding": value})
        assert main(words) == 0
    plain, fsdp = (tmp_path / name / "dpo" for name in ("plain", "fsdp"))
    assert metrics_of(plain) == metrics_of(fsdp)
    assert same(tensors_of(plain / "final"), tensors_of(fsdp / "final"))


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_an_optimizer_without_state_in_shards_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    tree = jobs_of(tmp_path)[command]
    if command == "sft":
        tree["trainer"] |= {"optim": "sign_sgd"}
    else:
        tree["optimizer"] = {"name": "sign_sgd"}
    plugin = Path(__file__).parents[2] / "examples" / "plugins" / "optimizer.py"
    words = words_of(tmp_path / "out", command, {**tree, "plugins": [str(plugin)]})
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf:")]
    assert len(lines) == 1
    assert "optimizer 'sign_sgd' has no state that can be saved in shards" in lines[0]


@pytest.mark.parametrize("command", ["kto", "sft"])
def test_sharding_with_trl_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    tree = {**jobs_of(tmp_path)["dpo"], "engine": "trl"}
    assert main(words_of(tmp_path / "out", command, tree)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf:")]
    assert len(lines) == 1
    assert "sharding: fsdp is only supported by the native engine" in lines[0]
    assert not (tmp_path / "out" / command / "final").exists()


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["ppo-separate", "grpo", "reward", "reward-lora"])
def test_runs_are_resumed_bit_for_bit_in_two_processes(tmp_path: Path, name: str) -> None:
    trees = jobs_of(tmp_path)
    trees["reward-lora"] = {
        **trees["reward"],
        "model": {"path": str(tmp_path / "model"), "lora": LORA},
    }
    tree = trees[name] | {"keep_last": STEPS}
    tree |= {"save_every": 1} if name in ("ppo-separate", "grpo") else {"evaluations": STEPS}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words_of(cut, name, tree)
    resumed = {
        "words": words_of(cut, name, tree, "--resume"),
        "copy": [str(whole / name), str(cut / name)],
    }
    run_two(tmp_path, [{"words": words_of(whole, name, tree)}, resumed])
    assert metrics_of(whole / name) == metrics_of(cut / name)
    assert same(tensors_of(whole / name / "final"), tensors_of(cut / name / "final"))


@pytest.mark.sweep
def test_bfloat16_weights_are_trained_with_float32_sums_and_states(tmp_path: Path) -> None:
    trees = {
        name: {**tree, "model": {**tree["model"], "dtype": "bfloat16"}}
        for name, tree in jobs_of(tmp_path).items()
        if name in ("reward", "dpo", "ppo")
    }
    jobs = [
        {"words": words_of(tmp_path / "two", name, tree), "dtype": "bfloat16"}
        for name, tree in trees.items()
    ]
    run_two(tmp_path, jobs)
    for name, tree in trees.items():
        plain = {**tree, "sharding": "none"}
        words = words_of(tmp_path / "one", name, plain)
        assert sharded_runs.run(words, dtype="bfloat16") == 0
        one, two = (tensors_of(tmp_path / side / name / "final") for side in ("one", "two"))
        start = tensors_of(tmp_path / "model")
        for key, value in one.items():
            assert two[key].dtype == value.dtype
            # Each step moves a weight by at most about the learning rate of 1e-3.
            torch.testing.assert_close(two[key], value, rtol=2**-7, atol=4e-3)
        moved = [not torch.equal(two[key], start[key].bfloat16()) for key in start if key in two]
        assert any(moved)


@pytest.mark.sweep
def test_two_processes_need_little_more_than_half_of_the_memory_each() -> None:
    (imported,) = sharding.measure("import", processes=1)
    (one,) = sharding.measure("none", processes=1)
    two = sharding.measure("fsdp", processes=2)
    assert max(two) - imported <= 0.6 * (one - imported)


@pytest.mark.sweep
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_dead_process_ends_the_other_with_one_line(
    tmp_path: Path, name: str, victim: int
) -> None:
    tree = jobs_of(tmp_path)[name]
    if name == "sft":
        tree |= {"trainer": {**tree["trainer"], "max_steps": 4000}, "evaluations": 1000}
    else:
        tree |= {"num_steps": 1000, "save_every": 2}
    words = words_of(tmp_path / "out", name, tree)
    processes = start_two(Path(words[2]), name, "--overwrite")
    run = tmp_path / "out" / name
    steps_before(processes, run / "metrics.jsonl", lines=8)
    processes[victim].kill()
    started = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=90)
    print(f"the other process ended after {time.monotonic() - started:.0f} s")
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("rlhf:")]
    assert len(lines) == 1, errors
    assert "another process of this run ended" in lines[0]
    assert "Traceback" not in errors
    assert remove_damaged_and_find_latest(run / "checkpoints") is not None


@pytest.mark.sweep
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_and_overwrite_a_run(tmp_path: Path, launcher: str) -> None:
    launch = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
        "accelerate": [
            "accelerate.commands.launch",
            *("--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
        ],
    }[launcher]
    words = words_of(tmp_path / "out", "sft", jobs_of(tmp_path)["sft"])
    results = []
    for options in ([], ["--overwrite"], ["--overwrite"]):
        command = ["-m", *launch, free_port(), "-m", "rlhf", *words, *options]
        finish(start(*command))
        results.append(tensors_of(tmp_path / "out/sft/final"))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
