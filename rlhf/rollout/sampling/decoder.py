"""Decoders, which compute forward passes over a cache with rows of different lengths.

A decoding step multiplies few rows by every weight matrix, so most of its time is spent on reading
weights and launching operations. For model families like Llama, this module computes the layers
itself and combines the projections of the same input into one matmul. For other families, it calls
the model's own forward pass. The combined layers are compared with the model's own forward pass
once per model.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention

from rlhf.errors import first_line
from rlhf.models.architecture import (
    cache_kinds_and_state_counts,
    has_recurrent_states,
    rotary_change_length_within_context,
    smallest_attention_window,
    text_config,
    trunk_of,
    unwrap_peft,
    window_in_addition_to_mask,
)
from rlhf.models.output_head import logits_of
from rlhf.models.precision import has_native_bf16
from rlhf.models.reduced_model import reduced_config
from rlhf.rollout.sampling.decoder_selection import (
    TOLERANCE,
    UNSUPPORTED_ERRORS,
    DecoderOption,
    decoder_logit_difference,
    select_decoder_index,
)
from rlhf.rollout.sampling.kv_cache import ForwardPlan, RaggedCache, RaggedLayer
from rlhf.rollout.sampling.protocols import Decoder
from rlhf.rollout.sampling.ragged_masks import ADDITIVE_MASK_ATTENTION, ragged_masks
from rlhf.rollout.sampling.row_decoder import RowDecoder
from rlhf.rollout.sampling.time_step_limits import clamped_time_steps, mixers_with_time_step_limits

log = logging.getLogger(__name__)

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Projection = Callable[[torch.Tensor], torch.Tensor]

# Trunk of a model -> whether the fused decoder agrees with the model.
_fused_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Trunk of a model -> index of the selected decoder in ``unfused_decoder_options``.
_selected: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class PaddedBatchDecoder:
    """Calls the model's own forward pass on a batch of rows, padded on the right.

    Args:
        model: Causal model.
        stepwise: Whether new tokens of a row with a recurrent state are passed one by one.

    Raises:
        ValueError: The family's cache or attention does not support rows of different lengths.
    """

    def __init__(self, model: Any, *, stepwise: bool = False) -> None:
        self.model, self.stepwise = model, stepwise
        trunk = trunk_of(model)
        self.config = text_config(trunk)
        self.layer_kinds = cache_kinds_and_state_counts(self.config)
        if self.layer_kinds is None or window_in_addition_to_mask(self.config):
            raise ValueError("the attention or the cache of this family is not supported")
        self.limited = mixers_with_time_step_limits(trunk)
        self.parameters = inspect.signature(trunk.forward).parameters
        # The model builds its own masks if it has recurrent states or attention windows.
        self.builds_masks = (
            has_recurrent_states(self.config) or smallest_attention_window(self.config) is not None
        )
        if self.builds_masks and self.config._attn_implementation not in ADDITIVE_MASK_ATTENTION:
            raise ValueError(
                f"masks for {self.config._attn_implementation} attention are not supported"
            )

    def new_cache(self, rows: int) -> RaggedCache:
        """Make an empty cache for ``rows`` episodes."""
        assert self.layer_kinds is not None
        dtype, device = self.model.dtype, self.model.device
        return RaggedCache(
            self.layer_kinds,
            rows=rows,
            dtype=dtype,
            device=device,
            stepwise=self.stepwise,
            limit=rotary_change_length_within_context(self.config),
        )

    def __call__(self, ids: torch.Tensor, cache: RaggedCache) -> torch.Tensor:
        """Return the logits [n, V] after each row's last new token.

        Args:
            ids: New tokens [N] of the cache's plan, row after row.
            cache: Cache to which the keys and values of the new tokens are added.
        """
        plan = cache.plan
        inputs: dict[str, Any] = {
            "cache_params" if "cache_params" in self.parameters else "past_key_values": cache
        }
        if "position_ids" in self.parameters or "kwargs" not in self.parameters:
            inputs["position_ids"] = plan.pad(plan.position)
        masks: Any = contextlib.nullcontext()
        if self.builds_masks:
            width = plan.mask.shape[-1]
            attention = self.config._attn_implementation
            masks = ragged_masks(attention, plan.queries, width, plan.mask.dtype)
        else:
            inputs["attention_mask"] = plan.mask
        with masks, clamped_time_steps(self.limited):
            hidden = trunk_of(self.model)(
                input_ids=plan.pad(ids), use_cache=True, **inputs
            ).last_hidden_state
        return logits_of(self.model, plan.flatten(hidden)[plan.ends])


class FusedDecoder:
    """Decoder for the Llama family, with fused copies of the model's weights.

    The copies are not updated. After an update of the model, a new decoder is needed.

    Args:
        model: Causal model of one of FUSED_FAMILIES.
    """

    def __init__(self, model: Any) -> None:
        trunk = trunk_of(model)
        self.embed, self.rotary = trunk.embed_tokens, trunk.rotary_emb
        self.layers = [_FusedLayer(layer, trunk.config, i) for i, layer in enumerate(trunk.layers)]
        self.norm, self.epsilon = trunk.norm.weight, trunk.config.rms_norm_eps
        self.head = fused_linear([unwrap_peft(model).get_output_embeddings()])
        self.dtype, self.device = model.dtype, model.device

    def new_cache(self, rows: int) -> RaggedCache:
        """Make an empty cache for ``rows`` episodes."""
        return RaggedCache(len(self.layers), rows=rows, dtype=self.dtype, device=self.device)

    def __call__(self, ids: torch.Tensor, cache: RaggedCache) -> torch.Tensor:
        """Return the logits [n, V] after each row's last new token; see `Decoder`."""
        plan = cache.plan
        hidden = self.embed(ids)
        cos, sin = (t[0, :, None] for t in self.rotary(hidden, plan.position[None]))
        half = sin.shape[-1] // 2
        rotated_sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for layer, cache_layer in zip(self.layers, cache.ragged, strict=True):
            hidden = layer(hidden, cos, rotated_sin, plan, cache_layer)
        last = hidden[plan.ends]
        return self.head(rms_norm(last, last.shape[-1:], self.norm, self.epsilon))


class _FusedLayer:
    """One layer of the Llama family, with fused projections."""

    def __init__(self, layer: Any, config: Any, index: int) -> None:
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[index] == "sliding_attention"
        self.window = getattr(config, "sliding_window", None) if slides else None
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.scale = attention.head_dim, attention.scaling
        self.epsilon = config.rms_norm_eps
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = fused_linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = fused_linear([attention.o_proj])
        self.gate_up = fused_linear([mlp.gate_proj, mlp.up_proj])
        self.down, self.act = fused_linear([mlp.down_proj]), mlp.act_fn
        self.head_norms = None
        if hasattr(attention, "q_norm"):
            self.head_norms = attention.q_norm.weight, attention.k_norm.weight

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        rotated_sin: torch.Tensor,
        plan: ForwardPlan,
        cache_layer: RaggedLayer,
    ) -> torch.Tensor:
        """Return the layer's output [N, D].

        Args:
            hidden: Hidden states [N, D] of the new tokens.
            cos: Cosines of the rotary embedding.
            rotated_sin: Sines of the rotary embedding; the first half is negated, as in
                transformers' ``rotate_half``.
            plan: Plan of the forward pass.
            cache_layer: Keys and values of this layer.
        """
        size = hidden.shape[-1:]
        projected = self.qkv(rms_norm(hidden, size, self.norms[0], self.epsilon))
        projected = projected.view(len(hidden), -1, self.width)
        rotated, values = projected.split([self.heads + self.key_heads, self.key_heads], 1)
        if self.head_norms:
            rotated = self._normalize_heads(rotated)
        left, right = rotated.chunk(2, -1)
        rotated = torch.addcmul(rotated * cos, torch.cat((right, left), -1), rotated_sin)
        queries, keys = rotated.split([self.heads, self.key_heads], 1)
        mask = plan.mask_within(self.window)
        stored = cache_layer.append(keys, values)
        attended = attend(queries, *stored, plan=plan, mask=mask, scale=self.scale)
        hidden = hidden + self.out(attended)
        gate_up = self.gate_up(rms_norm(hidden, size, self.norms[1], self.epsilon))
        gate, up = gate_up.chunk(2, -1)
        return hidden + self.down(self.act(gate) * up)

    def _normalize_heads(self, queries_and_keys: torch.Tensor) -> torch.Tensor:
        assert self.head_norms is not None
        parts = queries_and_keys.split([self.heads, self.key_heads], 1)
        pairs = zip(parts, self.head_norms, strict=True)
        return torch.cat([rms_norm(x, (self.width,), w, self.epsilon) for x, w in pairs], 1)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    plan: ForwardPlan,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the attention outputs [N, H * D] of the new tokens.

    Args:
        queries: Queries [N, H, D] of the new tokens.
        keys: Keys [n, Hkv, width, D] of the rows.
        values: Values [n, Hkv, width, D] of the rows.
        plan: Plan of the forward pass.
        mask: Additive mask [n, 1, L, width].
        scale: Factor of the products of queries and keys.
    """
    (n, longest), key_heads = plan.shape, keys.shape[1]
    groups = queries.shape[1] // key_heads
    if longest == 1:  # query heads that share keys are treated as several queries, to copy no keys
        outputs = scaled_dot_product_attention(
            queries.view(n, key_heads, groups, -1), keys, values, attn_mask=mask, scale=scale
        )
        return outputs.reshape(n, -1)
    outputs = scaled_dot_product_attention(
        plan.pad(queries).transpose(1, 2),
        keys.repeat_interleave(groups, 1),
        values.repeat_interleave(groups, 1),
        attn_mask=mask,
        scale=scale,
    )
    return plan.flatten(outputs.transpose(1, 2)).flatten(1)


def fused_linear(linears: Sequence[Any]) -> Projection:
    """Return a function that computes several linear layers of one input in one matmul.

    The function concatenates the outputs. The layers are called one by one if one of them is not an
    ``nn.Linear`` (adapters, quantized weights), or if only some of them have a bias.
    """
    weights = [layer.weight for layer in linears]
    biases = [layer.bias for layer in linears if layer.bias is not None]
    if any(type(layer) is not nn.Linear for layer in linears) or len(biases) not in (
        0,
        len(weights),
    ):
        return lambda x: torch.cat([layer(x) for layer in linears], -1)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = torch.cat(biases) if biases else None
    if weight.dtype == torch.bfloat16 and _stores_reordered_bf16_weights(weight.device):
        return _reordered_linear(weight, bias)
    return lambda x: linear(x, weight, bias)


def fused_weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that ``FusedDecoder`` copies.

    Layers of one input are concatenated. On CPUs with bf16 matrix units, bf16 weights are also
    stored in another memory format.
    """
    groups = [[unwrap_peft(model).get_output_embeddings()]]
    for layer in trunk_of(model).layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
    reorders = model.dtype == torch.bfloat16 and _stores_reordered_bf16_weights(model.device)
    return sum(
        layer.weight.numel() * layer.weight.element_size()
        for group in groups
        if all(type(layer) is nn.Linear for layer in group) and (reorders or len(group) > 1)
        for layer in group
    )


def _stores_reordered_bf16_weights(device: torch.device) -> bool:
    """Return whether bf16 weights are stored in the memory format of the matrix units."""
    return device.type == "cpu" and has_native_bf16(device)


def _reordered_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    """Return a linear layer whose weight is stored in the memory format of the matrix units.

    ``linear`` reorders a bf16 weight in every call, which takes as long as the matmul of a few
    rows. The outputs are bit-identical to those of ``linear``.
    """
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def matmul(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        # oneDNN caches a kernel of about 1 MB per number of rows, so this number is rounded up.
        missing = -rows % (16 if rows <= 128 else 64) if rows > 16 else 0
        padded = pad(x, (0, 0, 0, missing)) if missing else x
        return torch.ops.mkldnn._linear_pointwise(padded, ordered, bias, "none", [], "")[:rows]

    return matmul


def make_fastest_matching_decoder(model: Any) -> Decoder:
    """Return the fastest decoder whose logits equal those of the model's own forward pass.

    Differences up to the rounding tolerance are ignored. If no decoder with a cache agrees, the
    result is the decoder without one. The comparison is made once per model.
    """
    trunk = trunk_of(model)
    if (
        trunk.config.model_type in FUSED_FAMILIES
        and rotary_change_length_within_context(trunk.config) is None
    ):
        if trunk not in _fused_agrees:
            _fused_agrees[trunk] = _fused_decoder_agrees(type(unwrap_peft(model)), trunk.config)
        if _fused_agrees[trunk]:
            with torch.no_grad():
                return FusedDecoder(model)
    options = unfused_decoder_options(model)
    if trunk not in _selected:
        _selected[trunk] = select_decoder_index(model, options)
        if _selected[trunk]:
            name = type(unwrap_peft(model)).__name__
            log.info("%s: replies are sampled %s", name, options[_selected[trunk]].description)
    return options[_selected[trunk]].make()


def _fused_decoder_agrees(model_class: Any, config: Any) -> bool:
    """Return whether the fused decoder computes a model; if not, a warning states the reason."""
    try:
        gap = fused_logit_difference(model_class, config)
    except UNSUPPORTED_ERRORS as error:
        reason = f"does not support its layers: {first_line(error)}"
    else:
        if gap <= TOLERANCE:
            return True
        reason = f"differs from it by {gap:.1e}"
    log.warning(
        "%s: decoding uses the model's own forward pass, because the fused decoder %s",
        model_class.__name__,
        reason,
    )
    return False


def force_decoder_without_cache(model: Any) -> None:
    """Use a decoder without a cache for this model from now on.

    Sampling without a cache is slow, because it computes the whole row for every token.
    """
    trunk = trunk_of(model)
    _fused_agrees[trunk] = False
    _selected[trunk] = len(unfused_decoder_options(model)) - 1


def unfused_decoder_options(model: Any) -> list[DecoderOption]:
    """Return the decoders that use the model's own forward pass, fastest first."""
    stateful = has_recurrent_states(text_config(trunk_of(model)))
    return [
        DecoderOption(
            "in batches", lambda: PaddedBatchDecoder(model), safer_index=1 if stateful else None
        ),
        DecoderOption(
            "in batches; later turns are read token by token, because the model does not continue "
            "its recurrent states when it reads several tokens at once",
            lambda: PaddedBatchDecoder(model, stepwise=True),
        ),
        DecoderOption(
            "one row at a time with the model's own cache",
            lambda: RowDecoder(model),
            safer_index=3 if stateful else None,
        ),
        DecoderOption(
            "one row at a time with the model's own cache, token by token",
            lambda: RowDecoder(model, stepwise=True),
        ),
        DecoderOption(
            "one row at a time without a cache, because with every cache the log-probabilities "
            "differ from those of a forward pass over the whole row",
            lambda: RowDecoder(model, cached=False),
        ),
    ]


@torch.no_grad()
def fused_logit_difference(model_class: Any, config: Any) -> float:
    """Return ``decoder_logit_difference`` of the fused decoder for a small random model.

    Args:
        model_class: Class of the model.
        config: Configuration of the model, which is reduced to two layers.
    """
    small = reduced_config(config, max_layers=2)
    small._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = model_class(small).float().eval()
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return decoder_logit_difference(model, FusedDecoder(model))
