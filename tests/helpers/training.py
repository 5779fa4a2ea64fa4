"""Tiny models on disk, data, and configurations of short training runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.common.files import read_jsonl
from rlhf.config.model import ScratchSpec
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.runs.claim import (
    LOCK_FILES,
    MARKER,
    entries_written_by_toolkit,
    files_not_written_by_toolkit,
)
from rlhf.runs.diagnostics import TrainingMonitor, alarm_name

WORDS = ("apple", "river", "stone", "cloud")
PROMPTS = tuple(f"Repeat: {word}" for word in WORDS)
Tree = dict[str, Any]


def save_model(folder: Path, *, seed: int = 0, width: int = 16, sharp: float = 1.0) -> Path:
    """Save a Llama whose tokenizer has one token for each word, and return the folder.

    Args:
        folder: Created.
        seed: Seed of the weights.
        width: Hidden size.
        sharp: Factor of all matrices, so that replies differ.
    """
    system = "Repeat the word you are given, and nothing else."
    texts = [system, *PROMPTS, *WORDS] * 4
    tokenizer = make_tokenizer(texts, 400)
    spec = ScratchSpec(hidden_size=width, num_layers=2, num_heads=2, context=64)
    model = make_random_llama_model(spec, tokenizer, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(sharp)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Save a BERT with the same words, and return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    known = [*special, *WORDS, *map(str, range(70)), ":", "[", "]", "REPLY", "A", "B", "user"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **dict(zip(names, special, strict=True))
    )
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Tree]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Tree]:
    """JSON lines."""
    return read_jsonl(path)


def user(text: str) -> list[Tree]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Tree]:
    """A completion of one reply."""
    return [{"role": "assistant", "content": text}]


def no_score(conversations: list[Any]) -> list[None]:
    """A reward that scores nothing."""
    return [None] * len(conversations)


def sft_rows(count: int = 32) -> list[Tree]:
    """Different prompts with one word as reply."""
    return [
        {"prompt": user(f"{PROMPTS[i % 4]} {i}"), "completion": assistant(WORDS[(i + i // 4) % 4])}
        for i in range(count)
    ]


def pair_rows(count: int = 32) -> list[Tree]:
    """The right word is chosen, another is rejected."""
    return [
        {
            "prompt": user(f"{PROMPTS[i % 4]} {i}"),
            "chosen": assistant(WORDS[i % 4]),
            "rejected": assistant(WORDS[(i + 1 + i % 3) % 4]),
        }
        for i in range(count)
    ]


def label_rows(count: int = 32) -> list[Tree]:
    """Right words with the label True, wrong words with False."""
    return [
        {
            "prompt": user(f"{PROMPTS[i % 4]} {i}"),
            "completion": assistant(WORDS[(i + i // 4 % 2) % 4]),
            "label": i // 4 % 2 == 0,
        }
        for i in range(count)
    ]


def offline_tree(folder: Path, place: Path, data: Path, **keys: Any) -> Tree:
    """Configuration of an offline run of eight steps on 28 of 32 rows."""
    trainer = {"learning_rate": 1e-2, "max_steps": 8, **keys.pop("trainer", {})}
    return {
        "output_dir": str(folder),
        "model": {"path": str(place)},
        "data": [{"path": str(data)}],
        "max_length": 48,
        "batch_size": 8,
        "micro_batch_size": 4,
        "eval_fraction": 0.2,
        "evaluations": 4,
        "trainer": trainer,
    } | keys


def pairs_tree(
    tmp_path: Path, place: Path, *, rows: Any = None, name: str = "run", **keys: Any
) -> Tree:
    """Configuration of an offline run on pairs in ``tmp_path``."""
    data = write_rows(tmp_path / f"{name}.jsonl", pair_rows() if rows is None else rows)
    return offline_tree(tmp_path / name, place, data, **keys)


def evaluations(folder: Path, key: str = "eval/loss") -> dict[int, float]:
    """Step -> held-out loss of a run."""
    return {row["step"]: row[key] for row in metrics_of(folder) if key in row}


def online_tree(folder: Path, place: Path, **keys: Any) -> Tree:
    """Configuration of an online run of four steps of eight episodes on text/Echo-v0."""
    return {
        "output_dir": str(folder),
        "model": {"path": str(place)},
        "env": {"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        "rewards": [{"kind": "function", "path": "tests.helpers.training:judge"}],
        "rollout": {"max_new_tokens": 3},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"episodes": 4},
        "num_steps": 4,
        "episodes_per_step": 8,
        "save_every": 1,
    } | keys


def judge(conversations: Sequence[Sequence[Tree]]) -> list[float]:
    """A reward that differs between replies."""
    return [sum(talk[-1]["content"].encode()) % 7 / 7 for talk in conversations]


def metrics_of(folder: Path) -> list[Tree]:
    """Rows of ``metrics.jsonl`` without timings."""
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("time/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def first_alarm_steps(folder: Path) -> dict[str, int]:
    """Alarm -> first step at which the metrics of a finished run raise it."""
    assert (folder / "final").exists()  # the alarms did not halt the run
    monitor = TrainingMonitor(folder / "none", {})
    steps: dict[str, int] = {}
    for row in metrics_of(folder):
        monitor.update(row["step"], {key: row[key] for key in row.keys() - {"step"}})
        for kind in monitor.reported:
            steps.setdefault(alarm_name(kind), row["step"])
    return steps


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of ``final/``, including the critic."""
    return tensors_of(folder / "final")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    return found


def same(first: Any, second: Any) -> bool:
    """Whether two trees of tensors and Python values are exactly equal."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def checkpoint_of(folder: Path) -> Any:
    """The content of the last checkpoint of an online run."""
    steps = (folder / "checkpoints").glob("step-*")
    checkpoint = max(steps, key=lambda path: int(path.name.split("-")[1]))
    return {
        "weights": tensors_of(checkpoint),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "state": json.loads((checkpoint / "state.json").read_text()),
    }


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, critic, optimizer, controllers, metrics and transcripts are equal to the bit."""
    assert same(weights_of(first), weights_of(second))
    assert metrics_of(first) == metrics_of(second)
    assert same(checkpoint_of(first), checkpoint_of(second))
    assert read_rows(first / "samples.jsonl") == read_rows(second / "samples.jsonl")


def unknown_entries(root: Path) -> list[Path]:
    """Entries of run directories below a folder that ``--overwrite`` would not replace."""
    found = []
    for marker in root.rglob(MARKER):
        written = entries_written_by_toolkit(marker.parent)
        known = {*written, *(marker.parent / n for n in LOCK_FILES)}
        found += [path for path in marker.parent.iterdir() if path not in known]
        found += [path for entry in written for path in files_not_written_by_toolkit(entry)]
    return found
