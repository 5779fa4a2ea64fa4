"""A batch of rollouts with everything in it, and the whole way from rewards to gradients."""

import torch
from torch import Tensor

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.metrics import MetricSums
from rlhf.algorithms.registry import configured_algorithm

EPISODES, GROUP, LENGTH = 12, 3, 7


def batch_of(mask: Tensor, **fields: Tensor | None) -> TrainingBatch:
    """A batch without padding whose action tokens are those of `mask`, all in the losses."""
    return TrainingBatch(
        tokens=mask.long(),
        attention_mask=torch.ones_like(mask),
        action_mask=mask,
        **({"loss_mask": mask} | fields),
    )


def make_batch(seed: int) -> dict[str, Tensor]:
    """Episodes of different lengths over two turns, one of them unscored, on old ratios near 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float = 1.0) -> Tensor:
        shape = (EPISODES, LENGTH)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, LENGTH + 1, (EPISODES, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    mask[:, 3] = False  # an environment token
    mask[:, 0] = True
    old = noise() - 3.0
    rewards = torch.where(mask.cumsum(1) == 1, noise().round(decimals=1), 0.0)
    rewards[4, 0] = torch.nan
    return {
        "mask": mask,
        "turns": (torch.arange(LENGTH) > 3).long().expand(EPISODES, LENGTH).contiguous(),
        "old_logprobs": old,
        "logprobs": old + noise(0.3),
        "ref_logprobs": old + noise(0.3),
        "sampler_logprobs": old + noise(0.5),
        "entropy": noise().abs(),
        "rewards": rewards,
        "costs": noise().abs(),
        "old_values": noise(),
        "values": noise(),
    }


def off_policy(name: str, **overrides: object) -> Algorithm:
    """The row with groups of three and, where there is a ratio, a second epoch for it to move."""
    several = {} if name in ("best_of_n", "online_dpo") else {"num_epochs": 2}
    return configured_algorithm(name, **{"group_size": GROUP, **several, **overrides})


def run(
    algorithm: Algorithm, batch: dict[str, Tensor], cuts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, MetricSums]:
    """Gradients by log-probabilities and by values, and the metrics, over the given micro-batches.

    None means one micro-batch. Slots outside the mask are nan.
    """
    mask, kl_coef = batch["mask"], algorithm.settings.kl_coef
    x = {
        key: torch.where(mask, value, torch.nan) if value.is_floating_point() else value
        for key, value in batch.items()
    }
    logprobs, values = (x[key].clone().requires_grad_() for key in ("logprobs", "values"))
    whole = estimate_advantages(
        algorithm,
        batch_of(
            mask,
            rewards=x["rewards"],
            costs=x["costs"],
            old_logprobs=x["old_logprobs"],
            ref_logprobs=x["ref_logprobs"],
            sampler_logprobs=x["sampler_logprobs"],
            groups=torch.arange(EPISODES) // GROUP,
            turns=x["turns"],
            values=x["old_values"],
            bootstrap=torch.linspace(0, 1, EPISODES, dtype=torch.float64),
        ),
        kl_coef=kl_coef,
        multiplier=0.5,
    )
    loss_mask = whole.require("loss_mask")
    denominator = loss_denominator(algorithm, loss_mask, max_tokens=LENGTH)
    tokens, sums = loss_mask.sum(), MetricSums()
    for cut in cuts or [list(range(EPISODES))]:
        rows = torch.tensor(cut)
        part = whole.select(rows)
        loss, part_sums = compute_loss(
            algorithm,
            logprobs[rows],
            part,
            denominator=denominator,
            kl_coef=kl_coef,
            entropy=x["entropy"][rows] - 0.1 * logprobs[rows],
            values=values[rows],
            critic_denominator=tokens,
        )
        loss.backward()
        sums = sums + part_sums
    assert logprobs.grad is not None
    assert values.grad is not None
    return logprobs.grad, values.grad, sums
