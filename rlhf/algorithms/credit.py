"""From rewards to advantages, by an algorithm's row; see `registry` for how the loop calls it.

All tensors are [B, T] unless said otherwise: rows are episodes, index t describes token t, `mask`
is True on sampled tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.algorithms import advantages as credit_of
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.registry import Algorithm
from rlhf.algorithms.settings import Settings


@dataclass(frozen=True)
class Credit:
    """What a batch of rollouts teaches."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T], the critic's targets; zeros without a critic
    mask: Tensor  # [B, T], sampled tokens that take part in the losses
    units: Tensor  # [B], rows with equal numbers must share a micro-batch

    def rows(self, index: Tensor | slice) -> "Credit":
        """Some of the episodes."""
        return Credit(
            self.advantages[index], self.returns[index], self.mask[index], self.units[index]
        )


@dataclass(frozen=True)
class _Rollouts:
    rewards: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    groups: Tensor | None  # [B]
    turns: Tensor | None  # [B, T]
    values: Tensor | None  # [B, T]
    bootstrap: Tensor | None  # [B]

    @property
    def scores(self) -> Tensor:
        return credit_of.trajectory_return(self.rewards, self.mask)

    def get(self, name: str) -> Tensor:
        return needed(getattr(self, name), name)


def needed(value: Tensor | None, name: str) -> Tensor:
    """`value`, or a ValueError that names what the algorithm cannot do without."""
    if value is None:
        raise ValueError(f"this algorithm needs {name}")
    return value


@torch.no_grad()
def penalized_rewards(
    algorithm: Algorithm,
    rewards: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    costs: Tensor | None = None,
    multiplier: float = 0.0,
) -> Tensor:
    """Rewards less what the row charges: divergence from the reference, and cost.

    The Lagrangian r - kl_coef KL - multiplier cost is divided by 1 + multiplier, so that its scale
    stays that of the reward (Safe RLHF, Dai et al. 2023).
    """
    shaped = torch.where(mask, rewards, 0.0)
    if algorithm.kl_in_reward:
        shaped = shaped - kl_coef * kl_estimate(
            needed(old_logprobs, "old_logprobs"),
            needed(ref_logprobs, "ref_logprobs"),
            mask,
            estimator=algorithm.settings.kl_estimator,
        )
    if algorithm.constrained:
        charged = multiplier * torch.where(mask, needed(costs, "costs"), 0.0)
        shaped = (shaped - charged) / (1.0 + multiplier)
    return shaped


@torch.no_grad()
def advantages_for(
    algorithm: Algorithm,
    rewards: Tensor,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
    turns: Tensor | None = None,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
) -> Credit:
    """Advantages, the critic's targets, and which tokens take part.

    Args:
        algorithm: a configured row.
        rewards: from `penalized_rewards`. A nan anywhere in an episode means that it could not be
            scored: it leaves the baseline and the loss.
        mask: sampled tokens.
        groups: [B] integers, equal for rollouts from one start state.
        turns: integer turn of each token.
        values: the critic's, at rollout.
        bootstrap: [B], the critic's value of the last state where truncated, else 0.
        old_logprobs: the trainer's, at rollout; needed where `mismatch_cap` is not 0.
        sampler_logprobs: those the tokens were really drawn with; needed there too.
    """
    settings = algorithm.settings
    scored = ~credit_of.trajectory_return(rewards, mask).isnan()
    live = mask & scored[:, None]
    rollouts = _Rollouts(rewards, mask, groups, turns, values, bootstrap)
    credit = _ADVANTAGES[settings.advantage](rollouts, settings, live)
    if settings.whiten_advantages:
        whitened = credit_of.whiten(credit.advantages, credit.mask)
        credit = replace(credit, advantages=whitened)
    if settings.mismatch_cap:
        corrected = credit_of.truncated_importance_weights(
            credit.advantages,
            needed(old_logprobs, "old_logprobs"),
            needed(sampler_logprobs, "sampler_logprobs"),
            credit.mask,
            cap=settings.mismatch_cap,
        )
        credit = replace(credit, advantages=corrected)
    return credit


def _credit(advantages: Tensor, mask: Tensor, returns: Tensor | None = None) -> Credit:
    zeros = torch.zeros_like(advantages)
    return Credit(
        torch.where(mask, advantages, 0.0),
        zeros if returns is None else torch.where(mask, returns, 0.0),
        mask,
        torch.arange(len(mask), device=mask.device),
    )


def _gae(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    advantages, returns = credit_of.gae(
        r.rewards, r.get("values"), r.mask, r.get("bootstrap"), gamma=s.gamma, lam=s.lam
    )
    return _credit(advantages, live, returns)


def _turn_gae(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    advantages, returns = credit_of.turn_gae(
        r.rewards,
        r.get("values"),
        r.mask,
        r.get("turns"),
        r.get("bootstrap"),
        gamma=s.gamma,
        lam=s.lam,
        turn_gamma=s.turn_gamma,
        turn_lam=s.turn_lam,
    )
    return _credit(advantages, live, returns)


def _trajectory_return(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    return _credit(credit_of.broadcast_to_tokens(r.scores, live), live)


def _return_to_go(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    return _credit(credit_of.return_to_go(r.rewards, r.mask, gamma=s.gamma), live)


def _group_relative(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    scores = credit_of.group_relative(r.scores, r.get("groups"), scale_by_std=s.scale_by_std)
    return _credit(credit_of.broadcast_to_tokens(scores, live), live)


def _leave_one_out(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    scores = credit_of.leave_one_out(r.scores, r.get("groups"))
    return _credit(credit_of.broadcast_to_tokens(scores, live), live)


def _group_return_to_go(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    advantages = credit_of.group_return_to_go(
        r.rewards, r.mask, r.get("turns"), r.get("groups"), gamma=s.gamma
    )
    return _credit(advantages, live)


def _best_of_group(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    weights = credit_of.best_of_group(r.scores, r.get("groups"))
    chosen = live & (weights > 0)[:, None]
    return _credit(credit_of.broadcast_to_tokens(weights, chosen), chosen)


def _best_and_worst(r: _Rollouts, s: Settings, live: Tensor) -> Credit:
    differences, partners = credit_of.best_and_worst(r.scores, r.get("groups"))
    paired = live & (partners != torch.arange(len(live), device=live.device))[:, None]
    credit = _credit(credit_of.broadcast_to_tokens(differences, paired), paired)
    units = torch.minimum(credit.units, partners)
    return Credit(credit.advantages, credit.returns, credit.mask, units)


_ADVANTAGES: dict[str, Callable[[_Rollouts, Settings, Tensor], Credit]] = {
    "gae": _gae,
    "turn_gae": _turn_gae,
    "trajectory_return": _trajectory_return,
    "return_to_go": _return_to_go,
    "group_relative": _group_relative,
    "leave_one_out": _leave_one_out,
    "group_return_to_go": _group_return_to_go,
    "best_of_group": _best_of_group,
    "best_and_worst": _best_and_worst,
}
