"""A small model with a large model's architecture, to verify computations quickly.

Some checks need sequences longer than the attention window. Others need float32 weights,
because the rounding errors of half precision would hide small errors. On a large model, such checks
would take too long. The small model runs the same code with few layers, windows of a few tokens and
random float32 weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from rlhf.models.architecture import WINDOW_KEYS, text_config, unwrap_peft
from rlhf.models.fast.varlen_attention import ATTENTION_NAME

# Attention window, rotary context and vocabulary size of the small model, and the maximum numbers
# of its experts and parameters.
WINDOW_TOKENS, ROTARY_CONTEXT, VOCABULARY, EXPERTS, MAX_PARAMS = 8, 16, 64, 8, 5e8

# Configuration key -> maximum value in the small model.
_MAX_CONFIG_VALUES = {
    **dict.fromkeys(WINDOW_KEYS, WINDOW_TOKENS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}


def small_random_model_like(model: Any, *, device: torch.device | None = None) -> Any | None:
    """Return a small random float32 model with the architecture of ``model``, in evaluation mode.

    The result is None if no model with a reduced configuration can be made and run, or if every
    such model has more than MAX_PARAMS parameters.

    Args:
        model: The model.
        device: Device of the small model. By default, it is the device of ``model``.
    """
    inner = unwrap_peft(model)
    device = inner.device if device is None else device
    try:
        for layers in (6, 4, 2):
            config = reduced_config(text_config(inner), max_layers=layers)
            with torch.device("meta"):
                size = sum(p.numel() for p in type(inner)(config).parameters())
            if size <= MAX_PARAMS:
                break
        else:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            small = type(inner)(config).float().eval()
            _scale_weights_by_input_size(small)
        small.to(device)
        with torch.no_grad():
            small(input_ids=torch.arange(2, 6, device=device)[None], use_cache=False)
    except Exception:  # with unusual sizes, model code can raise any exception
        return None
    return small


def reduced_config(config: Any, *, max_layers: int) -> Any:
    """Return a copy of a configuration with few layers, short windows and a small vocabulary.

    Args:
        config: Configuration of the large model's decoder.
        max_layers: Maximum number of layers (see ``_kept_layer_indices``).
    """
    small = copy.deepcopy(config)
    values = small.to_dict()
    layer_indices = _kept_layer_indices(values, config.num_hidden_layers, max_layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers > 1:
            setattr(small, name, [value[i] for i in layer_indices])
        elif not isinstance(value, int):
            continue
        elif name in _MAX_CONFIG_VALUES:
            setattr(small, name, min(value, _MAX_CONFIG_VALUES[name]))
        elif name.startswith("vocab_size"):
            setattr(small, name, VOCABULARY)
        elif name.endswith("_token_id"):
            setattr(small, name, value % VOCABULARY)
    small.num_hidden_layers = len(layer_indices)
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = ROTARY_CONTEXT
    if getattr(small, "original_max_position_embeddings", None):
        small.original_max_position_embeddings = ROTARY_CONTEXT
    attention = config._attn_implementation
    small._attn_implementation = "sdpa" if attention == ATTENTION_NAME else attention
    return small


def _kept_layer_indices(values: dict[str, Any], num_layers: int, max_layers: int) -> list[int]:
    """Return the indices of the layers to keep.

    The first layer of each kind is kept, for at most ``max_layers`` kinds. If this selects only one
    layer of a model with several layers, a second layer is also kept.
    """
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == num_layers]
    kinds: dict[str, int] = {}
    for i in range(num_layers):
        kinds.setdefault(str([each[i] for each in lists]), i)
    selected = list(kinds.values())[:max_layers]
    spare = [i for i in range(num_layers) if i not in selected]
    return sorted(selected + spare[: max(0, 2 - len(selected))])


@torch.no_grad()
def _scale_weights_by_input_size(model: Any) -> None:
    """Scale each weight matrix to a standard deviation of 1 / sqrt(input size).

    In a narrow model, the initial weights are smaller. With them, a layer would hardly change the
    output, so errors in the layer would not be detected.
    """
    for weight in model.parameters():
        if weight.dim() >= 2 and float(weight.std()) > 0:
            weight.mul_(weight.shape[-1] ** -0.5 / weight.std())
