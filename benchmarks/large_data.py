"""Measure the time and the memory from the start of an SFT run on many rows to its first step.

    python -m benchmarks.large_data FOLDER [--rows 1000000] [--processes N] [--in-memory]

The program writes the rows and a model of 2.8 million parameters to FOLDER, and starts the run
twice, each time in a new process: first with an empty cache, then with the rows and examples of the
first start. With ``--in-memory``, the cache is not used. The memory is the peak of the resident
memory of the process of the run, which includes the mapped files, and the peak of the largest
worker process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HELD_OUT = 64
MODEL = {"hidden_size": 176, "num_layers": 4, "num_heads": 4, "context": 512, "vocab_size": 4096}
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


class Words:
    """Random words with the frequencies of natural text (Zipf), from a vocabulary of 30,000.

    Args:
        seed: Seed of the words; the vocabulary does not depend on it.
    """

    def __init__(self, seed: int) -> None:
        fixed = random.Random(0)
        self.vocabulary = [
            "".join(fixed.choices(_SYLLABLES, k=1 + int(fixed.expovariate(0.6))))
            for _ in range(30_000)
        ]
        self.cumulative = list(itertools.accumulate(1 / rank for rank in range(1, 30_001)))
        self.random = random.Random(seed)

    def text(self, count: int) -> str:
        """Return ``count`` words."""
        chosen = self.random.choices(self.vocabulary, cum_weights=self.cumulative, k=count)
        return " ".join(chosen)


def write_rows(path: Path, count: int, *, seed: int) -> None:
    """Write rows with a prompt and a completion; one in a thousand has no completion."""
    words = Words(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{words.text(words.random.randrange(8, 40))} {number}?"
            reply = words.text(words.random.randrange(10, 60)) if number % 1000 else ""
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"messages": turns, "id": number}) + "\n")


def write_model(folder: Path) -> None:
    """Write a model with random weights, and a tokenizer that is trained on similar rows."""
    from rlhf.config.model import ScratchSpec
    from rlhf.models.scratch import make_random_llama_model, make_tokenizer

    spec, words = ScratchSpec(**MODEL), Words(1)
    tokenizer = make_tokenizer([words.text(50) for _ in range(5000)], spec.vocab_size)
    make_random_llama_model(spec, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_to_first_step(folder: Path, settings: dict[str, Any]) -> None:
    """Run `rlhf sft` up to its first step, and print the seconds and the memory."""
    started = time.perf_counter()
    from rlhf.runs import launch

    launch.prepare_process()
    from rlhf.cli.table import configure
    from rlhf.runs.directory import Run
    from rlhf.training.offline import train_offline

    if settings.pop("in_memory"):
        settings.pop("data_cache")
        settings.pop("data_processes")
        try:
            from rlhf.data import stored_rows

            stored_rows.MIN_BYTES = 2**62
        except ImportError:  # a version without the cache
            pass

    class ExitAfterFirstStep(Run):
        def log(self, step: int, metrics: Any) -> None:
            if "train/loss" in metrics:
                own, workers = (
                    resource.getrusage(who).ru_maxrss / 2**20
                    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
                )
                result = {
                    "seconds": time.perf_counter() - started,
                    "gib": own,
                    "gib_of_a_worker": workers,
                    "loss": metrics["train/loss"],
                }
                print(json.dumps(result), flush=True)
                raise SystemExit

    config = configure("sft", settings)
    run = ExitAfterFirstStep(folder / "run")
    (run.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    train_offline("sft", config, run)


def main() -> None:
    """Write the inputs, start the run twice, and print a line for each start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.settings:
        run_to_first_step(options.folder, json.loads(options.settings))
        return
    data, held_out = options.folder / f"rows-{options.rows}.jsonl", options.folder / "held.jsonl"
    model, cache = options.folder / "model", options.folder / "cache"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        write_rows(data, options.rows, seed=0)
        write_rows(held_out, HELD_OUT, seed=1)
    if not model.exists():
        write_model(model)
    shutil.rmtree(cache, ignore_errors=True)
    settings = {
        "output_dir": str(options.folder / "run"),
        "model": {"path": str(model)},
        "data": [{"path": str(data)}],
        "eval_data": [{"path": str(held_out)}],
        "evaluations": 1,
        "batch_size": 16,
        "data_cache": str(cache),
        "data_processes": options.processes,
        "in_memory": options.in_memory,
        "trainer": {"max_steps": 20, "logging_steps": 1},
    }
    for name in ("first", "second"):
        command = [sys.executable, "-m", "benchmarks.large_data", str(options.folder)]
        result = subprocess.run(
            [*command, "--settings", json.dumps(settings)], stdout=subprocess.PIPE, check=True
        )
        measured = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{name} start: {measured['seconds']:.1f} s, "
            f"{1000 * measured['seconds'] / options.rows:.3f} ms per row, "
            f"{measured['gib']:.2f} GiB (largest worker {measured['gib_of_a_worker']:.2f} GiB), "
            f"loss of the first step {measured['loss']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
