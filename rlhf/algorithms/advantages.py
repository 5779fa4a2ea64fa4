"""Credit assignment: how much better than expected each sampled token was.

All tensors are [B, T] unless said otherwise; index t describes token t; `mask` is True on sampled
tokens (the stop token included). Slots outside the mask may hold anything, nan included, and are 0
in the results. `values[:, t]` is the critic's value of the state in which token t was chosen.
Nothing here carries a gradient.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the sampled tokens (Schulman et al. 2016, eq. 16).

    Environment tokens are stepped over: credit passes them undecayed.

    Args:
        rewards: paid when token t was emitted; slots outside `mask` are ignored.
        values: the critic's values.
        mask: sampled tokens.
        bootstrap: [B], value of the state after the last token: the critic's where the episode was
            truncated, 0 where it terminated.
        gamma: discount per sampled token.
        lam: 1 for returns minus values, 0 for one-step differences.

    Returns:
        Advantages, and returns (advantages + values, the critic's target).
    """
    gammas = torch.full_like(values, gamma)
    lams = torch.full_like(values, lam)
    return _gae(rewards, values, mask, bootstrap, gammas, lams)


@torch.no_grad()
def turn_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    turns: Tensor,
    bootstrap: Tensor,
    *,
    gamma: float,
    lam: float,
    turn_gamma: float,
    turn_lam: float,
) -> tuple[Tensor, Tensor]:
    """GAE with its own discount and lambda on the step from one turn to the next.

    Two time scales as in the bi-level estimator of RAGEN and VAGEN (Wang et al. 2025): with
    `gamma = lam = 1` credit spreads over a turn undecayed and decays only from turn to turn. With
    equal constants it is `gae`.

    Args:
        rewards: as in `gae`, like `values`, `mask` and `bootstrap`.
        values: see above.
        mask: see above.
        turns: integer turn of each token; read only where `mask`.
        bootstrap: [B].
        gamma: discount from token to token inside a turn.
        lam: lambda inside a turn.
        turn_gamma: discount from a turn's last token on.
        turn_lam: lambda from a turn's last token on.
    """
    last = last_of_turn(mask, turns)
    gammas = torch.where(last, turn_gamma, torch.full_like(values, gamma))
    lams = torch.where(last, turn_lam, torch.full_like(values, lam))
    return _gae(rewards, values, mask, bootstrap, gammas, lams)


def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gammas: Tensor, lams: Tensor
) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(values)
    next_value, next_advantage = bootstrap.to(values.dtype), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        on, discount = mask[:, t], gammas[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lams[:, t] * next_advantage
        advantages[:, t] = torch.where(on, advantage, 0.0)
        next_value = torch.where(on, values[:, t], next_value)
        next_advantage = torch.where(on, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def last_of_turn(mask: Tensor, turns: Tensor) -> Tensor:
    """Sampled tokens whose next sampled token belongs to another turn, the final one included."""
    last = torch.zeros_like(mask)
    next_turn = torch.full_like(turns[:, 0], -1)
    for t in reversed(range(mask.shape[1])):
        last[:, t] = mask[:, t] & (turns[:, t] != next_turn)
        next_turn = torch.where(mask[:, t], turns[:, t], next_turn)
    return last


@torch.no_grad()
def trajectory_return(rewards: Tensor, mask: Tensor) -> Tensor:
    """Undiscounted return of each episode, [B]; nan where the episode could not be scored."""
    return torch.where(mask, rewards, 0.0).sum(dim=1)


@torch.no_grad()
def return_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each sampled token on."""
    result = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * following
        result[:, t] = torch.where(mask[:, t], here, 0.0)
        following = torch.where(mask[:, t], here, following)
    return result


@torch.no_grad()
def group_relative(scores: Tensor, groups: Tensor, *, scale_by_std: bool) -> Tensor:
    """Score minus the mean of its group, [B] (GRPO, Shao et al. 2024, section 4.1.2).

    With `scale_by_std`, also divided by the group's sample standard deviation + 1e-4; without, this
    is Dr. GRPO (Liu et al. 2025). Unscored episodes (nan) leave the mean and get 0, as do groups
    whose scores are all equal (where rounding would otherwise be blown up).
    """
    clean, scored, inverse, count = _by_group(scores, groups)
    mean = _group_sum(clean, inverse) / count.clamp(min=1)
    centred = torch.where(scored & informative_groups(scores, groups), clean - mean, 0.0)
    if not scale_by_std:
        return centred
    variance = _group_sum(centred.square(), inverse) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


@torch.no_grad()
def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Score minus the mean of the *others* of its group, [B] (RLOO, Ahmadian et al. 2024).

    The baseline does not depend on the episode itself, so the gradient is unbiased. Unscored
    episodes, and those without another scored one in their group, get 0.
    """
    others = mean_of_others(scores, groups)
    return torch.where(scores.isnan() | others.isnan(), 0.0, scores - others)


@torch.no_grad()
def mean_of_others(scores: Tensor, groups: Tensor) -> Tensor:
    """Mean score of the other scored episodes of the group, [B]; nan where there is none."""
    clean, scored, inverse, count = _by_group(scores, groups)
    others = count - scored.to(count.dtype)
    return torch.where(others > 0, (_group_sum(clean, inverse) - clean) / others, torch.nan)


@torch.no_grad()
def group_return_to_go(
    rewards: Tensor, mask: Tensor, turns: Tensor, groups: Tensor, *, gamma: float
) -> Tensor:
    """Return to go minus what the group's *other* episodes still earned from the same turn on.

    The baseline of a token in turn k is the mean, over the other scored episodes that reached turn
    k, of their return to go at that turn's first token; 0 where there is none. It never looks at
    the episode it serves, so the gradient stays unbiased even where the policy itself decides
    whether there is another turn; comparing each turn's reward with the group's at the same turn
    index gives a stopping decision no credit at all.
    """
    scored = ~trajectory_return(rewards, mask).isnan()
    onward = return_to_go(torch.where(scored[:, None], rewards, 0.0), mask, gamma=gamma)
    baseline = torch.zeros_like(onward)
    for turn in torch.unique(turns[mask]).tolist():
        here = mask & (turns == turn)
        first = here & (here.cumsum(dim=1) == 1)
        at_turn = torch.where(first, onward, 0.0).sum(dim=1)
        at_turn = torch.where(scored & here.any(dim=1), at_turn, torch.nan)
        others = mean_of_others(at_turn, groups).nan_to_num(nan=0.0)
        baseline = torch.where(here, others[:, None], baseline)
    return torch.where(mask & scored[:, None], onward - baseline, 0.0)


@torch.no_grad()
def best_of_group(scores: Tensor, groups: Tensor) -> Tensor:
    """Weight of each episode in best-of-n distillation, [B]: 1 for the group's best, else 0.

    Tied winners share the weight. A group whose scores are all equal has no winner: learning its
    members would only add noise. (RAFT, Dong et al. 2023, algorithm 1.)
    """
    best = scores == _group_extreme(scores, groups, largest=True)
    best &= informative_groups(scores, groups)
    weight = best.to(scores.dtype)
    _, inverse = torch.unique(groups, return_inverse=True)
    return weight / _group_sum(weight, inverse).clamp(min=1)


@torch.no_grad()
def best_and_worst(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """One pair per group: its best and its worst episode, the first of each where tied.

    Returns:
        Score differences [B]: +d for the best, -d for the worst, 0 for all others; and the index of
        each episode's partner [B], its own index where it is in no pair. Groups whose scores are
        all equal give none.
    """
    _, inverse = torch.unique(groups, return_inverse=True)
    rows = torch.arange(len(scores), device=scores.device)
    low = _group_extreme(scores, groups, largest=False)
    high = _group_extreme(scores, groups, largest=True)
    first_low, first_high = (
        torch.full_like(rows, len(rows)).scatter_reduce(
            0, inverse, torch.where(scores == extreme, rows, len(rows)), reduce="amin"
        )[inverse]
        for extreme in (low, high)
    )
    best, worst = (rows == first_high) & (low < high), (rows == first_low) & (low < high)
    difference = torch.where(best, high - low, torch.where(worst, low - high, 0.0))
    partner = torch.where(best, first_low, torch.where(worst, first_high, rows))
    return difference, partner


@torch.no_grad()
def informative_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Episodes whose group has at least two different scores, [B] bool.

    The others carry no preference; DAPO's dynamic sampling replaces them (Yu et al. 2025, 3.2).
    """
    low = _group_extreme(scores, groups, largest=False)
    return low < _group_extreme(scores, groups, largest=True)


def _by_group(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores with nan as 0, which are scored, group index, scored members of the group; [B]."""
    scored = ~scores.isnan()
    _, inverse = torch.unique(groups, return_inverse=True)
    count = _group_sum(scored.to(scores.dtype), inverse)
    return torch.where(scored, scores, 0.0), scored, inverse, count


def _group_sum(values: Tensor, inverse: Tensor) -> Tensor:
    """Each row's group total, [B]."""
    totals = torch.zeros_like(values).index_add_(0, inverse, values)
    return totals[inverse]


def _group_extreme(scores: Tensor, groups: Tensor, *, largest: bool) -> Tensor:
    """Each row's group maximum or minimum over scored members, [B]."""
    _, inverse = torch.unique(groups, return_inverse=True)
    worst = -torch.inf if largest else torch.inf
    clean = torch.where(scores.isnan(), worst, scores)
    result = torch.full_like(scores, worst)
    result = result.scatter_reduce(0, inverse, clean, reduce="amax" if largest else "amin")
    return result[inverse]


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0, variance 1 over the whole batch's masked slots.

    The variance is the biased one, as in lm-human-preferences. On several processes gather the
    batch first. REINFORCE++ normalises its advantages like this (Hu et al. 2025).
    """
    mean, scale = _moments(values, mask)
    return torch.where(mask, (values - mean) * scale, 0.0)


@torch.no_grad()
def scale_to_unit_variance(values: Tensor, mask: Tensor) -> Tensor:
    """As `whiten`, but the mean stays where it is (rewards in lm-human-preferences)."""
    mean, scale = _moments(values, mask)
    return torch.where(mask, (values - mean) * scale + mean, 0.0)


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    variance = torch.where(mask, (values - mean).square(), 0.0).sum() / count
    return mean, torch.rsqrt(variance + 1e-8)


@torch.no_grad()
def truncated_importance_weights(
    advantages: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Advantages times min(pi_old / pi_sampler, cap), token by token.

    The tokens were drawn by a sampler whose arithmetic differs a little from the trainer's, so that
    even the first step is off policy; the weight makes up for it, the cap bounds its variance
    (truncated importance sampling, Ionides 2008; for this gap Yao et al. 2025, with cap 2).
    """
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, 0.0)
    return torch.where(mask, advantages * log_ratio.exp().clamp(max=cap), 0.0)


def broadcast_to_tokens(scores: Tensor, mask: Tensor) -> Tensor:
    """Give every sampled token of an episode the episode's number: [B] to [B, T]."""
    return torch.where(mask, scores[:, None], 0.0)
