"""The update core: epochs, mini-batches and micro-batches over one batch of rollouts."""

from __future__ import annotations

import numpy as np
import torch

from rlhf.algorithms.metrics import MetricSums
from rlhf.algorithms.update import denominator_for, policy_loss_for, value_loss_for
from rlhf.training.batching import micro_batches
from rlhf.training.experience import Experience
from rlhf.training.session import Session


def learn(session: Session, experience: Experience, *, step: int) -> dict[str, float]:
    """All optimizer steps on one batch; the policy and its critic change in place.

    Every loss is a sum over tokens divided by a count taken over the whole mini-batch, so how a
    mini-batch is cut into micro-batches, and how many processes share them, changes nothing but
    memory and time.

    Args:
        session: policy, algorithm, optimizer and the present KL coefficient.
        experience: from ``prepare``.
        step: number of the batch, which seeds the shuffle; the critic alone learns in the first
            ``critic_warmup_steps``.

    Returns:
        Metrics over all optimizer steps.
    """
    config, settings = session.config, session.algorithm.settings
    rng = np.random.default_rng([config.seed, step])
    critic_only = step < config.critic_warmup_steps
    parameters = session.policy.parameters()
    total, norms = MetricSums(), []
    for _ in range(settings.num_epochs):
        for rows in mini_batches(experience, settings.num_minibatches, rng):
            tally = _accumulate(session, experience, rows, critic_only=critic_only)
            session.world.add_gradients(parameters)
            if critic_only:  # a shared trunk is the policy's
                session.policy.model.zero_grad(set_to_none=True)
            norms.append(session.optimizer.clip_gradients(config.optimizer.max_grad_norm))
            session.optimizer.step()
            session.scheduler.step()
            session.optimizer.zero_grad(set_to_none=True)
            total = total + tally
    total = sum(session.world.gather(total), MetricSums())
    metrics = total.compute()
    metrics |= {name: metrics[name] / max(len(norms), 1) for name in total.sums}
    if norms:
        metrics["train/grad_norm"] = float(np.mean(norms))
    return {**metrics, "train/updates": len(norms)}


def mini_batches(
    experience: Experience, count: int, rng: np.random.Generator
) -> list[torch.Tensor]:
    """Rows that take part, shuffled and split into ``count``; rows of one unit stay together."""
    units = experience.credit.units.cpu().numpy()
    live = experience.credit.mask.any(1).cpu().numpy()
    names = rng.permutation(np.unique(units[live]))
    parts = np.array_split(names, min(count, len(names))) if len(names) else []
    rows = [np.flatnonzero(np.isin(units, part) & live) for part in parts]
    return [torch.as_tensor(part) for part in rows]


def _accumulate(
    session: Session, experience: Experience, rows: torch.Tensor, *, critic_only: bool
) -> MetricSums:
    """Gradients of this process's share of one mini-batch, micro-batch by micro-batch."""
    config, credit = session.config, experience.credit
    rows = rows.to(session.policy.device)
    mask = credit.mask[rows]
    limit = session.collector.episode_tokens()
    denominator = denominator_for(session.algorithm, mask, max_tokens=limit)
    total = MetricSums()
    attention_mask = experience.batch.attention_mask[rows]
    parts = micro_batches(
        experience.batch.tokens[rows],
        attention_mask,
        credit.units[rows].tolist(),
        max_tokens=config.micro_batch_tokens,
        packed=session.policy.packs_rows(attention_mask),
    )
    for chosen in session.world.mine(parts):
        loss, tally = _loss(
            session,
            experience.rows(rows[chosen]),
            denominator=denominator,
            num_tokens=mask.sum(),
            critic_only=critic_only,
        )
        loss.backward()
        total = total + tally
    return total


def _loss(
    session: Session,
    part: Experience,
    *,
    denominator: torch.Tensor,
    num_tokens: torch.Tensor,
    critic_only: bool,
) -> tuple[torch.Tensor, MetricSums]:
    """Loss of one micro-batch, its share of the mini-batch's."""
    algorithm, batch = session.algorithm, part.batch
    scored = session.policy.score(
        batch.tokens,
        batch.attention_mask,
        batch.action_mask,
        temperature=session.config.rollout.temperature,
    )
    loss, tally = policy_loss_for(
        algorithm,
        scored.logprobs,
        part.credit,
        denominator=denominator,
        old_logprobs=part.old_logprobs,
        ref_logprobs=part.ref_logprobs,
        entropy=scored.entropy,
        kl_coef=session.kl.coef,
    )
    if not algorithm.critic:
        return loss, tally
    assert scored.values is not None
    assert part.old_values is not None
    value_loss, told = value_loss_for(
        algorithm,
        scored.values,
        part.credit,
        old_values=part.old_values,
        denominator=num_tokens,
    )
    return (value_loss if critic_only else loss + value_loss), tally + told
