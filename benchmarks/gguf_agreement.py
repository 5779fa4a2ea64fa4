"""Compare the most probable next tokens of GGUF files in llama.cpp with those of Transformers.

    python -m benchmarks.gguf_agreement EXPORT TEXT [--positions 500]

EXPORT is a folder that `rlhf export` wrote with GGUF files. llama.cpp runs them in a virtual
environment of its own. TEXT is a text file. Its tokens are divided into windows, and the models
predict the next token after each token of a window. The result is one line for each file: the share
of positions with the same most probable token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 100
"""Number of tokens of a window."""


def main() -> None:
    """Print the agreement of every GGUF file in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=500)
    parser.add_argument("--python", help="interpreter of an environment with llama-cpp-python")
    arguments = parser.parse_args()
    python = arguments.python
    if python is None:
        from benchmarks.venvs import ensure_venv_python

        python = ensure_venv_python("llama")
    windows, expected = reference(arguments.export, arguments.text, arguments.positions)
    for path in sorted(arguments.export.glob("*.gguf")):
        found = llama_cpp_tokens(python, path, windows)
        share = float(np.mean(np.array(found) == np.array(expected)))
        print(f"{path.name}: {share:.2%} of {len(expected)} top tokens agree")


def reference(folder: Path, text: Path, positions: int) -> tuple[list[list[int]], list[int]]:
    """Return windows of token ids, and the most probable next token after each of their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < positions:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {positions}")
    windows = [ids[i : min(i + WINDOW, positions)] for i in range(0, positions, WINDOW)]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([window])).logits[0] for window in windows]
    return windows, torch.cat(logits).argmax(-1).tolist()


def llama_cpp_tokens(python: str, path: Path, windows: list[list[int]]) -> list[int]:
    """Return the most probable next token after each token of the windows, from llama.cpp."""
    result = subprocess.run(
        [python, "-c", LLAMA_CPP_PROGRAM, str(path), str(WINDOW)],
        input=json.dumps(windows),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


LLAMA_CPP_PROGRAM = """
import json, sys
import numpy as np
from llama_cpp import Llama

options = {"n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
model = Llama(sys.argv[1], n_ctx=int(sys.argv[2]), **options)
tokens = []
for window in json.load(sys.stdin):
    model.reset()
    model.eval(window)
    tokens += np.asarray(model.scores[: len(window)]).argmax(-1).tolist()
print(json.dumps(tokens))
"""
"""Program that reads windows of token ids and prints the most probable next tokens.

One thread is used, because several threads wait for each other on a machine with other load."""


if __name__ == "__main__":
    main()
