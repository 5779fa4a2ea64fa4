"""Save a model during training as a folder of Transformers or PEFT, and restore it in place.

For a PEFT model, the adapters and a reference to their base model are saved (see ``adapters``). For
other models, all weights are saved. The restored weights are bit-identical to the saved ones. The
folder of a sharded model has the same files as that of other models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.models.adapters import is_adapter, load_adapter_weights, save_adapter
from rlhf.models.architecture import unwrap_peft
from rlhf.models.sharding.processes import this_process_writes
from rlhf.models.sharding.saving import write_model
from rlhf.models.sharding.tensors import (
    LoadedWeights,
    StoredWeights,
    copy_rows,
)


def save_model(model: Any, tokenizer: Any, folder: Path, *, base: Path | None = None) -> None:
    """Write a model and its tokenizer to a folder.

    Args:
        model: The model to save.
        tokenizer: Its tokenizer.
        folder: Folder to write to.
        base: For a PEFT model, the folder for a copy of the base model (see ``save_adapter``).

    If the model is sharded, every process must call this function, and the first one writes.
    """
    if unwrap_peft(model) is not model:
        save_adapter(model, tokenizer, folder, base=base)
        return
    write_model(model, folder)
    if this_process_writes(model):
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def restore_model(model: Any, folder: Path) -> None:
    """Load weights, written by ``save_model``, into a model of the same architecture, in place.

    Raises:
        UserError: The folder contains no model, or an adapter does not fit its base model.
        ValueError: Another weight is missing in the folder, or has another shape than in the model.
    """
    if not is_adapter(folder) and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} contains no model. A checkpoint of an earlier version of the toolkit cannot "
            "be resumed: start the run again with --overwrite"
        )
    if unwrap_peft(model) is not model:
        load_adapter_weights(model, folder)
        return
    parameters = dict(model.named_parameters())
    stored: StoredWeights | LoadedWeights = StoredWeights(folder)
    if not parameters.keys() <= stored.shapes.keys():
        # In some model families, the names in the files differ from those of the parameters.
        wide = torch.promote_types(model.dtype, torch.float32)
        stored = LoadedWeights(folder, type(model), wide)
    for name, parameter in parameters.items():
        copy_rows(parameter, stored, name)
