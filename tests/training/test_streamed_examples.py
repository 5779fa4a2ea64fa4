"""Streams of examples: every row once an epoch, exact resume, refusals, and constant memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.cli.main import main
from rlhf.cli.table import configure, run_command
from rlhf.common.files import json_line
from rlhf.config.data import DataSpec
from rlhf.data import load
from rlhf.errors import UserError
from rlhf.training import offline, streamed_examples
from rlhf.training.examples import ExampleEncoder
from rlhf.training.streamed_examples import ExampleStream, StreamedSource
from tests.helpers.chat_templates import chatml
from tests.helpers.training import (
    checkpoint_of,
    metrics_of,
    offline_tree,
    same,
    sft_rows,
    weights_of,
    write_rows,
)

BAD = [{"prompt": "", "completion": "x"}, {"prompt": "p", "completion": ""}]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streamed_examples, "BLOCK_ROWS", 8)


def stream_of(path: Path | str, *, seed: int = 0, processes: int = 1, **keys: Any) -> ExampleStream:
    spec = DataSpec(str(path), streaming=True, **keys)
    encoder = ExampleEncoder(chatml(), max_length=60)
    return ExampleStream(StreamedSource(spec, seed, processes), encoder)


def mixed_rows(count: int = 30) -> list[dict[str, Any]]:
    rows = sft_rows(count)
    return [*rows[:9], BAD[0], *rows[9:20], *BAD, *rows[20:]]


def expected_examples(path: Path) -> Counter[str]:
    rows = load(DataSpec(str(path)), "sft", seed=None).rows
    return Counter(map(str, ExampleEncoder(chatml(), max_length=60)(rows)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_epoch_has_every_example_once(tmp_path, name, seed):
    path = tmp_path / name
    text = "\n \n".join(json_line(row) for row in mixed_rows())
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(
            [{"prompt": r["prompt"] if isinstance(r["prompt"], list) else [],
              "completion": r["completion"] if isinstance(r["completion"], list) else []}
             for r in mixed_rows()]
        ).to_parquet(path)  # fmt: skip
    else:
        path.write_text("\ufeff" + text)
    expected = expected_examples(path)
    assert expected.total() == 30
    stream = stream_of(path, seed=seed)
    first, second = stream.take(30), stream.take(30)
    assert Counter(map(str, first)) == Counter(map(str, second)) == expected
    assert first != second  # another order in every epoch
    assert first != stream_of(path, seed=seed + 1).take(30)
    assert first == stream_of(path, seed=seed).take(30)
    assert stream.rows_read == 66
    assert (
        sum(n for why, n in stream.encoder.truncated_and_dropped_counts.items() if "dropped" in why)
        == 6
    )


def test_examples_are_shuffled_within_blocks_only(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", sft_rows(24))
    found = stream_of(path).take(24)
    rows = load(DataSpec(str(path)), "sft", seed=None).rows
    in_order = ExampleEncoder(chatml(), max_length=60)(rows)
    for start in range(0, 24, 8):
        block, original = found[start : start + 8], in_order[start : start + 8]
        assert sorted(map(str, block)) == sorted(map(str, original))
        assert block != original


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("taken", [0, 1, 8, 9, 30, 31, 47, 60, 75])
def test_a_restored_stream_continues_exactly(tmp_path, name, taken):
    path = tmp_path / name
    text = "".join(map(json_line, mixed_rows()))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    whole = stream_of(path)
    whole.take(taken)
    state = json.loads(json.dumps(whole.state_dict()))
    restored = stream_of(path)
    restored.take(3)
    restored.load_state_dict(state)
    assert restored.take(50) == whole.take(50)
    assert restored.state_dict() == whole.state_dict()
    assert restored.summary() == whole.summary()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("taken", [1, 8, 13, 30, 35])
@pytest.mark.parametrize("change", ["truncated", "shifted", "reversed"])
def test_a_stream_whose_rows_have_changed_is_refused(tmp_path, name, taken, change):
    path = tmp_path / name
    lines = list(map(json_line, sft_rows(30)))

    def write(lines: list[str]) -> None:
        text = "".join(lines).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)

    write(lines)
    stream = stream_of(path)
    stream.take(taken)
    state = stream.state_dict()
    changed = {"truncated": lines[:3], "shifted": lines[1:], "reversed": lines[::-1]}
    write(changed[change])
    with pytest.raises(UserError, match=r"rows have changed|line \d+: broken JSON"):
        stream_of(path).load_state_dict(state)
    write([*lines, lines[0]])
    if taken != 30:  # rows after the current block may be added
        stream_of(path).load_state_dict(state)


def test_worker_processes_give_the_same_stream(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", mixed_rows())
    stream = stream_of(path, processes=2)
    assert stream.take(70) == stream_of(path).take(70)
    stream.close()


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", BAD)
    with pytest.raises(UserError, match=r"no usable row .*dropped: empty prompt"):
        stream_of(path).take(1)
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        stream_of(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text(json_line(sft_rows(1)[0]) * 9 + "{\n")
    with pytest.raises(UserError, match=r"c\.jsonl, line 10: broken JSON"):
        stream_of(tmp_path / "c.jsonl").take(20)


def streamed_tree(
    tmp_path: Path, model: Path, name: str, *, source: Any = None, **keys: Any
) -> dict[str, Any]:
    """Configuration of a run of eight steps on a stream."""
    data = write_rows(tmp_path / "data.jsonl", mixed_rows())
    held = write_rows(tmp_path / "held.jsonl", sft_rows(8))
    tree = offline_tree(tmp_path / name, model, data, data_processes=1, **keys)
    tree["data"] = [{"path": str(data), "streaming": True, **(source or {})}]
    return {"eval_data": [{"path": str(held)}]} | tree


@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_is_bitwise_equal(tmp_path, echo_model, monkeypatch, stop):
    whole = streamed_tree(tmp_path, echo_model, "whole", trainer={"max_steps": 8})
    run_command("sft", whole)
    tree = streamed_tree(tmp_path, echo_model, "cut", trainer={"max_steps": 8})
    original = ExampleStream.take
    calls = []

    def take(self, count):
        calls.append(count)
        if len(calls) == stop + 2:
            raise UserError("cut")
        return original(self, count)

    monkeypatch.setattr(ExampleStream, "take", take)
    with pytest.raises(UserError, match="cut"):
        run_command("sft", tree)
    monkeypatch.setattr(ExampleStream, "take", original)
    state = checkpoint_of(tmp_path / "cut")["state"]
    assert state["step"] == stop
    assert state["stream"]["rows_read"] > 0
    run_command("sft", tree | {"resume": True})
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_dropped_rows_are_logged_and_recorded(tmp_path, echo_model, caplog):
    caplog.set_level("INFO")
    tree = streamed_tree(tmp_path, echo_model, "run", trainer={"max_steps": 8})
    run_command("sft", tree)
    changed = checkpoint_of(tmp_path / "run")["state"]["stream"]["changed"]
    assert changed["dropped: empty prompt"] >= 2
    assert "rows streamed from" in caplog.text
    assert "dropped: empty prompt" in caplog.text


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        ("dpo", {}, "only rlhf sft with the native engine"),
        ("kto", {}, "only rlhf sft with the native engine"),
        ("reward", {}, "only rlhf sft with the native engine"),
        ("sft", {"engine": "trl"}, "only rlhf sft with the native engine"),
        ("sft", {"source": {"limit": 3}}, "limit and weight need all rows"),
        ("sft", {"source": {"weight": 3.0}}, "limit and weight need all rows"),
        ("sft", {"trainer": {"max_steps": -1}}, "set trainer.max_steps"),
        ("sft", {"eval_data": []}, "give eval_data"),
        ("sft", {"model": {"scratch": {"vocab_size": 300}}}, "model from scratch"),
    ],
)
def test_impossible_combinations_are_one_line(tmp_path, echo_model, capsys, command, keys, message):
    model = keys.pop("model", None)
    tree = streamed_tree(tmp_path, echo_model, "run", **keys) | ({"model": model} if model else {})
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    assert main([command, "--config", str(tmp_path / "config.yaml")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "data.streaming" in errors


@pytest.mark.parametrize(("local_processes", "expected"), [(None, 8), ("4", 2), ("16", 1)])
def test_the_processes_of_a_machine_share_its_processors(
    tmp_path, echo_model, monkeypatch, local_processes, expected
):
    """Each process of a run encodes the whole stream with worker processes of its own."""
    monkeypatch.setattr(offline, "available_cpus", lambda: 8)
    if local_processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    tree = streamed_tree(tmp_path, echo_model, "run", trainer={"max_steps": 8})
    config = configure("sft", tree | {"data_processes": None})
    rows, _ = offline.load_train_and_eval_rows(config, offline.METHODS["sft"])
    assert isinstance(rows, StreamedSource)
    assert rows.processes == expected


def test_other_data_cannot_be_streamed(tmp_path, echo_model):
    path = write_rows(tmp_path / "a.jsonl", sft_rows(8))
    with pytest.raises(UserError, match=r"data\.streaming: only the training data"):
        load(DataSpec(str(path), streaming=True), "sft", seed=0)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a \.json file cannot be streamed"):
        stream_of(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"no data file .*/b\.jsonl .*did you mean 'a\.jsonl'"):
        stream_of(tmp_path / "b.jsonl")
    two = streamed_tree(tmp_path, echo_model, "run")
    with pytest.raises(UserError, match="give one source"):
        run_command("sft", two | {"data": two["data"] * 2})


MEMORY = """
import resource, sys
from itertools import count
from pathlib import Path
from rlhf.config.data import DataSpec
from rlhf.training.examples import ExampleEncoder
from rlhf.training.streamed_examples import ExampleStream, StreamedSource
from tests.helpers.chat_templates import chatml
path, total = sys.argv[1], int(sys.argv[2])
spec = DataSpec(path, streaming=True)
encoder = ExampleEncoder(chatml(), max_length=60)
stream = ExampleStream(StreamedSource(spec, 0, int(sys.argv[3])), encoder)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream.take(total // 10)
early = peak()
for _ in range(9):
    stream.take(total // 10)
stream.close()
print(stream.rows_read, early, peak())
"""


@pytest.mark.sweep
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """RLHF_STREAM_ROWS rows, by default 200,000; the documented measurement has 10,000,000."""
    total = int(os.environ.get("RLHF_STREAM_ROWS", "200000"))
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(total):
            row = {"prompt": f"Repeat: apple {number}", "completion": f"apple {number % 97}"}
            file.write(json_line(row))
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(total), "1"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows, early, late = map(int, result.stdout.split())
    assert rows == total
    assert late < early * 1.05 + 20_000  # kilobytes
