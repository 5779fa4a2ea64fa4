"""Load a causal language model and its tokenizer, checked."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    get_peft_model,
)
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from reward_models.chat_template import set_chat_options
from reward_models.encoding import ensure_pad_token
from rlhf.errors import UserError
from rlhf.models.hub import resolve
from rlhf.models.logprobs import logits_of, trunk_of
from rlhf.models.precision import choose_dtype, default_device, use_threads
from rlhf.models.scratch import make_model, make_tokenizer
from rlhf.models.spec import LoraSpec, ModelSpec

log = logging.getLogger(__name__)

# Bars for the milliseconds of reading a file bury the one bar that matters.
hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()


def load_model(
    spec: ModelSpec, *, seed: int, texts: Iterable[str] = (), device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that a configuration names, in evaluation mode.

    Args:
        spec: where the model comes from, its dtype, and its adapters if any.
        seed: of random weights and adapters.
        texts: what the tokenizer of a model from scratch is trained on.
        device: defaults to the accelerator if there is one.

    Raises:
        UserError: the model cannot be had, or fails the check of its head and padding.
    """
    device = device or default_device()
    if spec.scratch:
        tokenizer = make_tokenizer(texts, spec.scratch.vocab_size)
        model: Any = make_model(spec.scratch, tokenizer, seed=seed)
    else:
        place = resolve(str(spec.path))
        tokenizer, model = load_tokenizer(place), load_weights(place)
    set_template_options(tokenizer, spec)
    give_pad_token(tokenizer, model)
    dtype = choose_dtype(spec.dtype, model.num_parameters(), device)
    model = model.to(device=device, dtype=dtype).eval()
    use_threads(model, device)
    check_model(model, tokenizer)
    if spec.lora:
        model = add_lora(model, spec.lora, seed=seed)
    size = model.num_parameters() / 1e6
    log.info(
        "model %s: %.1fM parameters, %s on %s", spec.path or "from scratch", size, dtype, device
    )
    return model, tokenizer


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {place}: {str(error).splitlines()[0]}") from error


def set_template_options(tokenizer: Any, spec: ModelSpec) -> None:
    """Give a tokenizer the chat template's options of a configuration; they are saved with it.

    Raises:
        UserError: an option has no effect on this template.
    """
    try:
        set_chat_options(tokenizer, kwargs=spec.chat_template_kwargs, fold_system=spec.fold_system)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_weights(place: str) -> PreTrainedModel:
    """A causal model in float32; an adapter folder is merged into its base model.

    Raises:
        UserError: the folder holds no causal language model.
    """
    try:
        if (Path(place) / "adapter_config.json").exists():
            merged = AutoPeftModelForCausalLM.from_pretrained(place, dtype=torch.float32)
            return merged.merge_and_unload()
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place} is not a causal language model: {reason}") from error


def give_pad_token(tokenizer: Any, model: PreTrainedModel) -> None:
    """Make sure that padding has a token of its own.

    With pad = EOS a mask made from token ids hides the end of the text, and a reward model cannot
    tell a finished reply from a cut one. A token that the vocabulary sets aside is used if there is
    one; otherwise one is added and the embedding grows by a row.
    """
    ensure_pad_token(tokenizer)
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):  # the new row is drawn
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:  # classifiers have none
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_lora(model: PreTrainedModel, spec: LoraSpec, *, seed: int) -> Any:
    """Wrap a model with fresh adapters; at step 0 they change nothing."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


# Task of an adapter -> the class that puts it on its base model; any other is a language model's.
CLASSIFIERS: dict[str, Any] = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
}


def merge_adapter(adapter: str, target: Path) -> Path:
    """Write a LoRA folder and its base model as one ordinary checkpoint.

    Raises:
        UserError: the folder holds no adapter, or the target exists.
    """
    if not (Path(adapter) / "adapter_config.json").exists():
        raise UserError(f"{adapter} holds no LoRA adapter (no adapter_config.json)")
    if target.exists():
        raise UserError(f"{target} exists already: choose another folder")
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    if auto := CLASSIFIERS.get(config.get("task_type")):
        outputs = _outputs_of(Path(adapter))
        model: Any = auto.from_pretrained(adapter, dtype=torch.float32, num_labels=outputs)
        model = model.merge_and_unload()
    else:
        model = load_weights(adapter)
    tokenizer = load_tokenizer(adapter)
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for extra in Path(adapter).glob("reward_model.json"):
        shutil.copy(extra, target)
    return target


def _outputs_of(adapter: Path) -> int:
    """Outputs of the head that a classifier's adapter carries.

    Raises:
        UserError: it carries none, so its head was never trained.
    """
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        heads = [
            weights.get_slice(key).get_shape()[0]
            for key in weights.keys()  # noqa: SIM118
            if key.endswith(".weight") and "lora" not in key and key.count(".layers.") == 0
        ]
    if not heads:
        raise UserError(f"{adapter} carries no head: it was trained without modules_to_save")
    return heads[-1]


@torch.no_grad()
def check_model(model: PreTrainedModel, tokenizer: Any) -> None:
    """Compare the logits of one text read three ways: whole, by trunk and head, and padded.

    Raises:
        UserError: the head has a form this toolkit does not know, or padding changes the scores.
    """
    ids = torch.tensor([list(range(5, 11))], device=model.device) % model.config.vocab_size
    whole = model(input_ids=ids).logits.float()
    ours = logits_of(model, trunk_of(model)(input_ids=ids).last_hidden_state).float()
    padded = torch.nn.functional.pad(ids, (0, 3), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    hidden = trunk_of(model)(input_ids=padded, attention_mask=mask).last_hidden_state
    with_padding = logits_of(model, hidden[:, : ids.shape[1]]).float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    scale = whole.abs().max().clamp(min=1.0)
    for name, logits in (("its output head", ours), ("padding", with_padding)):
        gap = ((logits - whole).abs().max() / scale).item()
        if not gap <= tolerance:
            raise UserError(
                f"{type(model).__name__} is not supported: {name} changes the logits by {gap:.1e} "
                f"of their size"
            )
