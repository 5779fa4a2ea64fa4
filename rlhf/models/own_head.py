"""A model's own way from hidden states to logits, whatever its family puts there.

Most families multiply by the output weight, and perhaps scale: ``logprobs.logits_of`` does that
itself, for the rows that count alone. Others pass the states through further layers (BERT), caps or
multipliers of their own. Their forward pass is run with a trunk that hands out given states.
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

# Largest difference, relative to the largest logit, that is put down to rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.05

# Whether the plain product with the output weight gives a model's logits.
_is_product: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Given(BaseModelOutputWithPast):
    """What a trunk returns; fields that only some families have are empty."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _handing_out(trunk: Any, given: _Given) -> Iterator[None]:
    """While it lasts, the trunk returns this without computing anything."""
    before = vars(trunk).get("forward")
    trunk.forward = lambda *args, **kwargs: given
    try:
        yield
    finally:
        if before is None:
            del trunk.forward
        else:
            trunk.forward = before


def own_logits(model: Any, trunk: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of states [..., D] by the model's own forward pass.

    Args:
        model: the transformers model, without a PEFT wrapper.
        trunk: its decoder.
        hidden: last hidden states.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    logits = given_states(model, trunk, flat).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


def given_states(
    model: Any, trunk: Any, hidden: Tensor, *, router_logits: Any = None, **options: Any
) -> Any:
    """What a model's own forward pass makes of the states [B, T, D] of its trunk.

    Args:
        model: the transformers model, without a PEFT wrapper.
        trunk: its decoder, which is not run.
        hidden: last hidden states.
        router_logits: of the trunk's experts.
        options: of the forward pass.
    """
    given = _Given(last_hidden_state=hidden)  # type: ignore[arg-type]
    if router_logits is not None:
        object.__setattr__(given, "router_logits", router_logits)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _handing_out(trunk, given):
        return model(input_ids=ids, use_cache=False, **options)


def is_product(model: Any, trunk: Any, product: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``product(hidden)`` gives the model's logits; tried once per model.

    Args:
        model: the transformers model, without a PEFT wrapper.
        trunk: its decoder.
        product: from states to logits.

    Raises:
        UserError: neither it nor the model's own forward pass over given states does.
    """
    if trunk not in _is_product:
        _is_product[trunk] = _compare(model, trunk, product)
    return _is_product[trunk]


@torch.no_grad()
def _compare(model: Any, trunk: Any, product: Callable[[Tensor], Tensor]) -> bool:
    """Try the states of a few tokens."""
    ids = torch.arange(2, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would differ from pass to pass
    try:
        whole = model(input_ids=ids, use_cache=False).logits.double()
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        gap = _gap(lambda: product(hidden), whole)
        if gap <= (tolerance := TOLERANCE.get(model.dtype, HALF_TOLERANCE)):
            return True
        gap = min(gap, own := _gap(lambda: own_logits(model, trunk, hidden), whole))
        if own <= tolerance:
            return False
    finally:
        for module, mode in modes:
            module.training = mode
    raise UserError(
        f"{type(model).__name__} is not supported: its output head changes the logits by {gap:.1e} "
        "of their size"
    )


def _gap(compute: Callable[[], Tensor], whole: Tensor) -> float:
    """Largest difference relative to the largest logit; infinite where there is no comparison."""
    try:
        found = compute().double()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return math.inf
    if found.shape != whole.shape:
        return math.inf
    return float((found - whole).abs().max() / whole.abs().max().clamp(min=1e-6))
