"""Training on enumerable tasks without sampling noise."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.controllers import LagrangeMultiplier
from rlhf.algorithms.losses import compute_loss, loss_denominator
from tests.algorithms.batches import batch_of
from tests.exact.enumeration import (
    AnyPolicy,
    Task,
    all_groups,
    expected_gradient,
    poisoned,
    probabilities,
)


class Tabular(AnyPolicy):
    """A policy for bandits: one logit per action."""

    def __init__(self, probability: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(probability.log())

    def logprobs(self, task: Task) -> Tensor:
        """[K, 1]."""
        return self.logits.log_softmax(0)[task.tokens[:, 0]][:, None]


class Critic(nn.Module):
    """A free value for every history of at most two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Value before each token, [N, T]."""
        shifted = torch.cat([torch.full((len(tokens), 2), 5), tokens], dim=1)
        return self.table[shifted[:, :-2], shifted[:, 1:-1]]


def total_variation(left: Tensor, right: Tensor) -> float:
    """Half the sum of absolute differences."""
    return float((left - right).abs().sum() / 2)


def optimum(task: Task, reference: AnyPolicy, *, beta: float) -> Tensor:
    """pi*(y) proportional to pi_ref(y) exp(r(y) / beta), [N]; for tasks of one turn."""
    return tilted(task, reference, task.returns / beta)


def tilted(task: Task, reference: AnyPolicy, exponent: Tensor) -> Tensor:
    """The reference times exp(exponent), normalized."""
    weight = probabilities(task, reference.logprobs(task)).detach() * exponent.exp()
    return weight / weight.sum()


def descend(policy: AnyPolicy, gradient_of: Callable[[], Tensor], *, steps: int, lr: float) -> None:
    """Adam with a step size that falls linearly to 0, on a flat gradient."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        flat = gradient_of()
        for parameter, part in zip(
            policy.parameters(), flat.split([p.numel() for p in policy.parameters()]), strict=True
        ):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
        schedule.step()


def train_in_expectation(
    algorithm: Algorithm,
    task: Task,
    reference: AnyPolicy,
    *,
    kl_coef: float,
    group_size: int,
    steps: int,
    lr: float,
) -> Tensor:
    """Train from the reference on the exact expected gradient over all groups; the final policy's
    chance of each episode."""
    policy = copy.deepcopy(reference)

    def gradient_of() -> Tensor:
        chance = probabilities(task, policy.logprobs(task)).detach()
        return expected_gradient(
            algorithm,
            task,
            policy,
            reference,
            all_groups(chance, size=group_size),
            denominator=group_size,
            kl_coef=kl_coef,
        )

    descend(policy, gradient_of, steps=steps, lr=lr)
    return probabilities(task, policy.logprobs(task)).detach()


def stratified(chance: Tensor, *, size: int) -> Tensor:
    """A batch that holds each episode in proportion to its chance, up to rounding: indices."""
    edges = (chance.cumsum(0) / chance.sum() * size).round().long()
    return torch.arange(len(chance)).repeat_interleave(edges.diff(prepend=edges.new_zeros(1)))


def train_in_batches(
    algorithm: Algorithm,
    task: Task,
    reference: AnyPolicy,
    *,
    kl_coef: float,
    steps: int,
    lr: float,
    group_size: int = 1,
    num_groups: int = 400,
    costs: Tensor | None = None,
    multiplier: LagrangeMultiplier | None = None,
) -> Tensor:
    """Train from the reference on large stratified batches, as the loop does: several epochs,
    clipping, whitening, a learned critic. The final policy's chance of each episode."""
    policy, critic = copy.deepcopy(reference), Critic()
    optimizer = torch.optim.Adam(
        [{"params": policy.parameters()}, {"params": critic.parameters(), "lr": 0.1}], lr=lr
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        old_all = policy.logprobs(task).detach()
        rows = _batch(probabilities(task, old_all), group_size, num_groups)
        mask, tokens = task.mask[rows], task.tokens[rows]
        old, ref = poisoned(old_all[rows], mask), reference.logprobs(task).detach()[rows]
        old_values = critic(tokens).detach()
        batch = batch_of(
            mask,
            rewards=task.rewards[rows],
            costs=None if costs is None else costs[rows],
            old_logprobs=old,
            ref_logprobs=ref,
            groups=torch.arange(len(rows)) // group_size,
            turns=task.turns[rows],
            values=old_values,
            bootstrap=torch.zeros(len(rows), dtype=torch.float64),
        )
        batch = estimate_advantages(
            algorithm,
            batch,
            kl_coef=kl_coef,
            multiplier=0.0 if multiplier is None else multiplier.value,
        )
        for _ in range(algorithm.settings.num_epochs):
            optimizer.zero_grad()
            values = critic(tokens) if algorithm.needs_critic else None
            loss = _loss(algorithm, policy.logprobs(task)[rows], values, batch, kl_coef)
            loss.backward()
            optimizer.step()
        schedule.step()
        if multiplier is not None and costs is not None:
            multiplier.update(float(torch.where(mask, costs[rows], 0.0).sum(1).mean()))
    return probabilities(task, policy.logprobs(task)).detach()


def _batch(chance: Tensor, group_size: int, num_groups: int) -> Tensor:
    every = all_groups(chance, size=group_size)
    groups = stratified(every.weight[::group_size], size=num_groups)
    return every.index.view(-1, group_size)[groups].flatten()


def _loss(
    algorithm: Algorithm,
    logprobs: Tensor,
    values: Tensor | None,
    batch: TrainingBatch,
    kl_coef: float,
) -> Tensor:
    mask = batch.require("loss_mask")
    return compute_loss(
        algorithm,
        logprobs,
        batch,
        denominator=loss_denominator(algorithm, mask, max_tokens=2),
        kl_coef=kl_coef,
        values=values,
        critic_denominator=mask.sum(),
    )[0]
