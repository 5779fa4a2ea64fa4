"""Add a custom algorithm: a decorated loss function.

    python examples/custom_algorithm.py
    rlhf topr --plugins examples/custom_algorithm.py --help

The loss is TOPR (Le Roux et al. 2025, arXiv:2503.14286) with one importance weight per token.
Tokens with a positive advantage have weight 1. Tokens with a negative advantage have the truncated
weight min(pi / pi_old, 1), so that their weight approaches 0 when they become unlikely.
"""

import torch
from torch import Tensor

import rlhf
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.kl import masked_difference
from rlhf.algorithms.losses import Denominator, aggregate
from rlhf.algorithms.metrics import MetricSums
from rlhf.plugins import Settings, register_algorithm


@register_algorithm(
    "topr",
    title="Tapered off-policy REINFORCE",
    paper="Le Roux et al. 2025, arXiv:2503.14286",
    equation="-A log pi if A > 0 else -min(r, 1) A log pi",
    summary="weight 1 where the advantage is positive, truncated importance weights elsewhere",
    settings=Settings(advantage="group_relative", group_size=4, num_epochs=2, kl_placement="none"),
    reads=("aggregation",),
    unbiased=True,
    bias="none on fresh rollouts",
    fixed_point="pi*",
)
def tapered(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the loss of a micro-batch.

    Args:
        logprobs: [B, T], log-probabilities of the sampled tokens, with gradients.
        batch: the micro-batch, with advantages.
        settings: settings of the algorithm.
        denominator: denominator for the whole mini-batch, so that the losses of its micro-batches
            can be added.

    Returns:
        The loss, and the metrics of the micro-batch. `sums` are added over the micro-batches and
        divided by the number of optimizer steps.
    """
    mask = batch.require("loss_mask")
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask).exp().detach()
    weight = torch.where(advantages > 0, 1.0, ratio.clamp(max=1.0))
    per_token = -weight * advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})


def main() -> None:
    """Train a small model with the new algorithm, by its name, like with a built-in algorithm."""
    rlhf.stage(
        "topr",
        {
            "output_dir": "runs/custom_algorithm",
            "model": {"scratch": {"hidden_size": 32, "num_layers": 2, "context": 128}},
            "env": {"id": "text/Echo-v0"},
            "rollout": {"max_new_tokens": 8},
            "episodes_per_step": 32,
            "num_steps": 5,
            "optimizer": {"learning_rate": 3e-3},
            "algorithm": {"aggregation": "sequence"},
        },
    )
    print("report: runs/custom_algorithm/report.html")


if __name__ == "__main__":
    main()
