"""Parts of a model, and properties that follow from its configuration, such as windows and caches.

The layers of one model may differ: some have full attention, some have a sliding window, and some
have a recurrent state instead of keys and values. Packing, the cache of the sampler and the context
length depend on the kinds of layers. An argument ``config`` is the configuration of the decoder,
which ``text_config`` returns.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rlhf.errors import UserError

# Context length, in tokens, of models without a limit in the configuration (state-space models).
UNLIMITED_CONTEXT = 2**20

# Configuration keys of the maximum sequence length.
MAX_LENGTH_KEYS = (
    "max_position_embeddings",
    "seq_length",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)

# Configuration keys of the number of tokens that a layer attends to, by a window or by selection.
WINDOW_KEYS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "local_attn_chunk_length",
    "index_topk",
    "indexer_budget",
)

# Kinds of layer caches: keys and values, recurrent states, both of them, or no cache.
ATTENTION, STATE, BOTH, NOTHING = "attention", "state", "attention and state", "nothing"


def unwrap_peft(model: Any) -> Any:
    """Return the Transformers model in a PEFT wrapper, with its adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_adapter_weight(name: str) -> bool:
    """Return whether a parameter name belongs to an adapter or to PEFT's ``modules_to_save``."""
    return "lora_" in name or ".modules_to_save." in name


def trunk_of(model: Any) -> Any:
    """Return the decoder of a model, without its output head."""
    inner = unwrap_peft(model)
    return inner.model if inner.base_model is inner else inner.base_model


def blocks_of(trunk: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a decoder.

    Raises:
        UserError: The decoder has no list of blocks.
    """

    def num_weights(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(
            f"{type(trunk).__name__} has no list of transformer blocks: remove "
            "activation_checkpointing and sharding"
        )
    return list(max(lists, key=num_weights))


def context_length_of(model: Any) -> int:
    """Return the usable context length of a model, in tokens (see ``usable_context_length``)."""
    return usable_context_length(text_config(unwrap_peft(model)))


def text_config(model: Any) -> Any:
    """Return the configuration of the decoder of a Transformers model without a PEFT wrapper."""
    return model.config.get_text_config()


def cache_kinds_and_state_counts(config: Any) -> list[tuple[str, int]] | None:
    """Return the kind of cache and the number of recurrent states of each layer.

    Returns:
        One pair per layer: the kind (ATTENTION, STATE, BOTH or NOTHING) and the number of recurrent
        states. The result is None if the cache of a layer is of any other class, or if Transformers
        cannot make a cache from the configuration.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    caches: list[tuple[str, int]] = []
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            kind = BOTH if isinstance(layer, CacheLayerMixin) else STATE
            caches.append((kind, layer.number_of_states))
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            caches.append((ATTENTION, 0))
        elif type(layer) is DummyLayer:
            caches.append((NOTHING, 0))
        else:
            return None
    return caches


def has_recurrent_states(config: Any) -> bool:
    """Return whether at least one layer has a recurrent state."""
    caches = cache_kinds_and_state_counts(config) or []
    kinds = getattr(config, "layer_types", None) or []
    return any(kind in (STATE, BOTH) for kind, _ in caches) or any(
        kind in ("linear_attention", "conv", "recurrent") for kind in kinds
    )


def smallest_attention_window(config: Any) -> int | None:
    """Return the smallest sliding, chunked or local attention window, in tokens, or None."""
    windows = [window_in_addition_to_mask(config)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or any("sliding" in kind for kind in kinds):
        windows.append(getattr(config, "sliding_window", None))
    if kinds is None or "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((window for window in windows if window), default=None)


def computation_change_lengths(config: Any) -> list[int]:
    """Return the row lengths at which the computation of a model changes, in tokens, ascending.

    These lengths are the attention windows and the ``rotary_change_length``. For example, a layer
    with a window of n tokens ignores some of the earlier tokens only in rows longer than n.
    """
    kinds = " ".join(getattr(config, "layer_types", None) or ["sliding chunked"])
    unused = {
        name
        for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked"))
        if kind not in kinds
    }
    limits = [getattr(config, name, None) for name in WINDOW_KEYS if name not in unused]
    limits.append(rotary_change_length(config))
    return sorted({n for n in limits if isinstance(n, int) and 0 < n < UNLIMITED_CONTEXT})


def window_in_addition_to_mask(config: Any) -> int | None:
    """Return the window, in tokens, that a model applies in addition to its mask, or None."""
    if "local" in (getattr(config, "attention_layers", None) or []):  # GPT-Neo
        return config.window_size
    return None


def rotary_change_length(config: Any) -> int | None:
    """Return the row length, in tokens, beyond which rotary frequencies change, or None.

    In a longer row, the frequencies of all positions are different (LongRoPE, dynamic NTK).
    """
    limits = []
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            limits.append(
                rope.get("original_max_position_embeddings") or configured_context_length(config)
            )
        elif "dynamic" in kind:
            limits.append(configured_context_length(config))
    return min(limits, default=None)


def rotary_change_length_within_context(config: Any) -> int | None:
    """Return ``rotary_change_length`` if it is less than the configured context length, or None."""
    limit = rotary_change_length(config)
    return limit if limit is not None and limit < configured_context_length(config) else None


def original_rotary_contexts(config: Any) -> list[int]:
    """Return the context lengths, in tokens, for which rotary frequencies were scaled.

    Some models scale the queries at later positions.
    """
    lengths = (r.get("original_max_position_embeddings") for r in _rope_parameters(config))
    return [length for length in lengths if length]


def usable_context_length(config: Any) -> int:
    """Return the maximum length, in tokens, of a row that is sampled token by token.

    This length is at most ``rotary_change_length``. A reply that crosses that length would be
    sampled with some rotary frequencies and trained on with others. A row whose prompt is already
    longer may have up to ``configured_context_length`` tokens.
    """
    return min(configured_context_length(config), rotary_change_length(config) or UNLIMITED_CONTEXT)


def configured_context_length(config: Any) -> int:
    """Return the maximum sequence length in the configuration, in tokens.

    The result is UNLIMITED_CONTEXT if the configuration has no maximum.
    """
    lengths = (getattr(config, name, None) for name in MAX_LENGTH_KEYS)
    return next(
        (length for length in lengths if isinstance(length, int) and length > 0), UNLIMITED_CONTEXT
    )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of each kind of layer, or one dictionary for all layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    values = parameters.values()
    nested = [value for value in values if isinstance(value, dict) and "rope_type" in value]
    return nested or [parameters]
