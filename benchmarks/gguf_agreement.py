"""Compare the most probable next tokens of GGUF files in llama.cpp with those of Transformers.

    python -m benchmarks.gguf_agreement EXPORT TEXT [--positions 500]

EXPORT is a folder that `rlhf export` wrote with GGUF files; the package `llama-cpp-python` runs
them. TEXT is a text file. Its tokens are divided into windows, and the models predict the next token
after each token of a window. The result is one line for each file: the share of positions with the
same most probable token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

WINDOW = 100
"""Number of tokens of a window."""


def main() -> None:
    """Print the agreement of every GGUF file in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=500)
    arguments = parser.parse_args()
    windows, expected = reference(arguments.export, arguments.text, arguments.positions)
    for path in sorted(arguments.export.glob("*.gguf")):
        found = llama_cpp_tokens(path, windows)
        share = float(np.mean(np.concatenate(found) == np.concatenate(expected)))
        print(f"{path.name}: {share:.2%} of {sum(map(len, expected))} top tokens agree")


def reference(folder: Path, text: Path, positions: int) -> tuple[list[list[int]], list[Any]]:
    """Return windows of token ids, and the most probable next token after each token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < positions:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {positions}")
    windows = [ids[i : min(i + WINDOW, positions)] for i in range(0, positions, WINDOW)]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([window])).logits[0] for window in windows]
    return windows, [scores.argmax(-1).numpy() for scores in logits]


def llama_cpp_tokens(path: Path, windows: list[list[int]]) -> list[Any]:
    """Return the most probable next token after each token of the windows, from llama.cpp."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=WINDOW, logits_all=True, verbose=False)
    tokens = []
    for window in windows:
        model.reset()
        model.eval(window)
        tokens.append(np.asarray(model.scores[: len(window)]).argmax(-1))
    return tokens


if __name__ == "__main__":
    main()
