"""Measure the memory of a training run in one process and sharded over two processes.

    python -m benchmarks.sharding

Each side is a whole run of `rlhf sft` with a model from scratch, from loading to the saved model.
The memory of a process is its peak resident memory above that of a process that only imports the
toolkit. The two sides alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.activation_checkpointing import MIB, peak_memory
from benchmarks.paths import ROOT

HIDDEN, LAYERS, HEADS = 1024, 19, 16
STEPS = 3


def train(folder: Path, sharding: str) -> None:
    """Import the toolkit, and train a model unless ``sharding`` is "import".

    The peak resident memory of this process is printed, in bytes.
    """
    from rlhf.cli.main import main
    from rlhf.training import offline  # noqa: F401
    from rlhf.training.reward_models import new_head  # noqa: F401

    if sharding != "import":
        path = folder / "sft.yaml"
        arguments = ["sft", "--config", str(path), "--output_dir", str(folder / "run")]
        if code := main(arguments):
            raise SystemExit(code)
    print(json.dumps({"peak": peak_memory()}), flush=True)


def training_config(folder: Path, sharding: str) -> dict[str, Any]:
    """Return the configuration of a run, as an object of JSON."""
    return {
        "output_dir": str(folder / "run"),
        "model": {
            "scratch": {
                "hidden_size": HIDDEN,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "vocab_size": 2048,
            },
            "dtype": "float32",
        },
        "data": [{"path": str(folder / "rows.jsonl")}],
        "max_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "evaluations": 1,
        "keep_last": 1,
        "trainer": {"max_steps": STEPS},
        "sharding": sharding,
    }


def measure(sharding: str, *, processes: int) -> list[int]:
    """Return the peak resident memory of each process of a run, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ("apple", "river", "stone", "cloud", "light")
        rows = [{"text": " ".join(words[(i + j) % 5] for j in range(12))} for i in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "sft.yaml").write_text(json.dumps(training_config(folder, sharding)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"WORLD_SIZE": str(processes)}
        command = [sys.executable, "-m", "benchmarks.sharding", "--side", sharding, str(folder)]
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit("a run failed; its messages are above")
        return [json.loads(text.splitlines()[-1])["peak"] for text in outputs]


def main() -> None:
    """Parse the command line, and measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2, help="number of runs of each side")
    parser.add_argument("--side", nargs=2, metavar=("SHARDING", "FOLDER"), help="train one side")
    options = parser.parse_args()
    if options.side:
        train(Path(options.side[1]), options.side[0])
        return
    (imported,) = measure("import", processes=1)
    print(f"a process that imports the toolkit: {imported / MIB:.0f} MiB")
    ratios = []
    for _ in range(options.pairs):
        (one,) = measure("none", processes=1)
        two = measure("fsdp", processes=2)
        ratios.append((max(two) - imported) / (one - imported))
        texts = [f"{(peak - imported) / MIB:.0f} MiB" for peak in (one, *two)]
        print(f"above it: one process {texts[0]}; two processes {texts[1]} and {texts[2]}")
    print(f"ratio of the larger process: {statistics.median(ratios):.2f} (median of {len(ratios)})")


if __name__ == "__main__":
    main()
