"""Apply a model's output head to hidden states of its decoder.

Most model families multiply the states by the output weight, and some scale or cap the product.
This module computes the logits for any subset of the positions. Some model families have other
operations, such as further layers (BERT). For these families, this module runs the model's own
forward pass with a decoder that returns the given states.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.errors import UserError
from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.comparison import evaluation_mode

# Maximum difference of logits, relative to the largest logit, that is attributed to rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.05

# Decoder -> result of ``head_is_weight_product`` for the model of the decoder.
_is_product: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def logits_of(model: Any, hidden: Tensor, *, head_weight: Tensor | None = None) -> Tensor:
    """Return the logits of hidden states, from the output head and all operations that follow it.

    Args:
        model: Causal model.
        hidden: Last hidden states [..., D].
        head_weight: Output weight [V, D] that replaces the model's own; requires
            ``head_is_weight_product``.

    Returns:
        Logits [..., V] in the model's dtype.
    """
    if head_weight is None and not head_is_weight_product(model):
        return _forward_logits(unwrap_peft(model), trunk_of(model), hidden)
    return _product_logits(model, hidden, head_weight)


def head_is_weight_product(model: Any) -> bool:
    """Return whether ``_product_logits`` gives a model's logits.

    `_product_logits` multiplies the states by the output weight, and scales and caps the product by
    values of the configuration. The comparison with the model's own logits is made once per model.

    Raises:
        UserError: Neither ``_product_logits`` nor ``forward_from_states`` gives the model's logits.
    """
    trunk = trunk_of(model)
    if trunk not in _is_product:
        _is_product[trunk] = _product_gives_model_logits(
            unwrap_peft(model), trunk, lambda hidden: _product_logits(model, hidden, None)
        )
    return _is_product[trunk]


def copy_head_check_result(source: Any, target: Any) -> None:
    """Use the result of ``head_is_weight_product`` for one model also for another model.

    Args:
        source: Causal model.
        target: Copy of the model, or a model of the same architecture.
    """
    _is_product[trunk_of(target)] = head_is_weight_product(source)


def hidden_state_size(model: Any) -> int:
    """Return the size D of the last hidden states, which can be less than ``hidden_size``."""
    head = unwrap_peft(model).get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and head_is_weight_product(model):
        return head.in_features
    return unwrap_peft(model).config.get_text_config().hidden_size


def _product_logits(model: Any, hidden: Tensor, weight: Tensor | None) -> Tensor:
    """Return states times output weight, scaled and capped by values of the configuration.

    If ``weight`` is None, the output head of the model is applied.
    """
    config = unwrap_peft(model).config.get_text_config()
    head = unwrap_peft(model).get_output_embeddings()
    dtype = (head.weight if weight is None else weight).dtype
    if dtype.is_floating_point and hidden.dtype != dtype:  # Mamba's last hidden states are float32
        hidden = hidden.to(dtype)
    logits = head(hidden) if weight is None else torch.nn.functional.linear(hidden, weight)
    if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * scale
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


class _TrunkOutput(BaseModelOutputWithPast):
    """Output of a decoder; fields that are not set are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _decoder_returning(trunk: Any, output: _TrunkOutput) -> Iterator[None]:
    """Return a context manager in which the decoder computes nothing and returns ``output``."""
    before = vars(trunk).get("forward")
    trunk.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del trunk.forward
        else:
            trunk.forward = before


def forward_from_states(
    model: Any, trunk: Any, hidden: Tensor, *, router_logits: Any = None, **options: Any
) -> Any:
    """Run a model's own forward pass on given last hidden states.

    Args:
        model: Transformers model, without a PEFT wrapper.
        trunk: Decoder of the model, which is not run.
        hidden: Last hidden states [B, T, D].
        router_logits: Router logits of the decoder, for a mixture of experts.
        options: Further arguments of the forward pass.

    Returns:
        The output of the forward pass, with logits [B, T, V].
    """
    output = _TrunkOutput(last_hidden_state=hidden)  # type: ignore[arg-type]
    if router_logits is not None:
        object.__setattr__(output, "router_logits", router_logits)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _decoder_returning(trunk, output):
        return model(input_ids=ids, use_cache=False, **options)


def _forward_logits(model: Any, trunk: Any, hidden: Tensor) -> Tensor:
    """Return the logits [..., V] of states [..., D], computed by the model's own forward pass."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    logits = forward_from_states(model, trunk, flat).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


@torch.no_grad()
def _product_gives_model_logits(
    model: Any, trunk: Any, product: Callable[[Tensor], Tensor]
) -> bool:
    """Return whether ``product`` gives the same logits as the model for a row of four tokens.

    Raises:
        UserError: Neither ``product`` nor ``_forward_logits`` gives the model's logits.
    """
    ids = torch.arange(2, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
    with evaluation_mode(model):  # without dropout, which would change the logits
        whole = model(input_ids=ids, use_cache=False).logits.double()
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        product_gap = _relative_gap(lambda: product(hidden), whole)
        if product_gap <= (tolerance := TOLERANCE.get(model.dtype, HALF_TOLERANCE)):
            return True
        forward_gap = _relative_gap(lambda: _forward_logits(model, trunk, hidden), whole)
        if forward_gap <= tolerance:
            return False
    raise UserError(
        f"{type(model).__name__} is not supported: the logits that are computed from its hidden "
        "states differ from its own logits by a relative difference of "
        f"{min(product_gap, forward_gap):.1e}"
    )


def _relative_gap(compute: Callable[[], Tensor], expected: Tensor) -> float:
    """Return the largest difference from ``expected``, divided by the largest expected logit.

    The result is infinite if ``compute`` fails or returns logits of a different shape.
    """
    try:
        logits = compute().double()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return math.inf
    if logits.shape != expected.shape:
        return math.inf
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
