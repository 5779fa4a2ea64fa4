"""Tiny tasks small enough to list every episode, and exact expectations over them.

A turn samples tokens until the stop token 0 or two tokens; then the environment writes one of two
tokens with fixed chances and the next turn starts. An empty turn (stop at once) quits the episode,
so the policy decides how many turns there are. Everything is float64, and slots outside the mask
are nan, so that a leak cannot go unseen.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss
from tests.algorithms.batches import batch_of

BETA = 0.3  # weight of the divergence
STOP, VOCABULARY = 0, 3
ENVIRONMENT = {3: 0.3, 4: 0.7}  # environment token -> chance
TURNS_OF_SAMPLING = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


@dataclass(frozen=True)
class Task:
    """Every episode of a task."""

    tokens: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    turns: Tensor  # [N, T]
    rewards: Tensor  # [N, T], nan outside the mask
    chance: Tensor  # [N], of the environment's part

    @property
    def returns(self) -> Tensor:
        return self.rewards.nan_to_num(nan=0.0).sum(1)


def make_bandit(returns: list[float]) -> Task:
    """One turn of one token; token k pays `returns[k]`."""
    column = torch.tensor(returns, dtype=torch.float64)[:, None]
    tokens = torch.arange(len(returns))[:, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Task(tokens, mask, torch.zeros_like(tokens), column, torch.ones(len(returns)).double())


def make_task(*, num_turns: int, seed: int) -> Task:
    """All episodes; each turn pays a random reward that depends on everything so far."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[list, float]] = []

    def extend(prefix: list, chance: float, turn: int) -> None:
        for sampled in TURNS_OF_SAMPLING:
            reward = float(torch.randn((), generator=generator, dtype=torch.float64))
            row = prefix + [(token, True, turn, 0.0) for token in sampled]
            row[-1] = (*row[-1][:3], reward)
            if turn + 1 == num_turns or sampled == (STOP,):
                rows.append((row, chance))
                continue
            for token, probability in ENVIRONMENT.items():
                extend([*row, (token, False, turn, float("nan"))], chance * probability, turn + 1)

    extend([], 1.0, 0)
    length = max(len(row) for row, _ in rows)
    pad = (STOP, False, -1, float("nan"))
    padded = [row + [pad] * (length - len(row)) for row, _ in rows]
    fields = [torch.tensor([[slot[i] for slot in row] for row in padded]) for i in range(4)]
    chances = torch.tensor([chance for _, chance in rows], dtype=torch.float64)
    return Task(fields[0], fields[1], fields[2], fields[3].double(), chances)


class AnyPolicy(nn.Module):
    """What the helpers need of a policy."""

    def logprobs(self, task: Task) -> Tensor:
        """Log-probability of every token of every episode, [N, T]."""
        raise NotImplementedError


class Policy(AnyPolicy):
    """A two-layer network on a summary of the history; states share its parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table, self.place, self.head = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in [(6, 6, 5), (8, 5), (5, VOCABULARY)]  # last two tokens, index -> hidden
        )

    def distribution(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the token at each index, given those before it, [N, T, V]."""
        start = torch.full((len(tokens), 2), 5)
        shifted = torch.cat([start, tokens], dim=1)
        hidden = self.table[shifted[:, :-2], shifted[:, 1:-1]] + self.place[: tokens.shape[1]]
        return (torch.tanh(hidden) @ self.head).log_softmax(-1)

    def logprobs(self, task: Task) -> Tensor:
        """[N, T]; environment tokens get the log-probability of token 0, which nobody may use."""
        chosen = torch.where(task.mask, task.tokens, 0)
        return self.distribution(task.tokens).gather(2, chosen[..., None])[..., 0]


def probabilities(task: Task, logprobs: Tensor) -> Tensor:
    """Chance of each episode, [N]; differentiable."""
    return task.chance * torch.where(task.mask, logprobs, 0.0).sum(1).exp()


def gradient(value: Tensor, policy: AnyPolicy) -> Tensor:
    """Flat gradient of a scalar with respect to the policy's parameters."""
    parts = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(policy.parameters(), parts, strict=True)
        ]
    )


def objective(task: Task, policy: AnyPolicy, reference: AnyPolicy, *, beta: float) -> Tensor:
    """Expected return less beta times KL(policy || reference), summed over all episodes."""
    logprobs = policy.logprobs(task)
    ratio = logprobs - reference.logprobs(task).detach()
    divergence = torch.where(task.mask, ratio, 0.0).sum(1)
    return (probabilities(task, logprobs) * (task.returns - beta * divergence)).sum()


def exact_values(task: Task, rewards: Tensor, probability: Tensor) -> Tensor:
    """Expected return to go before each token, over the episodes with its history, [N, T]."""
    values = torch.full_like(rewards, torch.nan)
    for t in range(task.tokens.shape[1]):
        onward = rewards[:, t:].nan_to_num(nan=0.0).sum(1)
        histories: dict[tuple, list[int]] = {}
        for n in range(len(task.tokens)):
            if task.mask[n, t]:
                histories.setdefault(tuple(task.tokens[n, :t].tolist()), []).append(n)
        for members in histories.values():
            weight = probability[members]
            values[members, t] = (weight * onward[members]).sum() / weight.sum()
    return values


def make_setting(task: Task) -> tuple[Policy, Policy, Tensor]:
    """Policy, reference, and the chance of each episode under the policy."""
    policy, reference = Policy(1), Policy(2)
    return policy, reference, probabilities(task, policy.logprobs(task)).detach()


def critic(task: Task, *, exact: bool) -> Tensor:
    """Values of the return less the KL penalty: exact, or wrong ones of the same states."""
    policy, reference, chance = make_setting(task)
    if exact:
        penalty = BETA * (policy.logprobs(task) - reference.logprobs(task)).detach()
        return exact_values(task, poisoned(task.rewards - penalty, task.mask), chance)
    wrong = Policy(7).distribution(task.tokens).detach()[..., 1]
    return poisoned(wrong, task.mask)


@dataclass(frozen=True)
class Batches:
    """Every group of `size` independent episodes, with its chance."""

    index: Tensor  # [C * size], which episode each row is
    groups: Tensor  # [C * size]
    weight: Tensor  # [C * size], chance of the row's group


def all_groups(probability: Tensor, *, size: int) -> Batches:
    """All ordered groups of `size` episodes."""
    index = torch.tensor(list(itertools.product(range(len(probability)), repeat=size)))
    weight = probability[index].prod(1)
    groups = torch.arange(len(index)).repeat_interleave(size)
    return Batches(index.flatten(), groups, weight.repeat_interleave(size))


def poisoned(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with nan outside the mask."""
    return torch.where(mask, values, torch.nan)


def batch_of_all(
    algorithm: Algorithm,
    task: Task,
    policy: AnyPolicy,
    reference: AnyPolicy,
    batches: Batches,
    *,
    kl_coef: float = 0.0,
    values: Tensor | None = None,
) -> TrainingBatch:
    """Every row of `batches` with its advantages, [C * size, T]."""
    rows, mask = batches.index, task.mask[batches.index]
    old = poisoned(policy.logprobs(task).detach()[rows], mask)
    ref = poisoned(reference.logprobs(task).detach()[rows], mask)
    batch = batch_of(
        mask,
        rewards=task.rewards[rows],
        old_logprobs=old,
        ref_logprobs=ref,
        groups=batches.groups,
        turns=task.turns[rows],
        values=None if values is None else values[rows],
        bootstrap=torch.zeros(len(rows), dtype=torch.float64),
    )
    return estimate_advantages(algorithm, batch, kl_coef=kl_coef)


def expected_gradient(
    algorithm: Algorithm,
    task: Task,
    policy: AnyPolicy,
    reference: AnyPolicy,
    batches: Batches,
    *,
    denominator: float,
    kl_coef: float = 0.0,
    values: Tensor | None = None,
    behavior: AnyPolicy | None = None,
) -> Tensor:
    """Exact expectation of the loss's gradient over `batches`.

    The loss is a sum over rows with one denominator, so its derivative by each row's
    log-probability can be weighted by the chance of the row's group before it goes on to the
    parameters. `batches` come from `behavior`, by default the policy itself (all ratios 1).
    """
    batch = batch_of_all(
        algorithm, task, behavior or policy, reference, batches, kl_coef=kl_coef, values=values
    )
    leaf = poisoned(policy.logprobs(task).detach(), task.mask)[batches.index].requires_grad_()
    loss, _ = compute_loss(algorithm, leaf, batch, denominator=denominator, kl_coef=kl_coef)
    (by_logprob,) = torch.autograd.grad(loss, leaf)
    assert not by_logprob.isnan().any()
    weighted = by_logprob * batches.weight[:, None]
    per_episode = torch.zeros_like(task.rewards).index_add_(0, batches.index, weighted)
    return gradient((policy.logprobs(task) * per_episode.detach()).sum(), policy)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Distance over the length of the exact vector."""
    return float((found - exact).norm() / exact.norm())


def direction_error(found: Tensor, exact: Tensor) -> float:
    """Part of `found` that is no positive multiple of `exact`, over its length."""
    multiple = (found @ exact) / (exact @ exact)
    return float((found - multiple.clamp(min=0) * exact).norm() / found.norm())
