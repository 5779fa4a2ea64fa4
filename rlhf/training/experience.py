"""From rollouts to credit: scores, penalties, log-probabilities, values, advantages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.algorithms import penalties
from rlhf.algorithms.controllers import RewardMoments
from rlhf.algorithms.credit import Credit, advantages_for, penalized_rewards
from rlhf.algorithms.kl import sequence_kl
from rlhf.algorithms.losses import explained_variance
from rlhf.algorithms.registry import Algorithm
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.rollout.batch import Batch, Rollout
from rlhf.training.batching import micro_batches
from rlhf.training.session import Session


@dataclass(frozen=True)
class Experience:
    """A batch of rollouts with everything that an update needs."""

    batch: Batch
    credit: Credit
    old_logprobs: torch.Tensor  # [B, T] of the policy that made the rollouts, by the trainer
    old_values: torch.Tensor | None  # [B, T]
    ref_logprobs: torch.Tensor | None  # [B, T]
    entropy: torch.Tensor  # [B, T] nats, of the episodes whose transcripts are kept; else zeros
    metrics: dict[str, float]

    def rows(self, index: torch.Tensor) -> Experience:
        """Some episodes, with the columns that only padding fills cut off."""
        batch = self.batch.rows(index)
        width = batch.tokens.shape[1]

        def cut(table: torch.Tensor) -> torch.Tensor:
            return table[index, :width]

        credit = self.credit
        return Experience(
            batch,
            Credit(
                cut(credit.advantages), cut(credit.returns), cut(credit.mask), credit.units[index]
            ),
            cut(self.old_logprobs),
            None if self.old_values is None else cut(self.old_values),
            None if self.ref_logprobs is None else cut(self.ref_logprobs),
            cut(self.entropy),
            self.metrics,
        )


def score_rollouts(
    rollouts: Sequence[Rollout], *, rewards: Any, gold: Any, env_weight: float
) -> None:
    """Add the scores of reward models to the rollouts, in place.

    Args:
        rollouts: fresh ones, which carry the environment's own rewards.
        rewards: a reward that is trained on, or None.
        gold: a reward that is only measured, or None.
        env_weight: of the environment's own rewards.
    """
    for rollout in rollouts:
        rollout.components["env"] = rollout.score
        rollout.rewards = [env_weight * reward for reward in rollout.rewards]
    conversations = [rollout.conversation for rollout in rollouts]
    for reward, counts in ((rewards, True), (gold, False)):
        if reward is None:
            continue
        scores = reward.score(conversations)
        for index, rollout in enumerate(rollouts):
            rollout.components |= {name: col[index] for name, col in scores.components.items()}
            if counts:
                rollout.pay(scores.values[index])
                rollout.unscored = scores.reasons[index]
    for rollout in rollouts:
        rollout.unshaped_score = rollout.score


def unscored_reasons(rollouts: Sequence[Rollout], *, most: int = 3) -> str:
    """The commonest reasons why episodes have no score, as ``12 x number: no reference answer``."""
    counts = Counter(
        rollout.unscored or "the environment gave no score"
        for rollout in rollouts
        if math.isnan(rollout.score)
    )
    shown = [f"{count} x {reason}" for reason, count in counts.most_common(most)]
    rest = counts.total() - sum(count for _, count in counts.most_common(most))
    return "; ".join([*shown, *([f"{rest} x other reasons"] if rest else [])])


def refuse_unscored(rollouts: Sequence[Rollout], *, limit: float) -> None:
    """Check the scores of all episodes that a step has sampled.

    Raises:
        UserError: more of them have none than the share ``limit``, ``shaping.max_unscored``; the
            message names the commonest reasons.
    """
    unscored = sum(math.isnan(rollout.score) for rollout in rollouts) / len(rollouts)
    if unscored > limit:
        raise UserError(
            f"{unscored:.0%} of the episodes could not be scored, more than shaping.max_unscored "
            f"= {limit:.0%}: {unscored_reasons(rollouts)}"
        )


def shape_scores(
    rollouts: Sequence[Rollout],
    algorithm: Algorithm,
    config: OnlineConfig,
    moments: RewardMoments,
) -> None:
    """Scale the scores and subtract penalties, in place; the moments take the scores in."""
    shaping = config.shaping
    scores = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
    moments.update(scores)
    shaped = scores
    if shaping.scale == "std":
        shaped = moments.scale(scores, clip=shaping.clip)
    elif shaping.scale == "normalise":
        shaped = moments.normalise(scores, clip=shaping.clip)
    finished = torch.tensor([rollout.finished for rollout in rollouts])
    lengths = torch.tensor([rollout.num_actions for rollout in rollouts])
    shaped = penalties.missing_eos(shaped, finished, penalty=shaping.missing_eos_penalty)
    shaped = shaped + penalties.length_penalty(lengths, per_token=shaping.length_penalty)
    shaped = shaped + penalties.soft_overlong(
        torch.tensor([rollout.max_turn_length for rollout in rollouts]),
        max_tokens=config.rollout.max_new_tokens,
        fraction=algorithm.settings.overlong_fraction,
    )
    for rollout, before, after in zip(rollouts, scores.tolist(), shaped.tolist(), strict=True):
        if shaping.scale == "none":
            rollout.pay(after - before)
        else:  # scaling acts on the turns' rewards alike; what is left goes on the last token
            factor = 1.0 / moments.std
            rollout.rewards = [factor * reward for reward in rollout.rewards]
            rollout.pay(after - rollout.score)


@torch.no_grad()
def prepare(session: Session, batch: Batch) -> Experience:
    """Score a batch under the policy and the reference, and assign credit."""
    algorithm = session.algorithm
    old, values, last, ref, entropy = _score_all(session, batch)
    rewards = penalized_rewards(
        algorithm,
        batch.rewards,
        batch.action_mask,
        old_logprobs=old,
        ref_logprobs=ref,
        kl_coef=session.kl.coef,
        costs=batch.costs if algorithm.constrained else None,
        multiplier=session.multiplier.value if session.multiplier else 0.0,
    )
    bootstrap = None if last is None else torch.where(batch.truncated, last, 0.0)
    credit = advantages_for(
        algorithm,
        rewards,
        batch.action_mask,
        groups=batch.groups,
        turns=batch.turns,
        values=values,
        bootstrap=bootstrap,
        old_logprobs=old,
        sampler_logprobs=batch.sampler_logprobs,
    )
    metrics = _mismatch(old, batch)
    if ref is not None:
        metrics["policy/kl"] = sequence_kl(old, ref, batch.action_mask).mean().item()
    if values is not None:
        explained = explained_variance(values, credit.returns, credit.mask)
        if math.isfinite(explained):  # nan while all returns are equal
            metrics["critic/explained_variance"] = explained
    return Experience(batch, credit, old, values, ref, entropy, metrics)


def _score_all(
    session: Session, batch: Batch
) -> tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor
]:
    """Log-probabilities, values, last values [B], reference log-probabilities, entropy; [B, T].

    The processes share the micro-batches; each ends with all of the tensors.
    """
    policy, reference, config = session.policy, session.reference, session.config
    old = torch.zeros(batch.tokens.shape, dtype=policy.logprob_dtype, device=policy.device)
    values, ref, entropy = (torch.zeros_like(old) for _ in range(3))
    last = torch.zeros(len(batch), dtype=policy.logprob_dtype, device=policy.device)
    parts = micro_batches(
        batch.tokens,
        batch.attention_mask,
        range(len(batch)),
        max_tokens=config.micro_batch_tokens,
        packed=policy.packs_rows(batch.attention_mask),
    )
    for rows in session.world.mine(parts):
        part = batch.rows(torch.tensor(rows, device=policy.device))
        inputs = (part.tokens, part.attention_mask, part.action_mask)
        width = part.tokens.shape[1]
        with session.watch("scoring"):
            scored = policy.score(
                *inputs,
                temperature=config.rollout.temperature,
                with_entropy=min(rows) < config.samples_per_step,
            )
        old[rows, :width] = scored.logprobs
        entropy[rows, :width] = scored.entropy
        if scored.values is not None and scored.last_value is not None:
            values[rows, :width] = scored.values
            last[rows] = scored.last_value
        if reference is not None:
            with session.watch("reference"):
                found = reference.logprobs(*inputs, temperature=config.rollout.temperature)
            ref[rows, :width] = found
    session.world.add((old, values, last, ref, entropy))
    has_critic = policy.value_head is not None
    return (
        old,
        values if has_critic else None,
        last if has_critic else None,
        ref if reference is not None else None,
        entropy,
    )


def _mismatch(old: torch.Tensor, batch: Batch) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's, in nats per token."""
    gap = (batch.sampler_logprobs - old)[batch.action_mask]
    return {
        "sampler/gap_mean": gap.mean().item(),
        "sampler/gap_abs": gap.abs().mean().item(),
        "sampler/ratio_max": gap.neg().max().exp().item(),
    }
