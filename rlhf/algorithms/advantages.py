"""Advantage estimators.

An advantage measures by how much a sampled token was better than the expectation.

An estimator is a decorated function of a `TrainingBatch` and the settings; the setting `advantage`
selects an estimator by name. All tensors are [B, T] unless stated otherwise; index t describes
token t. Entries outside the action mask may have any value, nan included, and are 0 in the results.
`values[:, t]` is the critic's value of the state in which token t was chosen. Results have no
gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch, dense_index
from rlhf.algorithms.components import advantage
from rlhf.algorithms.kl import kl_estimate_per_token
from rlhf.algorithms.off_policy import (
    is_mean_ratio_in_band,
    old_to_sampler_log_ratio,
    truncated_importance_weights,
)
from rlhf.algorithms.settings import Settings

SCORE_TOLERANCE = 1e-6
"""Scores of a group count as equal up to this relative difference, about 8 float32 epsilons."""


class Advantages(NamedTuple):
    """Result of an advantage estimator."""

    advantages: Tensor
    """[B, T], or [B] if all tokens of an episode have the same advantage."""
    returns: Tensor | None = None
    """[B, T], regression targets of the critic; None if the estimator has no critic."""
    included: Tensor | None = None
    """[B], True for episodes that the losses include; None if all episodes are included."""
    pair_ids: Tensor | None = None
    """[B] integers, equal for the two episodes of a pair; None if there are no pairs."""


@torch.no_grad()
def estimate_advantages(
    algorithm: Algorithm, batch: TrainingBatch, *, kl_coef: float = 0.0, multiplier: float = 0.0
) -> TrainingBatch:
    """Return the batch with `advantages`, `returns`, `loss_mask` and `pair_ids` computed.

    Baselines and whitening use the whole batch. With several processes, the caller must gather the
    batch of all processes first. An episode with a nan reward could not be scored. It is excluded
    from baselines and losses. Whitened advantages are multiplied by the weights of `tis_cap`, and
    episodes outside the sequence mask are then excluded from `loss_mask`.

    Args:
        algorithm: The algorithm and its settings.
        batch: Rollouts with their rewards, and with the fields that the algorithm needs (see
            `Algorithm.needs_critic`, `.needs_groups`, `.needs_reference` and `.constrained`).
        kl_coef: Current coefficient of the KL penalty.
        multiplier: Current Lagrange multiplier of the cost.

    Raises:
        ValueError: The algorithm needs a field of the batch that is None.
    """
    settings = algorithm.settings
    rewards = penalized_rewards(algorithm, batch, kl_coef=kl_coef, multiplier=multiplier)
    penalized = replace(batch, rewards=rewards)
    result = algorithm.advantage_estimator.function(penalized, settings)
    included = ~penalized.scores().isnan()
    if result.included is not None:
        included &= result.included
    mask = batch.action_mask & included[:, None]
    advantages = result.advantages
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = torch.where(mask, advantages, 0.0)
    returns = torch.zeros_like(advantages)
    if result.returns is not None:
        returns = torch.where(mask, result.returns, 0.0)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    if settings.tis_cap or settings.masks_sequences:
        log_ratio = old_to_sampler_log_ratio(batch, mask)
        if settings.tis_cap:
            weights = truncated_importance_weights(log_ratio, cap=settings.tis_cap)
            advantages = advantages * weights
        if settings.masks_sequences:
            mask = mask & is_mean_ratio_in_band(log_ratio, mask, settings)[:, None]
            advantages = torch.where(mask, advantages, 0.0)
            returns = torch.where(mask, returns, 0.0)
    pair_ids = result.pair_ids
    if pair_ids is None:
        pair_ids = torch.arange(len(mask), device=mask.device)
    return replace(batch, advantages=advantages, returns=returns, loss_mask=mask, pair_ids=pair_ids)


@torch.no_grad()
def penalized_rewards(
    algorithm: Algorithm, batch: TrainingBatch, *, kl_coef: float = 0.0, multiplier: float = 0.0
) -> Tensor:
    """Return the rewards minus the penalties for the KL to the reference and for the cost, [B, T].

    Rewards outside the action mask count as 0. The KL is subtracted only if `kl_placement` is
    reward.
    For an algorithm with a cost constraint, the result is (reward - kl_coef KL - multiplier cost) /
    (1 + multiplier). The division keeps the scale of the reward (Safe RLHF, Dai et al. 2023).
    """
    mask = batch.action_mask
    rewards = torch.where(mask, batch.require("rewards"), 0.0)
    if algorithm.kl_in_reward and kl_coef:
        rewards = rewards - kl_coef * kl_estimate_per_token(
            batch.require("old_logprobs"),
            batch.require("ref_logprobs"),
            mask,
            estimator=algorithm.settings.kl_estimator,
        )
    if algorithm.constrained:
        penalty = multiplier * torch.where(mask, batch.require("costs"), 0.0)
        rewards = (rewards - penalty) / (1.0 + multiplier)
    return rewards


@advantage(
    "gae",
    "generalized advantage estimation over tokens",
    reads=("gamma", "lam", "whiten_advantages"),
    critic=True,
)
def gae(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Compute generalized advantages over the sampled tokens (Schulman et al. 2016, eq. 16).

    Environment tokens are not counted as time steps, so they do not discount later rewards.
    """
    values = batch.require("values")
    gammas = torch.full_like(values, settings.gamma)
    lams = torch.full_like(values, settings.lam)
    return _gae(batch, gammas, lams)


@advantage(
    "turn_gae",
    "GAE with a separate gamma and lambda between turns",
    reads=("gamma", "lam", "turn_gamma", "turn_lam", "whiten_advantages"),
    critic=True,
)
def turn_gae(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Compute GAE with a separate discount and lambda for the step from one turn to the next.

    The estimator is similar to the bi-level GAE of RAGEN and VAGEN (Wang et al. 2025), which
    computes turns and tokens in two passes. Here, one backward pass over the tokens computes all
    advantages. With `gamma = lam = 1`, rewards are discounted from turn to turn, but not within a
    turn. With `turn_gamma = gamma` and `turn_lam = lam`, the result equals `gae`.
    """
    values = batch.require("values")
    last = is_last_token_of_turn(batch.action_mask, batch.require("turns"))
    gammas = torch.where(last, settings.turn_gamma, torch.full_like(values, settings.gamma))
    lams = torch.where(last, settings.turn_lam, torch.full_like(values, settings.lam))
    return _gae(batch, gammas, lams)


def _gae(batch: TrainingBatch, gammas: Tensor, lams: Tensor) -> Advantages:
    """Compute GAE with the discount and the lambda of each token, both [B, T]."""
    values, rewards, mask = batch.require("values"), batch.require("rewards"), batch.action_mask
    advantages = torch.zeros_like(values)
    next_value = batch.require("bootstrap").to(values.dtype)
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        sampled, discount = mask[:, t], gammas[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lams[:, t] * next_advantage
        advantages[:, t] = torch.where(sampled, advantage, 0.0)
        next_value = torch.where(sampled, values[:, t], next_value)
        next_advantage = torch.where(sampled, advantage, next_advantage)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


@torch.no_grad()
def is_last_token_of_turn(mask: Tensor, turns: Tensor) -> Tensor:
    """Return a [B, T] bool tensor that is True at the last sampled token of each turn."""
    last = torch.zeros_like(mask)
    next_turn = torch.full_like(turns[:, 0], -1)
    for t in reversed(range(mask.shape[1])):
        last[:, t] = mask[:, t] & (turns[:, t] != next_turn)
        next_turn = torch.where(mask[:, t], turns[:, t], next_turn)
    return last


@advantage(
    "trajectory_return",
    "the undiscounted return of the episode, for every token",
    reads=("whiten_advantages",),
)
def trajectory_return(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return the undiscounted return of each episode, [B] (REINFORCE, Williams 1992)."""
    return Advantages(batch.scores())


@advantage(
    "return_to_go", "discounted return from the token on", reads=("gamma", "whiten_advantages")
)
def return_to_go(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return the discounted sum of the current and later rewards at each sampled token."""
    rewards = batch.require("rewards")
    return Advantages(discounted_returns_to_go(rewards, batch.action_mask, gamma=settings.gamma))


@torch.no_grad()
def discounted_returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return the discounted sum of the current and later rewards at each sampled token, [B, T].

    Only sampled tokens count as time steps of the discount `gamma`. The result is 0 at other
    tokens.
    """
    result = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        current = rewards[:, t] + gamma * following
        result[:, t] = torch.where(mask[:, t], current, 0.0)
        following = torch.where(mask[:, t], current, following)
    return result


@advantage(
    "group_relative",
    "return minus the mean return of the group",
    reads=("scale_by_std", "whiten_advantages"),
    groups=True,
)
def group_relative(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return each episode's score minus the mean score of its group, [B].

    With `scale_by_std`, the difference is divided by the group's sample standard deviation + 1e-4
    (GRPO, Shao et al. 2024, sec. 4.1.2). Without `scale_by_std`, the estimator is that of Dr. GRPO
    (Liu et al. 2025). Unscored episodes (nan) are excluded from the mean and have advantage 0.
    Episodes of groups with equal scores also have advantage 0, because scaling would amplify
    rounding errors.
    """
    scores, groups = batch.scores(), batch.require("groups")
    clean, scored, group_index, count = _scores_and_group_counts(scores, groups)
    mean = _sum_over_own_group(clean, group_index) / count.clamp(min=1)
    centered = torch.where(scored & in_group_with_unequal_scores(scores, groups), clean - mean, 0.0)
    if not settings.scale_by_std:
        return Advantages(centered)
    variance = _sum_over_own_group(centered.square(), group_index) / (count - 1).clamp(min=1)
    return Advantages(centered / (variance.sqrt() + 1e-4))


@advantage(
    "leave_one_out",
    "return minus the mean return of the other episodes of the group",
    reads=("whiten_advantages",),
    groups=True,
)
def leave_one_out(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return the score minus the mean of the group's *other* scores (RLOO, Ahmadian et al. 2024).

    The baseline does not depend on the episode itself, so the gradient is unbiased. The advantages
    [B] are 0 for unscored episodes, and for episodes without another scored episode in their group.
    """
    scores = batch.scores()
    others = mean_of_others(scores, batch.require("groups"))
    return Advantages(torch.where(scores.isnan() | others.isnan(), 0.0, scores - others))


@torch.no_grad()
def mean_of_others(scores: Tensor, groups: Tensor) -> Tensor:
    """Return for each episode the mean score of the other scored episodes of its group, [B].

    The mean is nan for an episode whose group has no other scored episode.
    """
    clean, scored, group_index, count = _scores_and_group_counts(scores, groups)
    others = count - scored.to(count.dtype)
    return torch.where(
        others > 0, (_sum_over_own_group(clean, group_index) - clean) / others, torch.nan
    )


@advantage(
    "group_return_to_go",
    "return from the token on, minus the mean return of the other episodes from the start of the "
    "same turn on",
    reads=("gamma", "whiten_advantages"),
    groups=True,
)
def return_to_go_minus_group_mean(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return the return to go minus the mean return to go of the *other* episodes of the group.

    The baseline of a token in turn k is the mean return to go at the first token of turn k, over
    the other scored episodes of the group that have a turn k. The baseline is 0 if there is no such
    episode. The baseline does not depend on the episode itself, so the gradient is unbiased even if
    the policy determines the number of turns. If only the rewards of turn k were compared, the
    decision to end the episode would get no credit.
    """
    mask, turns, groups = batch.action_mask, batch.require("turns"), batch.require("groups")
    scored = ~batch.scores().isnan()
    rewards = torch.where(scored[:, None], batch.require("rewards"), 0.0)
    onward = discounted_returns_to_go(rewards, mask, gamma=settings.gamma)
    baseline = torch.zeros_like(onward)
    for turn in range(int(turns.max()) + 1):
        in_turn = mask & (turns == turn)
        first = in_turn & (in_turn.cumsum(dim=1) == 1)
        at_turn = torch.where(first, onward, 0.0).sum(dim=1)
        at_turn = torch.where(scored & in_turn.any(dim=1), at_turn, torch.nan)
        others = mean_of_others(at_turn, groups).nan_to_num(nan=0.0)
        baseline = torch.where(in_turn, others[:, None], baseline)
    return Advantages(torch.where(mask & scored[:, None], onward - baseline, 0.0))


@advantage(
    "best_of_group",
    "1 for the best episode of the group; the other episodes are excluded from the loss",
    groups=True,
)
def best_of_group_indicator(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Return 1 for the best episode of each group and 0 for others (best-of-n distillation).

    This is RAFT (Dong et al. 2023, algorithm 1). If k episodes have the best score, each has
    advantage 1/k. A group with equal scores is excluded, because it would only add noise to the
    gradient.
    """
    scores, groups = batch.scores(), batch.require("groups")
    high = _max_or_min_of_own_group(scores, groups, largest=True)
    best = (scores >= high - SCORE_TOLERANCE * high.abs()) & in_group_with_unequal_scores(
        scores, groups
    )
    weight = best.to(scores.dtype)
    group_index = dense_index(groups)
    weight = weight / _sum_over_own_group(weight, group_index).clamp(min=1)
    return Advantages(weight, included=weight > 0)


@advantage(
    "best_and_worst",
    "the best and the worst episode of the group form a preference pair",
    groups=True,
    pairs=True,
)
def pair_best_and_worst_of_group(batch: TrainingBatch, settings: Settings) -> Advantages:
    """Pair the best and the worst episode of each group.

    If several episodes have the best or the worst score, the first of them is used. Let d be the
    difference of the two scores. The advantages [B] are d for the best episode, -d for the worst
    episode, and 0 for all other episodes. Groups with equal scores have no pair.
    """
    scores, groups = batch.scores(), batch.require("groups")
    group_index = dense_index(groups)
    rows = torch.arange(len(scores), device=scores.device)
    low = _max_or_min_of_own_group(scores, groups, largest=False)
    high = _max_or_min_of_own_group(scores, groups, largest=True)
    first_low, first_high = (
        torch.full_like(rows, len(rows)).scatter_reduce(
            0, group_index, torch.where(scores == extreme, rows, len(rows)), reduce="amin"
        )[group_index]
        for extreme in (low, high)
    )
    informative = in_group_with_unequal_scores(scores, groups)
    best, worst = (rows == first_high) & informative, (rows == first_low) & informative
    difference = torch.where(best, high - low, torch.where(worst, low - high, 0.0))
    partner = torch.where(best, first_low, torch.where(worst, first_high, rows))
    return Advantages(difference, included=partner != rows, pair_ids=torch.minimum(rows, partner))


@torch.no_grad()
def in_group_with_unequal_scores(scores: Tensor, groups: Tensor) -> Tensor:
    """Return whether the scores of each episode's group are not all equal, [B].

    The advantages of `group_relative` are 0 in groups with equal scores. DAPO's dynamic sampling
    replaces these groups (Yu et al. 2025, section 3.2). Scores that differ only by rounding errors,
    such as sums of the same rewards in a different order, count as equal.
    """
    low = _max_or_min_of_own_group(scores, groups, largest=False)
    high = _max_or_min_of_own_group(scores, groups, largest=True)
    return high - low > SCORE_TOLERANCE * torch.maximum(low.abs(), high.abs())


class _ScoresAndGroupCounts(NamedTuple):
    """Scores of B episodes with statistics of their groups; all fields are [B]."""

    scores: Tensor
    """Scores, with 0 instead of nan."""
    scored: Tensor
    """Whether the episode has a score."""
    group_index: Tensor
    """Index of the episode's group."""
    num_scored: Tensor
    """Number of scored episodes in the group."""


def _scores_and_group_counts(scores: Tensor, groups: Tensor) -> _ScoresAndGroupCounts:
    """Return the scores without nan, and the number of scored episodes of each group."""
    scored = ~scores.isnan()
    group_index = dense_index(groups)
    count = _sum_over_own_group(scored.to(scores.dtype), group_index)
    return _ScoresAndGroupCounts(torch.where(scored, scores, 0.0), scored, group_index, count)


def _sum_over_own_group(values: Tensor, group_index: Tensor) -> Tensor:
    """Return for each episode the sum of `values` [B] over the episode's group, [B]."""
    totals = torch.zeros_like(values).index_add_(0, group_index, values)
    return totals[group_index]


def _max_or_min_of_own_group(scores: Tensor, groups: Tensor, *, largest: bool) -> Tensor:
    """Return the maximum (`largest`) or minimum score of each episode's group, [B].

    Unscored episodes (nan) are ignored. If a group has no other episodes, its maximum is -inf and
    its minimum inf.
    """
    group_index = dense_index(groups)
    worst = -torch.inf if largest else torch.inf
    clean = torch.where(scores.isnan(), worst, scores)
    result = torch.full_like(scores, worst)
    result = result.scatter_reduce(0, group_index, clean, reduce="amax" if largest else "amin")
    return result[group_index]


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values, shifted and scaled to mean 0 and variance 1 over `mask`, and 0 outside.

    The divisor of the variance is the number of values N instead of N - 1, as in
    lm-human-preferences. REINFORCE++ normalizes its advantages in this way (Hu et al. 2025).
    """
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    variance = torch.where(mask, (values - mean).square(), 0.0).sum() / count
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)
