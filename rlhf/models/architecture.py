"""What a model's configuration says about how far its layers see and what they keep.

Layers of one model may differ: some attend to everything, some to a window, some keep a recurrent
state in place of keys and values. Packing, the sampler's cache and the usable context depend on it.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

# Context of a family that states none, such as a state-space model.
UNBOUNDED = 2**20

# Names under which families state the length of their positions.
LENGTHS = (
    "max_position_embeddings",
    "seq_length",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)

# Names under which families state how many tokens a layer sees, or chooses among.
WINDOW_NAMES = (
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

ATTENTION, STATE, BOTH, NOTHING = "attention", "state", "attention and state", "nothing"


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, with its adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> Any:
    """The decoder of a model, without its output head."""
    inner = unwrap_peft(model)
    return inner.model if inner.base_model is inner else inner.base_model


def context_of(model: Any) -> int:
    """Longest sequence that a model can read and continue, in tokens."""
    return usable_context(text_config(unwrap_peft(model)))


def text_config(model: Any) -> Any:
    """The configuration of the decoder of a transformers model."""
    return model.config.get_text_config()


def layers_kept(config: Any) -> list[tuple[str, int]] | None:
    """What each layer keeps of the tokens it has read, and how many states.

    Args:
        config: of the decoder.

    Returns:
        (ATTENTION, STATE, BOTH or NOTHING, states) by layer; None where the family's cache is of
        another form.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    kept: list[tuple[str, int]] = []
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            kind = BOTH if isinstance(layer, CacheLayerMixin) else STATE
            kept.append((kind, layer.number_of_states))
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            kept.append((ATTENTION, 0))
        elif type(layer) is DummyLayer:
            kept.append((NOTHING, 0))
        else:
            return None
    return kept


def has_states(config: Any) -> bool:
    """Whether a layer carries a recurrent state from token to token."""
    kept = layers_kept(config) or []
    kinds = getattr(config, "layer_types", None) or []
    return any(kind in (STATE, BOTH) for kind, _ in kept) or any(
        kind in ("linear_attention", "conv", "recurrent") for kind in kinds
    )


def window_of(config: Any) -> int | None:
    """Smallest number of tokens that a layer of windowed or chunked attention sees; None: all.

    Args:
        config: of the decoder.
    """
    windows = [inner_window(config)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or any("sliding" in kind for kind in kinds):
        windows.append(getattr(config, "sliding_window", None))
    if kinds is None or "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((window for window in windows if window), default=None)


def limits_of(config: Any) -> list[int]:
    """Numbers of tokens beyond which a row is read otherwise than below: windows, frequencies.

    Args:
        config: of the decoder.
    """
    kinds = " ".join(getattr(config, "layer_types", None) or ["sliding chunked"])
    absent = {
        name
        for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked"))
        if kind not in kinds
    }
    stated = [getattr(config, name, None) for name in WINDOW_NAMES if name not in absent]
    stated.append(rotary_limit(config))
    return sorted({n for n in stated if isinstance(n, int) and 0 < n < UNBOUNDED})


def inner_window(config: Any) -> int | None:
    """Window that a family's attention applies by columns, whatever mask it is handed."""
    if "local" in (getattr(config, "attention_layers", None) or []):  # GPT-Neo
        return config.window_size
    return None


def rotary_limit(config: Any) -> int | None:
    """Tokens from which on a row's rotary frequencies depend on its length; None: never.

    A longer row is read with other frequencies at all of its positions (LongRoPE, dynamic NTK).

    Args:
        config: of the decoder.
    """
    limits = []
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or whole_context(config))
        elif "dynamic" in kind:
            limits.append(whole_context(config))
    return min(limits, default=None)


def changing_limit(config: Any) -> int | None:
    """``rotary_limit`` where rows within the model's positions can pass it."""
    limit = rotary_limit(config)
    return limit if limit is not None and limit < whole_context(config) else None


def usable_context(config: Any) -> int:
    """Longest sequence that can be read and continued from its first token on, in tokens.

    Where rotary frequencies change with a row's length, a reply that grows beyond that length would
    be sampled with the first and trained on with the second: the context ends there. Only rows that
    begin beyond it reach ``whole_context``.

    Args:
        config: of the decoder.
    """
    return min(whole_context(config), rotary_limit(config) or UNBOUNDED)


def whole_context(config: Any) -> int:
    """Tokens for which the model has positions.

    Args:
        config: of the decoder.
    """
    stated = (getattr(config, name, None) for name in LENGTHS)
    return next((length for length in stated if isinstance(length, int) and length > 0), UNBOUNDED)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters: of the model, or of each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or [given]
