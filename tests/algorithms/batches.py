"""A batch of rollouts with everything in it, and the whole way from rewards to gradients."""

import torch
from torch import Tensor

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.credit import advantages_for, penalized_rewards
from rlhf.algorithms.metrics import MetricSums
from rlhf.algorithms.registry import configure
from rlhf.algorithms.update import denominator_for, policy_loss_for, value_loss_for

EPISODES, GROUP, LENGTH = 12, 3, 7


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
    return configure(name, **{"group_size": GROUP, **several, **overrides})


def run(
    algorithm: Algorithm, batch: dict[str, Tensor], cuts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, MetricSums]:
    """Gradients by log-probabilities and by values, and the tally, over the given micro-batches.

    None means one micro-batch. Slots outside the mask are nan.
    """
    mask, kl_coef = batch["mask"], algorithm.settings.kl_coef
    x = {
        key: torch.where(mask, value, torch.nan) if value.is_floating_point() else value
        for key, value in batch.items()
    }
    logprobs, values = (x[key].clone().requires_grad_() for key in ("logprobs", "values"))
    rewards = penalized_rewards(
        algorithm,
        x["rewards"],
        mask,
        old_logprobs=x["old_logprobs"],
        ref_logprobs=x["ref_logprobs"],
        kl_coef=kl_coef,
        costs=x["costs"],
        multiplier=0.5,
    )
    credit = advantages_for(
        algorithm,
        rewards,
        mask,
        groups=torch.arange(EPISODES) // GROUP,
        turns=x["turns"],
        values=x["old_values"],
        bootstrap=torch.linspace(0, 1, EPISODES, dtype=torch.float64),
        old_logprobs=x["old_logprobs"],
        sampler_logprobs=x["sampler_logprobs"],
    )
    denominator = denominator_for(algorithm, credit.mask, max_tokens=LENGTH)
    tokens, tally = credit.mask.sum(), MetricSums()
    for cut in cuts or [list(range(EPISODES))]:
        rows = torch.tensor(cut)
        part = credit.rows(rows)
        loss, told = policy_loss_for(
            algorithm,
            logprobs[rows],
            part,
            old_logprobs=x["old_logprobs"][rows],
            ref_logprobs=x["ref_logprobs"][rows],
            entropy=x["entropy"][rows] - 0.1 * logprobs[rows],
            kl_coef=kl_coef,
            denominator=denominator,
        )
        value_loss, value_told = value_loss_for(
            algorithm, values[rows], part, old_values=x["old_values"][rows], denominator=tokens
        )
        (loss + value_loss).backward()
        tally = tally + told + value_told
    assert logprobs.grad is not None
    assert values.grad is not None
    return logprobs.grad, values.grad, tally
