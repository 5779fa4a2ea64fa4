"""An algorithm with a loss of its own: TOPR (Le Roux et al. 2025, arXiv:2503.14286) per token."""

import torch

from rlhf.algorithms.kl import masked_difference
from rlhf.algorithms.losses import aggregate
from rlhf.algorithms.metrics import MetricSums
from rlhf.plugins import Settings, register_algorithm

plugin_api = 1


@register_algorithm(
    "topr",
    title="Tapered off-policy REINFORCE",
    settings=Settings(advantage="group_relative", group_size=4, num_epochs=2, kl_placement="none"),
    reads=("aggregation",),
)
def tapered(logprobs, batch, settings, *, denominator):
    """Return the loss: weight 1 if the advantage is positive, else min(pi / pi_old, 1)."""
    mask = batch.require("loss_mask")
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask).exp().detach()
    weight = torch.where(advantages > 0, 1.0, ratio.clamp(max=1.0))
    per_token = -weight * advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})
