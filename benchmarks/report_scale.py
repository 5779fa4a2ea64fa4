"""Measure time, memory and page size of the report of a run with 100,000 steps and samples."""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
from pathlib import Path

from rlhf.reports import write_report

STEPS = SAMPLES = 100_000
HELD_OUT = 64
TOKENS = 60
METRICS = [
    "reward/mean",
    "reward/std",
    "reward/a",
    "reward/b",
    "reward/unscored",
    "policy/kl",
    "policy/entropy",
    "policy/loss",
    "policy/clip_fraction",
    "policy/ratio_max",
    "policy/approx_kl",
    "rollout/tokens",
    "rollout/turns",
    "rollout/length_limited",
    "rollout/missing_eos",
    "rollout/invalid",
    "rollout/truncated",
    "train/grad_norm",
    "train/learning_rate",
    "train/updates",
    "kl/coef",
    "value/loss",
    "value/mean",
    "value/explained_variance",
    "time/rollout",
    "time/reward",
    "time/update",
    "sampler/logprob_diff_abs",
    "eval/return",
    "eval/loss",
]
QUANTITIES = ("advantage", "reward", "kl", "entropy", "value")


def write_run(root: Path, steps: int, samples: int) -> None:
    """Write the logs of a run with random values; every training sample has data of its tokens."""
    rng = random.Random(0)
    (root / "config.yaml").write_text("command: ppo\n")
    with (root / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "time": step / 2, **{key: rng.random() for key in METRICS}}
            file.write(json.dumps(row) + "\n")
    with (root / "samples.jsonl").open("w") as file:
        for index in range(samples):
            file.write(json.dumps(_random_sample_row(index, steps, samples, rng)) + "\n")


def _random_sample_row(
    index: int, steps: int, samples: int, rng: random.Random
) -> dict[str, object]:
    """Return the row ``index`` of samples.jsonl, with random values."""
    after = index - (samples - HELD_OUT)
    split = "before" if index < HELD_OUT else "after" if after >= 0 else "train"
    row: dict[str, object] = {
        "step": 1 + index * steps // samples,
        "split": split,
        "seed": after if after >= 0 else index,
        "messages": [
            {"role": "user", "content": f"Question {index}? " + "word " * 40},
            {"role": "assistant", "content": "answer " * TOKENS},
        ],
        "score": rng.random(),
    }
    if split == "train":
        columns = {key: [round(rng.random(), 4) for _ in range(TOKENS)] for key in QUANTITIES}
        row["tokens"] = {"text": ["answer "] * TOKENS, "turn": [0] * TOKENS, **columns}
    return row


def main() -> None:
    """Write the report, and print the seconds, the peak memory and the size of the page."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_run(root, STEPS, SAMPLES)
        start = time.perf_counter()
        page = write_report(root)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{seconds:.1f} s, peak {peak:.2f} GiB, page {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
