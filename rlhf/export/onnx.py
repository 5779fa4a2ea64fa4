"""Convert an export to ONNX, and compare its logits in onnxruntime with those of PyTorch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf.common.files import remove
from rlhf.common.imports import check_extra_installed
from rlhf.errors import first_line

MAX_LOGIT_DIFFERENCE = 1e-4
"""Maximum absolute difference of logits."""
INPUT_SHAPES = ((2, 8), (1, 17), (3, 5))
"""Shapes [B, T] of the inputs for which the logits are compared. The first is used for tracing."""
FILE_NAME = "model.onnx"


class _LogitsModule(nn.Module):
    """Module that maps token ids and an attention mask to the logits of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def check_packages() -> None:
    """Raise UserError if a package of the extra ``onnx`` is not installed."""
    check_extra_installed("the key onnx", "onnx", "onnx", "onnxscript", "onnxruntime")


def write_onnx(folder: Path) -> str:
    """Write `model.onnx` into the folder of a language model, unless its logits differ.

    The file is a function of ``input_ids`` and ``attention_mask`` [B, T] that returns ``logits``
    [B, T, V], in float32. It is removed if the conversion fails, or if the logits at a position
    that is not padding differ from those of PyTorch by more than `MAX_LOGIT_DIFFERENCE`.

    Returns:
        A message for the user: the largest difference of logits, or why there is no file.
    """
    path = folder / FILE_NAME
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    module = _LogitsModule(model.eval())
    inputs = [_random_inputs(model.config.get_text_config().vocab_size, s) for s in INPUT_SHAPES]
    try:
        _write_onnx_file(module, inputs[0], path)
        differences = [_largest_logit_difference(module, each, path) for each in inputs]
        difference = float(np.max(differences))  # nan if one of them is nan, unlike max
    except Exception as error:  # the exporter and the runtime raise errors of many classes
        _remove_model_and_weights(path)
        reason = first_line(error) or type(error).__name__
        return f"ONNX was left out, because the conversion failed: {reason}"
    if not difference <= MAX_LOGIT_DIFFERENCE:
        _remove_model_and_weights(path)
        return (
            f"ONNX was left out: its logits in onnxruntime differ by {difference:.1e} from those "
            f"of PyTorch, more than {MAX_LOGIT_DIFFERENCE:.0e}"
        )
    return f"{FILE_NAME}: its logits in onnxruntime differ by at most {difference:.1e}"


def _random_inputs(vocab_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return token ids and a mask [B, T], in which the end of the first row is padding."""
    generator = torch.Generator().manual_seed(shape[1])
    ids = torch.randint(vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    if shape[0] > 1:
        mask[0, -2:] = 0
    return ids, mask


def _write_onnx_file(module: nn.Module, inputs: tuple[Tensor, Tensor], path: Path) -> None:
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn about their own functions
            torch.onnx.export(
                module,
                inputs,
                str(path),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _largest_logit_difference(
    module: nn.Module, inputs: tuple[Tensor, Tensor], path: Path
) -> float:
    """Return the largest absolute difference of logits at positions that are not padding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ("input_ids", "attention_mask")
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    (logits,) = session.run(["logits"], feed)
    expected = module(*inputs)[inputs[1].bool()].numpy()
    return float(np.abs(np.asarray(logits)[inputs[1].bool().numpy()] - expected).max())


def _remove_model_and_weights(path: Path) -> None:
    """Remove the file and the file with its external weights."""
    for file in (path, path.with_name(f"{path.name}.data")):
        remove(file)
