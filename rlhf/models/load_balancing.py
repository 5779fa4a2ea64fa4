"""The load-balancing loss of a mixture of experts, as the model's own code computes it.

A router that sends most tokens to few experts is held back by an auxiliary loss (Fedus et al. 2021,
arXiv:2101.03961, eq. 4). Transformers adds it to the loss where the configuration says
``output_router_logits: true``; the formula differs between families. The model's own forward pass
computes it here from the router's logits of a pass over the trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.fast.packing import inputs_of
from rlhf.models.fast.tied_embedding import TiedEmbedding
from rlhf.models.output_head import forward_from_states

# Names under which models keep the weight of the loss.
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def balancing_weight(model: Any) -> float:
    """Weight of the load-balancing loss in the loss; 0 where the configuration asks for none.

    Args:
        model: a causal model, or a PEFT model around one.

    Raises:
        UserError: the configuration asks for the loss, and the model has none.
    """
    inner = unwrap_peft(model)
    config = inner.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    places = [(place, name) for place in (inner, config) for name in WEIGHTS]
    weights = [getattr(place, name) for place, name in places if hasattr(place, name)]
    ids = torch.zeros(1, 2, dtype=torch.long, device=inner.device)
    with torch.no_grad():
        output = inner(input_ids=ids, use_cache=False, output_router_logits=True)
    if not weights or getattr(output, "aux_loss", None) is None:
        raise UserError(
            f"the model's configuration has output_router_logits: true, but {type(inner).__name__} "
            "has no load-balancing loss to add: set it to false in config.json"
        )
    return float(weights[0])


def states_and_balance(
    model: Any, tokens: Tensor, attention_mask: Tensor, *, tied: TiedEmbedding | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One padded pass: hidden states, and how unevenly the experts are used.

    Args:
        model: a causal model, or a PEFT model around one.
        tokens: [B, T], padded on the right.
        attention_mask: [B, T], true where a token is not padding.
        tied: where to look tokens up; None: in the decoder's own table.

    Returns:
        (states [B * T, D], index [B, T] into them, the loss of the real tokens, without weight).
    """
    inner, trunk = unwrap_peft(model), trunk_of(model)
    mask = attention_mask.long()
    output = trunk(
        **inputs_of(tokens, tied),
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
