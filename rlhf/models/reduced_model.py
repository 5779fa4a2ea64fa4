"""A small model of a large one's architecture: few layers, short windows, random float32 weights.

What an architecture computes beyond its windows, and below the rounding of half precision, cannot
be tried on a large model in a second. On a few layers of each kind with windows of a few tokens it
can: the code that runs is the same.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from rlhf.models.architecture import WINDOW_NAMES, text_config, unwrap_peft

# Windows, rotary contexts, vocabulary and experts of the small model, and its weights at most.
WINDOW, ORIGINAL, VOCABULARY, EXPERTS, WEIGHTS = 8, 16, 64, 8, 5e8

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def reduced_copy(model: Any) -> Any | None:
    """The small model, in evaluation mode; None where its configuration cannot be reduced."""
    inner = unwrap_peft(model)
    try:
        for layers in (6, 4, 2):
            config = reduced_config(text_config(inner), layers=layers)
            with torch.device("meta"):
                size = sum(p.numel() for p in type(inner)(config).parameters())
            if size <= WEIGHTS:
                break
        else:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = type(inner)(config).float().eval()
            _spread(small)
        small.to(inner.device)
        with torch.no_grad():
            small(input_ids=torch.arange(2, 6, device=inner.device)[None], use_cache=False)
    except Exception:  # whatever a family makes of numbers that it has never seen
        return None
    return small


def reduced_config(config: Any, *, layers: int) -> Any:
    """A configuration of the same architecture with few layers and short windows.

    Args:
        config: of the large model's decoder.
        layers: how many to keep at most, one of each kind first.
    """
    small = copy.deepcopy(config)
    values = small.to_dict()
    kept = _kept_layers(values, config.num_hidden_layers, layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers > 1:
            setattr(small, name, [value[i] for i in kept])
        elif name in WINDOW_NAMES and isinstance(value, int) and value > WINDOW:
            setattr(small, name, WINDOW)
        elif name in _EXPERTS and isinstance(value, int) and value > EXPERTS:
            setattr(small, name, EXPERTS)
        elif name in _CHOSEN and isinstance(value, int) and value > 2:
            setattr(small, name, 2)
        elif name in ("n_group", "topk_group") and isinstance(value, int):
            setattr(small, name, 1)
        elif name.startswith("vocab_size") and isinstance(value, int):
            setattr(small, name, VOCABULARY)
        elif name.endswith("_token_id") and isinstance(value, int):
            setattr(small, name, value % VOCABULARY)
    small.num_hidden_layers = len(kept)
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if getattr(small, "original_max_position_embeddings", None):
        small.original_max_position_embeddings = ORIGINAL
    small._attn_implementation = (
        "sdpa" if config._attn_implementation == "packed" else (config._attn_implementation)
    )
    return small


def _kept_layers(values: dict[str, Any], count: int, most: int) -> list[int]:
    """One layer of every kind, in order, and two at least."""
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == count]
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([each[i] for each in lists]), i)
    chosen = list(kinds.values())[:most]
    spare = [i for i in range(count) if i not in chosen]
    return sorted(chosen + spare[: max(0, 2 - len(chosen))])


@torch.no_grad()
def _spread(model: Any) -> None:
    """Weights as large as trained ones: first weights are so small that layers hardly act."""
    for weight in model.parameters():
        if weight.dim() >= 2 and float(weight.std()) > 0:
            weight.mul_(weight.shape[-1] ** -0.5 / weight.std())
