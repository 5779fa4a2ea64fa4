"""Write a model in training as a folder that transformers or PEFT opens, and read it back in place.

Of a PEFT model the adapters are written and a base that can be found (see ``adapters``), of any
other model all weights. Reading restores what was written to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from rlhf.errors import UserError
from rlhf.models.adapters import WEIGHTS_FILE, save_adapter
from rlhf.models.architecture import unwrap_peft


def save_model(model: Any, tokenizer: Any, folder: Path, *, base: Path | None = None) -> None:
    """Write a model and its tokenizer.

    Args:
        model: a transformers model, or a PEFT model around one.
        tokenizer: its tokenizer.
        folder: to write to.
        base: of a PEFT model: where a copy of the base lies or is to lie; None: inside ``folder``.
    """
    if unwrap_peft(model) is not model:
        save_adapter(model, tokenizer, folder, base=base)
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def restore_model(model: Any, folder: Path) -> None:
    """Read what ``save_model`` wrote into a model of the same form.

    Raises:
        UserError: the folder holds no model, or other weights than this one has.
    """
    names = ("config.json", "adapter_config.json")
    if not any((folder / name).exists() for name in names):
        raise UserError(
            f"{folder} holds no model: a checkpoint of an earlier version cannot be continued; "
            "start anew with --overwrite"
        )
    if unwrap_peft(model) is not model:
        found = set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE))
        if found.unexpected_keys:
            raise UserError(f"{folder} is a checkpoint of other adapters than the model has")
        return
    stored = _stored_weights(folder)
    parameters = dict(model.named_parameters())
    if not parameters.keys() <= stored.keys():  # families whose files name their weights otherwise
        wide = torch.promote_types(model.dtype, torch.float32)
        plain = type(model).from_pretrained(folder, dtype=wide)
        stored = dict(plain.named_parameters())
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def _stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's model files."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    return weights
