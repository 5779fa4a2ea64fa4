"""Examples from files are those of rows in memory, and training with them is bitwise equal."""

from __future__ import annotations

import ast
import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.cli.table import run_command
from rlhf.common.files import json_line
from rlhf.config.data import DataSpec
from rlhf.data import load, row_store, stored_rows
from rlhf.data.stored_rows import DataPreparationSettings, load_stored
from rlhf.errors import UserError
from rlhf.reward_models.losses import IGNORED
from rlhf.training import stored_examples
from rlhf.training.examples import Example, ExampleEncoder
from rlhf.training.stored_examples import (
    CachingEncoder,
    ignored_and_trained_run_lengths,
    labels_from_run_lengths,
)
from tests.helpers.chat_templates import CHATML, STRICT, chatml
from tests.helpers.training import (
    assistant,
    label_rows,
    metrics_of,
    offline_tree,
    pair_rows,
    same,
    sft_rows,
    user,
    weights_of,
    write_rows,
)

WORDS = ("apple", "river", "\u2028", "\u00e9\U0001f600", "<|im_end|>", "  ", "\n", "7")
THINKING = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments }}{% endif %}<|im_end|>",
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_store, "BLOCK_ROWS", 7)
    monkeypatch.setattr(stored_examples, "BLOCK_ROWS", 9)


def text(generator: random.Random) -> str:
    return "".join(generator.choices(WORDS, k=generator.choice([1, 2, 5, 30])))


def conversation(generator: random.Random) -> list[dict[str, Any]]:
    """Turns of one to three replies, some with a system message, tools, reasoning or weight 0."""
    turns: list[dict[str, Any]] = []
    if generator.random() < 0.2:
        turns.append({"role": "system", "content": text(generator)})
    for _ in range(generator.choice([1, 1, 2, 3])):
        turns += user(f"u{text(generator)}")
        reply: dict[str, Any] = {"role": "assistant", "content": f"a{text(generator)}"}
        kind = generator.randrange(8)
        if kind == 0:
            reply["weight"] = 0
        elif kind == 1:
            reply["reasoning_content"] = "because"
        elif kind == 2:
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            reply["tool_calls"] = [call]
            turns += [reply, {"role": "tool", "content": "done"}]
            reply = {"role": "assistant", "content": text(generator) + "a"}
        turns.append(reply)
    return turns


def rows_of(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    if kind == "text":
        return [{"text": text(generator)} for _ in range(count)]
    if kind == "sft":
        return [{"messages": conversation(generator)} for _ in range(count)]
    rows = []
    for index in range(count):
        prompt = user(text(generator) + str(index))
        replies = {name: assistant("a" + text(generator)) for name in ("chosen", "rejected")}
        if kind == "preference":
            if generator.random() < 0.2:  # equal after max_length
                replies = {name: assistant("x" * 90 + name) for name in replies}
            rows.append({"prompt": prompt, **replies})
        else:
            rows.append(
                {"prompt": prompt, "completion": replies["chosen"], "label": index % 3 == 0}
            )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(map(json_line, rows)), encoding="utf-8")
    return path


def encode_one_by_one(encoder: ExampleEncoder, rows: Any, *, pairs: bool) -> list[Example]:
    """The examples of single rows, without a batch of texts."""
    return [e for row in rows for e, _ in encoder.encode([row], pairs) if isinstance(e, Example)]


@pytest.mark.parametrize("kind", ["sft", "preference", "label", "text"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("template", [CHATML, STRICT, THINKING, None])
def test_stored_examples_are_those_in_memory(tmp_path, kind, seed, template):
    tokenizer = chatml(template)
    specs = []
    for number in range(2):
        rows = rows_of(kind, 10 * seed + number, 40)
        path = write_lines(tmp_path / f"{number}.jsonl", rows)
        specs.append(DataSpec(str(path), weight=1.0 + 2 * number if seed == 2 else None))
    kind_of_rows = "sft" if kind == "text" else kind
    expected_rows = load(specs, kind_of_rows, seed=seed).rows
    preparation = DataPreparationSettings(tmp_path / "cache", 1)
    rows = load_stored(specs, kind_of_rows, seed=seed, preparation=preparation).rows
    pairs = kind == "preference"
    in_memory = ExampleEncoder(tokenizer, max_length=80)
    stored = ExampleEncoder(tokenizer, max_length=80)
    encode = CachingEncoder(stored, pairs=pairs)
    half = len(rows) * 4 // 5
    for part in (slice(0, half), slice(half, None)):
        try:
            expected = in_memory(expected_rows[part], pairs=pairs)
        except UserError:  # the strict template refuses system messages
            with pytest.raises(UserError, match=r"cannot render|System role not supported"):
                encode(rows[part])
            return
        found = encode(rows[part])
        assert list(found) == expected
        assert list(found[1:3]) == expected[1:3]
        assert found[-1] == expected[-1]
        one_by_one = ExampleEncoder(tokenizer, max_length=80)
        assert encode_one_by_one(one_by_one, expected_rows[part], pairs=pairs) == expected
    assert stored.truncated_and_dropped_counts == in_memory.truncated_and_dropped_counts
    assert stored.first_dropped == in_memory.first_dropped
    names = [name for name in stored.truncated_and_dropped_counts if name.startswith("dropped")]
    assert names == [
        name for name in in_memory.truncated_and_dropped_counts if name.startswith("dropped")
    ]


@pytest.mark.parametrize(
    "labels",
    [[], [IGNORED], [3], [IGNORED, 4, 5], [4, 5, IGNORED, IGNORED, 6], [IGNORED, 1, IGNORED]],
)
def test_runs_keep_the_labels(labels):
    ids = [index + 1 if label == IGNORED else label for index, label in enumerate(labels)]
    assert labels_from_run_lengths(ids, ignored_and_trained_run_lengths(labels)) == labels
    assert sum(ignored_and_trained_run_lengths(labels)) == len(labels)


def test_all_dropped_is_the_message_of_rows_in_memory(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", sft_rows(20))
    rows = load(DataSpec(str(path)), "sft", seed=0).rows
    stored = load_stored(
        DataSpec(str(path)),
        "sft",
        seed=0,
        preparation=DataPreparationSettings(tmp_path / "cache", 1),
    ).rows
    with pytest.raises(UserError) as first:
        ExampleEncoder(chatml(), max_length=2)(rows)
    with pytest.raises(UserError) as second:
        CachingEncoder(ExampleEncoder(chatml(), max_length=2), pairs=False)(stored)
    assert str(second.value) == str(first.value)
    assert "no example fits max_length=2" in str(first.value)


def count_entries(monkeypatch) -> list[Path]:
    built: list[Path] = []
    original = stored_examples._write_examples

    def write(folder, *arguments):
        built.append(folder)
        original(folder, *arguments)

    monkeypatch.setattr(stored_examples, "_write_examples", write)
    return built


PACKAGE = Path(stored_rows.__file__).parents[1]
WITHOUT_EFFECT = {
    *("common/names.py", "common/ranges.py", "common/text.py", "errors.py"),  # texts of errors
    # Plug-ins are loaded by these files. The files that add formats are part of the entry's key.
    *("common/plugins.py", "common/registry.py", "common/objects.py"),
    *("common/foreign.py", "common/signals.py"),
    *("common/columns.py", "common/numbers.py"),  # checks of the files of runs
    "common/worker_pool.py",
    "rollout/text_decoder.py",  # decodes replies
    "runs/checksums.py",
}
"""Files that are imported, but do not determine rows or examples."""


def imported_files(start: str) -> set[str]:
    """Return the files of the toolkit that a file imports, directly or through files of data."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in WITHOUT_EFFECT or name == "reward_models/core.py":  # only its constants are used
            continue
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf."):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = [f"{m.removeprefix('rlhf.').replace('.', '/')}.py" for m in modules if m]
                waiting += [file for file in files if (PACKAGE / file).is_file()]
    return found


@pytest.mark.parametrize(
    ("starts", "hash_function"),
    [
        (["data/row_blocks.py", "data/row_store.py"], stored_rows.canonical_row_code_hash),
        (["training/examples.py"], stored_examples._code_hash),
    ],
)
def test_every_file_that_determines_an_entry_is_part_of_its_hash(
    monkeypatch, starts, hash_function
):
    def hash_after_change_of(changed: Path | None) -> str:
        original = Path.read_bytes

        def digest(path: Path) -> str:
            text = original(path) + (b"# changed" if path == changed else b"")
            return hashlib.sha256(text).hexdigest()

        monkeypatch.setattr(stored_rows, "sha256_of", digest)
        monkeypatch.setattr(stored_examples, "sha256_of", digest)
        stored_rows.canonical_row_code_hash.cache_clear()
        stored_examples._code_hash.cache_clear()
        return hash_function()

    unchanged = hash_after_change_of(None)
    checked = set().union(*map(imported_files, starts)) - WITHOUT_EFFECT
    assert len(checked) > 7
    assert [n for n in sorted(checked) if hash_after_change_of(PACKAGE / n) == unchanged] == []
    monkeypatch.undo()
    stored_rows.canonical_row_code_hash.cache_clear()
    stored_examples._code_hash.cache_clear()


def test_what_changes_an_example_makes_a_new_entry(tmp_path, monkeypatch):
    built = count_entries(monkeypatch)
    path = write_lines(tmp_path / "a.jsonl", sft_rows(30))

    def encode(tokenizer, max_length=64, seed=0, stop_ids=(), limit=None):
        spec = DataSpec(str(path), limit=limit)
        rows = load_stored(
            spec, "sft", seed=seed, preparation=DataPreparationSettings(tmp_path / "cache", 1)
        ).rows
        encoder = ExampleEncoder(tokenizer, max_length=max_length, stop_ids=stop_ids)
        found = list(CachingEncoder(encoder, pairs=False)(rows))
        assert found == ExampleEncoder(tokenizer, max_length=max_length)(rows)
        return len(built)

    assert encode(chatml()) == 1
    assert encode(chatml()) == 1
    assert encode(chatml(), seed=5) == 1
    assert encode(chatml(), max_length=63) == 2
    assert encode(chatml(CHATML.replace("\n", " "))) == 3
    assert encode(chatml("{% set d = strftime_now('%Y') %}" + CHATML)) == 4
    monkeypatch.setattr(stored_examples, "_today", lambda: "2001-01-01")
    assert encode(chatml("{% set d = strftime_now('%Y') %}" + CHATML)) == 5
    assert encode(chatml()) == 5
    assert encode(chatml(), limit=3) == 6  # only a few rows of the store are used


@pytest.mark.parametrize(
    ("command", "rows"), [("sft", sft_rows), ("dpo", pair_rows), ("kto", label_rows)]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_training_is_bitwise_that_of_rows_in_memory(
    tmp_path, echo_model, monkeypatch, command, rows, seed
):
    data = [*rows(40), *rows(40)[:5], {"prompt": "", "completion": "x", "chosen": "a"}]
    paths = [write_rows(tmp_path / f"{i}.jsonl", data[i::2]) for i in range(2)]
    keys = {"data": [{"path": str(path)} for path in paths], "seed": seed, "max_length": 20}
    cache = {"data_cache": str(tmp_path / "cache"), "data_processes": 1}
    for name, minimum in (("memory", 2**40), ("stored", 0), ("again", 0)):
        monkeypatch.setattr(stored_rows, "MIN_BYTES", minimum)
        run_command(command, offline_tree(tmp_path / name, echo_model, paths[0], **cache) | keys)
        assert (tmp_path / "cache").exists() == (minimum == 0)
    for name in ("stored", "again"):
        assert metrics_of(tmp_path / name) == metrics_of(tmp_path / "memory")
        assert same(weights_of(tmp_path / name), weights_of(tmp_path / "memory"))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_eval_data_and_a_new_tokenizer_give_the_same_run(tmp_path, monkeypatch, command):
    rows = {"sft": sft_rows, "dpo": pair_rows}[command](40)
    data = write_rows(tmp_path / "data.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", rows[:12])
    scratch = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 64, "vocab_size": 300}
    for name, minimum in (("memory", 2**40), ("stored", 0)):
        monkeypatch.setattr(stored_rows, "MIN_BYTES", minimum)
        tree = offline_tree(tmp_path / name, tmp_path, data, eval_data=[{"path": str(held)}])
        tree |= {"model": {"scratch": scratch}, "data_cache": str(tmp_path / "cache")}
        run_command(command, tree | {"data_processes": 1})
    assert metrics_of(tmp_path / "stored") == metrics_of(tmp_path / "memory")
    assert same(weights_of(tmp_path / "stored"), weights_of(tmp_path / "memory"))


def test_worker_processes_give_the_same_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_examples, "ROWS_PER_PROCESS", 20)
    path = write_lines(tmp_path / "a.jsonl", rows_of("sft", 1, 60))
    preparation = DataPreparationSettings(tmp_path / "cache", 2)
    rows = load_stored(DataSpec(str(path)), "sft", seed=0, preparation=preparation).rows
    tokenizer = chatml()
    found = CachingEncoder(ExampleEncoder(tokenizer, max_length=60), pairs=False)(rows)
    assert list(found) == ExampleEncoder(tokenizer, max_length=60)(list(rows))


def test_a_tensor_of_a_stored_example_can_be_written(tmp_path):
    """The arrays of a mapped file are read-only, but examples are lists."""
    path = write_lines(tmp_path / "a.jsonl", sft_rows(5))
    preparation = DataPreparationSettings(tmp_path / "cache", 1)
    rows = load_stored(DataSpec(str(path)), "sft", seed=0, preparation=preparation).rows
    example = CachingEncoder(ExampleEncoder(chatml(), max_length=60), pairs=False)(rows)[0]
    tensor = torch.tensor(example.ids[0])
    tensor[0] = 1
    assert isinstance(example.ids[0], list)
