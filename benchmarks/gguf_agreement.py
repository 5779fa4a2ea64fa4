"""Compare the most probable next tokens of GGUF files in llama.cpp with those of Transformers.

    python -m benchmarks.gguf_agreement EXPORT TEXT [TEXT ...]

EXPORT is a folder that `rlhf export` wrote with GGUF files. llama.cpp runs them in a virtual
environment of its own. A TEXT is a text file, or a JSONL file of SFT data, each row of which is a
text: a conversation in the chat template of the export.

Of every text, the first `--tokens` tokens are used; shorter texts are omitted. The models predict
the next token after each of these tokens. A position agrees if the most probable next token is
that of Transformers with the exported weights in float32. Three measures are computed for each
file:

* the share of agreeing positions in llama.cpp. Its 95% interval is over texts, because the
  positions of a text are not independent;
* the same for Transformers in float32 with the dequantized weights of the file. This share shows
  the effect of the rounded weights alone: llama.cpp also rounds activations and the KV cache;
* the share of the disagreeing positions of llama.cpp at which the reference has two almost equally
  probable tokens, that is, their logits differ by less than `CLOSE`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.stats import Interval, interval

CLOSE = 0.05
"""Largest difference of the two largest logits of almost equally probable tokens."""


@dataclass(frozen=True)
class Predictions:
    """The most probable next token after each token of some texts."""

    tokens: np.ndarray
    """Ids of the tokens, [texts, tokens]."""
    gaps: np.ndarray
    """Difference of the two largest logits, [texts, tokens]."""


def main() -> None:
    """Print the agreement of every GGUF file in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=128, help="number of tokens of a text")
    parser.add_argument("--python", help="interpreter of an environment with llama-cpp-python")
    arguments = parser.parse_args()
    python = arguments.python
    if python is None:
        from benchmarks.venvs import ensure_venv_python

        python = ensure_venv_python("llama")
    windows = read_windows(arguments.export, arguments.texts, arguments.tokens)
    expected = transformers_predictions(arguments.export, windows)
    for path in sorted(arguments.export.glob("*.gguf")):
        found = llama_cpp_tokens(python, path, windows)
        dequantized = transformers_predictions(arguments.export, windows, gguf_file=path.name)
        row = compare(expected, found, dequantized.tokens)
        print(json.dumps({"file": path.name, **row}), flush=True)


def compare(
    expected: Predictions, llama_cpp: np.ndarray, dequantized: np.ndarray
) -> dict[str, Any]:
    """Return the measures of a file.

    Args:
        expected: Predictions of the exported weights in float32.
        llama_cpp: Tokens that llama.cpp predicts with the file, [texts, tokens].
        dequantized: Tokens that Transformers predicts with the weights of the file.
    """
    differs = llama_cpp != expected.tokens
    return {
        "texts": len(differs),
        "positions": differs.size,
        "llama.cpp": agreement(llama_cpp, expected.tokens).as_dict(),
        "dequantized": agreement(dequantized, expected.tokens).as_dict(),
        "llama.cpp and dequantized": agreement(llama_cpp, dequantized).as_dict(),
        "disagreements": int(differs.sum()),
        "close": int((expected.gaps[differs] < CLOSE).sum()),
        "positions with close logits": int((expected.gaps < CLOSE).sum()),
    }


def agreement(found: np.ndarray, expected: np.ndarray) -> Interval:
    """Return the share of equal tokens, with its interval over texts."""
    return interval((found == expected).mean(axis=1), bounds=(0.0, 1.0))


def read_windows(folder: Path, files: Sequence[Path], size: int) -> list[list[int]]:
    """Return the first ``size`` token ids of each text that has as many."""
    from transformers import AutoTokenizer

    from rlhf.rollout.chat_format import ChatFormat

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat_format = ChatFormat(tokenizer)
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"][:size]
        for file in files
        for text in read_texts(file, chat_format)
    ]
    windows = [row for row in rows if len(row) == size]
    if not windows:
        raise SystemExit(f"no text has {size} tokens")
    return windows


def read_texts(file: Path, chat_format: Any) -> list[str]:
    """Return the conversations of a JSONL file as texts, or the text of another file."""
    from rlhf.data import DataSpec, load

    if file.suffix != ".jsonl":
        return [file.read_text(encoding="utf-8")]
    rows = load(DataSpec(str(file)), "sft", seed=0).rows
    return [chat_format.render([*row["prompt"], *row["completion"]]) for row in rows]


def transformers_predictions(
    folder: Path, windows: Sequence[Sequence[int]], *, gguf_file: str | None = None
) -> Predictions:
    """Return the predictions of Transformers in float32.

    Args:
        folder: Folder of the export.
        windows: Token ids of each text.
        gguf_file: File in the folder whose dequantized weights replace those of the export.
            Transformers dequantizes them with the package `gguf`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokens, gaps = [], []
    with torch.no_grad():
        for window in windows:
            top = model.eval()(torch.tensor([window])).logits[0].topk(2)
            tokens.append(top.indices[:, 0].numpy())
            gaps.append((top.values[:, 0] - top.values[:, 1]).numpy())
    return Predictions(np.stack(tokens), np.stack(gaps))


def llama_cpp_tokens(python: str, path: Path, windows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the most probable next token after each token of the windows, from llama.cpp."""
    result = subprocess.run(
        [python, "-c", LLAMA_CPP_PROGRAM, str(path), str(len(windows[0]))],
        input=json.dumps(windows),
        capture_output=True,
        text=True,
        check=True,
    )
    return np.array(json.loads(result.stdout.splitlines()[-1]))


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
    tokens.append(np.asarray(model.scores[: len(window)]).argmax(-1).tolist())
print(json.dumps(tokens))
"""
"""Program that reads windows of token ids and prints the most probable next tokens.

One thread is used, because several threads wait for each other on a machine with other load."""


if __name__ == "__main__":
    main()
