"""A small model with a large model's architecture, to verify computations quickly.

Some checks need rows that are longer than the attention window, or float32 weights to detect errors
below the rounding errors of half precision. On a large model they would take too long. The small
model runs the same code with few layers, windows of a few tokens and random float32 weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from rlhf.models.architecture import WINDOW_KEYS, text_config, unwrap_peft
from rlhf.models.fast.varlen_attention import ATTENTION_NAME

# Configuration values of the small model.
WINDOW_TOKENS, ROTARY_CONTEXT, VOCABULARY, EXPERTS, MAX_PARAMS = 8, 16, 64, 8, 5e8

# Upper limits of configuration values of the small model.
_UPPER_LIMITS = {
    **dict.fromkeys(WINDOW_KEYS, WINDOW_TOKENS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}


def reduced_copy(model: Any) -> Any | None:
    """Return a small model with the architecture of ``model``, in evaluation mode.

    The result is None if the configuration cannot be reduced.
    """
    inner = unwrap_peft(model)
    try:
        for layers in (6, 4, 2):
            config = reduced_config(text_config(inner), layers=layers)
            with torch.device("meta"):
                size = sum(p.numel() for p in type(inner)(config).parameters())
            if size <= MAX_PARAMS:
                break
        else:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = type(inner)(config).float().eval()
            _scale_weights(small)
        small.to(inner.device)
        with torch.no_grad():
            small(input_ids=torch.arange(2, 6, device=inner.device)[None], use_cache=False)
    except Exception:  # families may fail in many ways with unusual sizes
        return None
    return small


def reduced_config(config: Any, *, layers: int) -> Any:
    """Reduce a configuration to few layers and short windows.

    Args:
        config: configuration of the large model's decoder.
        layers: maximum number of layers; the first layer of each kind is selected first.
    """
    small = copy.deepcopy(config)
    values = small.to_dict()
    kept = _kept_layers(values, config.num_hidden_layers, layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers > 1:
            setattr(small, name, [value[i] for i in kept])
        elif not isinstance(value, int):
            continue
        elif name in _UPPER_LIMITS:
            setattr(small, name, min(value, _UPPER_LIMITS[name]))
        elif name.startswith("vocab_size"):
            setattr(small, name, VOCABULARY)
        elif name.endswith("_token_id"):
            setattr(small, name, value % VOCABULARY)
    small.num_hidden_layers = len(kept)
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = ROTARY_CONTEXT
    if getattr(small, "original_max_position_embeddings", None):
        small.original_max_position_embeddings = ROTARY_CONTEXT
    attention = config._attn_implementation
    small._attn_implementation = "sdpa" if attention == ATTENTION_NAME else attention
    return small


def _kept_layers(values: dict[str, Any], count: int, max_layers: int) -> list[int]:
    """Return the indices of the layers to keep.

    They are the first layers of up to ``max_layers`` kinds. A model with at least two layers keeps
    at least two.
    """
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == count]
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([each[i] for each in lists]), i)
    selected = list(kinds.values())[:max_layers]
    spare = [i for i in range(count) if i not in selected]
    return sorted(selected + spare[: max(0, 2 - len(selected))])


@torch.no_grad()
def _scale_weights(model: Any) -> None:
    """Scale each weight matrix to a standard deviation of 1 / sqrt(its input size).

    With the smaller initial weights the layers hardly change the output, so errors in a layer would
    not be detected.
    """
    for weight in model.parameters():
        if weight.dim() >= 2 and float(weight.std()) > 0:
            weight.mul_(weight.shape[-1] ** -0.5 / weight.std())
