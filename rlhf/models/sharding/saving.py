"""Save a sharded model in the format in which Transformers saves an unsharded model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from rlhf.models.sharding.processes import has_sharded_parameters, this_process_writes
from rlhf.models.sharding.tensors import WholeTensors

# Names of dtypes in the header of a safetensors file.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_model(model: Any, folder: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the configuration and the weights of a Transformers model to a folder.

    If the model is sharded, every process must call this function. The first process writes, and
    every process holds one whole tensor at a time. For a model family whose weights have other
    names in files than in the model, the first process holds the whole model while it is saved.

    Args:
        model: The model.
        folder: The folder.
        weights: Name -> weight. By default, it is the state dict of the model.
    """
    if not has_sharded_parameters(model):
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        return
    tensors = WholeTensors(
        {
            name: tensor
            for name, tensor in (weights or model.state_dict(keep_vars=True)).items()
            if name not in (model._keys_to_ignore_on_save or ())
        }
    )
    writes = this_process_writes(model)
    if _saves_under_other_names(model, tensors):
        whole = {}
        for name, tensor in tensors.items():
            if writes:
                whole[name] = tensor.cpu()
        if writes:
            model.save_pretrained(folder, state_dict=whole)
        return
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", tensors, writes=writes)


def write_safetensors(path: Path, tensors: WholeTensors, *, writes: bool) -> None:
    """Write tensors to a safetensors file, one at a time.

    The format is described in https://github.com/huggingface/safetensors: the length of the header
    (8 bytes), the header (JSON), and the tensors one after another. The library itself needs all
    tensors at once.

    Args:
        path: The file.
        tensors: The tensors; every process must call this function with the same names.
        writes: Whether this process writes the file.
    """
    # In descending order of the item size, every tensor begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -tensors.dtype(name).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors.dtype(name), tensors.shape(name)
        start, end = end, end + dtype.itemsize * shape.numel()
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if writes else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            whole = tensors[name]
            if file is not None:
                data = whole.cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy().data)


def _saves_under_other_names(model: Any, tensors: WholeTensors) -> bool:
    """Return whether Transformers saves the weights of a model under other names."""
    shapes = {name: torch.empty(tensors.shape(name), device="meta") for name in tensors}
    return revert_weight_conversion(model, shapes).keys() != shapes.keys()
