"""Two processes do what one does: same gradients, same metrics, one run directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from rlhf.algorithms.metrics import MetricSums
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.errors import UserError
from rlhf.runs.checksums import verify_checksums
from rlhf.runs.directory import Run
from rlhf.runs.profiling import STEP_PARTS
from rlhf.training import distributed as training_distributed
from rlhf.training.checkpoint import remove_damaged_and_find_latest
from rlhf.training.distributed import HEARTBEAT_TIMEOUT_SECONDS, Heartbeat, World
from rlhf.training.offline import train_offline
from tests.helpers.processes import finish, free_port, start, start_two, steps_before
from tests.helpers.training import (
    checkpoint_of,
    metrics_of,
    offline_tree,
    online_tree,
    pairs_tree,
    read_rows,
    same,
    save_model,
    sft_rows,
    tensors_of,
    write_rows,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("time", *(f"time/{part}" for part in STEP_PARTS))


def test_a_world_of_one_changes_nothing() -> None:
    world = World()
    assert world.map([3, 1, 2], lambda part: [10 * x for x in part]) == [30, 10, 20]
    assert world.items_of_this_process(["a", "b"]) == ["a", "b"]
    assert world.gather("x") == ["x"]


class FakeStore:
    """A store in this process; it can be taken away."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("closed")
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        if self.broken:
            raise RuntimeError("closed")
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


def test_a_process_without_signs_of_life_is_gone() -> None:
    store = FakeStore()
    first, second = (Heartbeat(store, rank, 2) for rank in (0, 1))
    for now in range(0, 200, 5):
        second.beat_and_check_others(now)
        first.beat_and_check_others(now)
    assert not first.lost
    assert not second.lost
    for now in range(200, 200 + int(HEARTBEAT_TIMEOUT_SECONDS), 5):
        first.beat_and_check_others(now)
    assert not first.lost
    first.beat_and_check_others(201 + HEARTBEAT_TIMEOUT_SECONDS)
    assert first.lost
    assert not first.must_end(300)
    first.waiting_since = 299
    assert not first.must_end(300)
    assert first.must_end(310)
    with pytest.raises(UserError, match="another process of this run ended"):
        World(0, 2, first).barrier()


def test_without_the_store_all_others_are_gone() -> None:
    store = FakeStore()
    first, second = (Heartbeat(store, rank, 2) for rank in (0, 1))
    second.beat_and_check_others(0)
    first.beat_and_check_others(0)
    store.broken = True
    second.beat_and_check_others(HEARTBEAT_TIMEOUT_SECONDS - 1)
    assert not second.lost
    second.beat_and_check_others(HEARTBEAT_TIMEOUT_SECONDS + 1)
    assert second.lost


def test_shares_are_disjoint_and_complete() -> None:
    parts = list(range(7))
    shares = [World(rank, 3).items_of_this_process(parts) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == parts


def write_config(folder: Path, model: Path, **keys: Any) -> Path:
    """The configuration of a short PPO run in ``folder/run``."""
    tree = online_tree(
        folder / "run",
        model,
        micro_batch_tokens=96,
        algorithm={"num_minibatches": 2, "num_epochs": 2},
        **keys,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_ppo(folder: Path, model: Path, *, processes: int) -> list[dict[str, Any]]:
    """Metrics of a run of two steps, started as users start it."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", free_port()]
    config = write_config(folder, model, num_steps=2)
    finish(start(*launcher, "-m", "rlhf", "ppo", "--config", str(config)))
    return read_rows(folder / "run" / "metrics.jsonl")


def test_one_of_two_processes_writes_the_report_of_a_reward_model(tmp_path: Path) -> None:
    tree = pairs_tree(tmp_path, save_model(tmp_path / "model"), trainer={"max_steps": 2})
    config = tmp_path / "reward.yaml"
    config.write_text(yaml.safe_dump(tree))
    for process in start_two(config, "reward", "--engine", "native"):
        finish(process)
    assert "temperature" in json.loads((tmp_path / "run/final/reward_model.json").read_text())


def kill_two(config: Path, *, lines: int) -> None:
    """Kill -9 both once so many lines were logged."""
    processes = start_two(config)
    log = config.parent / "run/metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if log.exists() and log.read_text().count("\n") >= lines:
            break
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def test_a_process_that_is_refused_before_training_ends_the_other(
    tmp_path: Path, echo_model: Path
) -> None:
    """Only the first process checks the directory; the other one would wait for it at the start."""
    config = write_config(tmp_path / "cut", echo_model)
    (tmp_path / "cut/run").mkdir()
    (tmp_path / "cut/run/mine.txt").write_text("mine")
    processes = start_two(config, "ppo", "--seed", "1")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for text, expected in zip(
        errors, ("exists already", "another process of this run"), strict=True
    ):
        (line,) = [line for line in text.splitlines() if line.startswith("rlhf:")]
        assert expected in line


def test_the_others_are_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_distributed, "START_TIMEOUT_SECONDS", 0.5)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"other processes .* did not start within 0\.5 s, or ended"
    ):
        training_distributed.init_distributed()


def test_collective_operations_use_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, every process would communicate with the first GPU, which NCCL refuses."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    store = torch.distributed.HashStore()
    group = training_distributed.distributed
    monkeypatch.setattr(group, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(group, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setenv("LOCAL_RANK", "3")
    training_distributed._join_group("nccl")
    assert calls == [torch.device("cuda", 3), "nccl"]


def test_metrics_are_sent_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on a GPU is received on the GPU of the sender, and cannot be added to others."""

    class OnGPU:
        def cpu(self) -> torch.Tensor:
            return torch.tensor(2.0)

    monkeypatch.setattr(World, "gather", lambda world, value: [value, value])
    sums = MetricSums(sums={"loss": cast("torch.Tensor", OnGPU())})
    assert World(0, 2).sum_metrics(sums).compute() == {"loss": 4.0}
    assert World().sum_metrics(sums) is sums


def test_two_processes_train_as_one(tmp_path: Path, echo_model: Path) -> None:
    one = run_ppo(tmp_path / "one", echo_model, processes=1)
    two = run_ppo(tmp_path / "two", echo_model, processes=2)
    assert [row["step"] for row in two] == [1, 2]
    for alone, shared in zip(one, two, strict=True):
        for key in alone.keys() - set(TIMES):
            torch.testing.assert_close(shared[key], alone[key], rtol=1e-3, atol=2e-5, msg=key)
    weights = [tensors_of(tmp_path / name / "run/checkpoints/step-2") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "two/run/evaluation/run").glob("episodes.jsonl"))) == 1


def test_two_killed_processes_end_like_two_that_were_not(tmp_path: Path, echo_model: Path) -> None:
    configs = [
        write_config(tmp_path / name, echo_model, num_steps=12, save_every=2)
        for name in ("whole", "cut")
    ]
    kill_two(configs[1], lines=5)
    assert 5 <= len(metrics_of(tmp_path / "cut/run")) < 12
    for config in configs:
        for process in start_two(config):
            finish(process)
    runs = [tmp_path / name / "run" for name in ("whole", "cut")]
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    assert len(metrics_of(runs[0])) == 12
    assert same(checkpoint_of(runs[0]), checkpoint_of(runs[1]))


def test_two_processes_continue_from_the_checkpoint_before_the_damaged_ones(
    tmp_path: Path, echo_model: Path
) -> None:
    config = write_config(tmp_path / "whole", echo_model, num_steps=4, save_every=1, keep_last=4)
    assert main(["ppo", "--config", str(config)]) == 0
    shutil.copytree(tmp_path / "whole/run", tmp_path / "cut")
    run = tmp_path / "cut"
    (run / "finished").unlink()
    shutil.rmtree(run / "final")
    weights, optimizer = (
        run / f"checkpoints/step-{name}" for name in ("4/model.safetensors", "3/optimizer.pt")
    )
    os.truncate(weights, weights.stat().st_size // 2)
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    messages = []
    for process in start_two(config, "ppo", "--resume", "--output_dir", str(run)):
        messages.append(process.communicate(timeout=120)[1])
        assert process.returncode == 0, messages[-1]
    for path in (weights, optimizer):
        warning = rf"{path} is damaged: .*; using the previous checkpoint instead"
        assert [len(re.findall(warning, text)) for text in messages] == [1, 0]
    for step in (1, 2, 3, 4):
        verify_checksums(run / f"checkpoints/step-{step}")
    before, after = metrics_of(tmp_path / "whole/run"), metrics_of(run)
    assert [row["step"] for row in after] == [1, 2, 3, 4]
    assert after[:2] == before[:2]
    # The optimizer or the weights of the damaged checkpoints would give another step 4.
    whole, cut = (tensors_of(path / "checkpoints/step-4") for path in (tmp_path / "whole/run", run))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-6)


def test_trl_leaves_the_result_to_the_first_process(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "data.jsonl", sft_rows())
    trainer = {"max_steps": 1}
    model = save_model(tmp_path / "model")
    tree = offline_tree(tmp_path / "run", model, rows, engine="trl", trainer=trainer)
    config = COMMANDS.config_from_tree("sft", tree)
    run = Run.open(COMMANDS.effective_config_tree("sft", config))
    run.writes = False
    train_offline("sft", config, run)
    run.close()
    assert not run.final.exists()


def test_a_pipeline_in_two_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pairs_tree(tmp_path, save_model(tmp_path / "model"))
    stage = {key: value for key, value in tree.items() if key != "output_dir"}
    stages = [stage | {"name": "dpo", "command": "dpo"}]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", str(path)]) == 2
    assert "`rlhf run` runs in one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["run", str(path)]) == 2
    assert "WORLD_SIZE is 'two': set it to a whole number from 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(
    tmp_path: Path, echo_model: Path
) -> None:
    config = write_config(tmp_path / "run", echo_model, num_steps=500, save_every=400)
    processes = start_two(config)
    steps_before(processes, config.parent / "run/metrics.jsonl", lines=3)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert "stopped by SIGTERM" in errors
    steps = len(metrics_of(config.parent / "run"))
    assert checkpoint_of(config.parent / "run")["state"]["step"] == steps


def test_a_signal_to_one_process_stops_both_processes_of_trl(
    tmp_path: Path, echo_model: Path
) -> None:
    tree = offline_tree(
        tmp_path / "run",
        echo_model,
        write_rows(tmp_path / "rows.jsonl", sft_rows()),
        engine="trl",
        micro_batch_size=2,
        batch_size=4,
        evaluations=2,
        trainer={"max_steps": 2000, "logging_steps": 1},
    )
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(tree))
    processes = start_two(config, "sft")
    steps_before(processes, tmp_path / "run/metrics.jsonl", lines=4)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert "stopped by SIGTERM" in errors
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert 3 <= step < 1000
    verify_checksums(tmp_path / f"run/checkpoints/checkpoint-{step}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_with_one_line(
    tmp_path: Path, echo_model: Path, victim: int
) -> None:
    config = write_config(tmp_path / "run", echo_model, num_steps=500, save_every=2)
    processes = start_two(config)
    steps_before(processes, config.parent / "run/metrics.jsonl", lines=3)
    processes[victim].kill()
    _, errors = processes[1 - victim].communicate(timeout=60)
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("rlhf:")]
    assert len(lines) == 1
    assert "another process of this run ended" in lines[0]
    assert "Traceback" not in errors
    assert remove_damaged_and_find_latest(config.parent / "run/checkpoints") is not None
