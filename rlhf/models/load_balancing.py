"""The load-balancing loss of a mixture of experts.

This auxiliary loss penalizes routers that send most tokens to few experts (Fedus et al. 2021,
arXiv:2101.03961, eq. 4). Transformers adds it to the loss if the configuration has
``output_router_logits: true``. The formula differs between model families. The loss is therefore
computed by the model's own code, from the router logits of a forward pass of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.fast.packing import decoder_inputs
from rlhf.models.fast.tied_embedding import TiedEmbedding
from rlhf.models.output_head import forward_from_states
from rlhf.models.reduced_model import small_random_model_like
from rlhf.models.sharding.deferred import device_of

# Names of the attribute of a model or a configuration that contains the weight of the loss.
LOSS_WEIGHT_NAMES = ("router_aux_loss_coef", "aux_loss_coef")


def balancing_loss_weight(model: Any) -> float:
    """Return the weight of the load-balancing loss, or 0 if the configuration does not enable it.

    Raises:
        UserError: The configuration enables the loss, but the model does not compute it.
    """
    inner = unwrap_peft(model)
    config = inner.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    candidates = [(owner, name) for owner in (inner, config) for name in LOSS_WEIGHT_NAMES]
    weights = [getattr(owner, name) for owner, name in candidates if hasattr(owner, name)]
    runnable: Any = inner
    if inner.device.type == "meta":  # the weights are not loaded yet
        runnable = small_random_model_like(inner, device=device_of(inner))
        assert runnable is not None  # the checks at load time ran on such a model
    ids = torch.zeros(1, 2, dtype=torch.long, device=runnable.device)
    with torch.no_grad():
        output = runnable(input_ids=ids, use_cache=False, output_router_logits=True)
    if not weights or getattr(output, "aux_loss", None) is None:
        raise UserError(
            f"config.json of the model has output_router_logits: true, but {type(inner).__name__} "
            "has no load-balancing loss: set output_router_logits to false in config.json"
        )
    return float(weights[0])


def states_index_and_balancing_loss(
    model: Any, tokens: Tensor, attention_mask: Tensor, *, tied: TiedEmbedding | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the hidden states and the load-balancing loss in one forward pass over padded rows.

    Args:
        model: Causal model.
        tokens: [B, T], padded on the right.
        attention_mask: [B, T], True where a token is not padding.
        tied: Embedding table that replaces the decoder's own table, or None.

    Returns:
        Hidden states [B * T, D], the index [B, T] of the state of each token, and the scalar
        load-balancing loss, which is not yet multiplied by its weight.
    """
    inner, trunk = unwrap_peft(model), trunk_of(model)
    mask = attention_mask.long()
    output = trunk(
        **decoder_inputs(tokens, tied),
        attention_mask=mask,
        use_cache=False,
        output_router_logits=True,
    )
    states = output.last_hidden_state
    balance = forward_from_states(
        inner,
        trunk,
        states[:1, :1],
        router_logits=output.router_logits,
        attention_mask=mask,
        output_router_logits=True,
    ).aux_loss
    index = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    return states.flatten(0, 1), index, balance
