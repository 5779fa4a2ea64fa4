"""What each verb of the native engine learns from a batch of examples.

An example is one row of tokens (SFT) or two, the chosen one first (DPO and reward models). A loss
is a sum over this portion of the batch, divided by a count taken over all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.kl import aggregate
from rlhf.algorithms.metrics import MetricSums, masked_mean
from rlhf.models.fast.packing import computed_tokens, hidden_states, packs_rows
from rlhf.models.fast.passes import enable_fast_passes
from rlhf.models.heads import Policy, Scored
from rlhf.models.logprobs import trunk_of
from rlhf.models.saving import restore_model, save_model
from rlhf.reward_models.losses import bradley_terry
from rlhf.rollout.batch import pad_right
from rlhf.training.examples import IGNORED, Example


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int,
    device: torch.device,
    references: Sequence[Tensor] | None = None,
) -> TrainingBatch:
    """Examples as one batch on ``device``.

    Args:
        examples: whole ones.
        pad_id: of the tokenizer.
        device: of the model.
        references: [rows, length] log-probabilities of each example under the reference.
    """
    lines = [ids for example in examples for ids in example.ids]
    labels = [row for example in examples for row in example.labels]
    padded = partial(pad_right, dtype=torch.long, device=device)

    def column(values: list) -> Tensor:
        return torch.tensor(values, device=device)

    ref = None
    if references is not None:
        width = max(map(len, lines))
        ref = torch.cat([nn.functional.pad(x, (0, width - x.shape[1])) for x in references])
    return TrainingBatch(
        tokens=padded(lines, pad_id),
        attention_mask=padded([[1] * len(ids) for ids in lines], 0).bool(),
        action_mask=padded(labels, IGNORED) != IGNORED,
        pair_ids=column([place for place, example in enumerate(examples) for _ in example.ids]),
        chosen=column([row == 0 for example in examples for row in range(len(example.ids))]),
        margins=column([example.margin for example in examples for _ in example.ids]),
        ref_logprobs=None if ref is None else ref.to(device),
    )


class Scorer:
    """A decoder with one float32 output read at the last token: a reward model in training."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.supports_packing = enable_fast_passes(model)

    def modules(self) -> dict[str, nn.Module]:
        """Everything that is trained, by name."""
        return {"model": self.model}

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, directory: Path, *, base: Path | None = None) -> None:
        """Write a folder that ``from_pretrained`` reads; ``base`` as in ``save_model``."""
        save_model(self.model, self.tokenizer, directory, base=base)

    def restore(self, directory: Path) -> None:
        """Read what ``save`` wrote, in place."""
        restore_model(self.model, directory)

    def computed_tokens(self, tokens: Tensor, attention_mask: Tensor) -> int:
        """Tokens that one pass over a batch costs."""
        return computed_tokens(tokens, attention_mask, packed=self.packs_rows(attention_mask))

    def packs_rows(self, attention_mask: Tensor) -> bool:
        """Whether one pass over rows [B, T] packs them."""
        return packs_rows(trunk_of(self.model), attention_mask)

    def score(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """[B] scores of whole texts."""
        hidden, index = hidden_states(self.model, tokens, attention_mask)
        last = index.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        return self.model.score(hidden.index_select(0, last))[:, 0]


def sft_loss(policy: Policy, part: TrainingBatch, *, count: Tensor) -> tuple[Tensor, MetricSums]:
    """Mean negative log-likelihood of the completions' tokens."""
    scored = _scored(policy, part)
    mask = part.action_mask
    loss = aggregate(-scored.logprobs, mask, aggregation="token", denominator=count)
    told = MetricSums(means={"loss": masked_mean(-scored.logprobs, mask)})
    return _balanced(loss, told, scored, mask, share=mask.sum() / count)


def dpo_loss(
    policy: Policy,
    part: TrainingBatch,
    *,
    count: Tensor,
    beta: float,
    weights: Mapping[str, float],
) -> tuple[Tensor, MetricSums]:
    """DPO (Rafailov et al. 2023, eq. 7), and where asked for the chosen replies' likelihood beside
    it (Pang et al. 2024, arXiv:2404.19733).

    ``count`` holds the pairs and the chosen replies' tokens of the whole batch.
    """
    scored = _scored(policy, part)
    mask = part.action_mask
    log_ratio = torch.where(mask, scored.logprobs - part.require("ref_logprobs"), 0.0).sum(1)
    chosen, rejected = _pairs(beta * log_ratio, part)
    per_pair = bradley_terry(chosen, rejected)
    loss, told = per_pair.sum() / count[0], _told(per_pair, chosen, rejected)
    loss = weights.get("sigmoid", 0.0) * loss
    if "sft" in weights:
        first = mask & part.require("chosen")[:, None]
        likelihood = -torch.where(first, scored.logprobs, 0.0).sum() / count[1]
        loss = loss + weights["sft"] * likelihood
        told = told + MetricSums(means={"loss_sft": masked_mean(-scored.logprobs, first)})
    pairs = torch.ones_like(per_pair, dtype=torch.bool)
    return _balanced(loss, told, scored, pairs, share=pairs.sum() / count[0])


def _scored(policy: Policy, part: TrainingBatch) -> Scored:
    return policy.score(
        part.tokens, part.attention_mask, part.action_mask, with_entropy=False, with_balance=True
    )


def _balanced(
    loss: Tensor, told: MetricSums, scored: Scored, mask: Tensor, *, share: Tensor
) -> tuple[Tensor, MetricSums]:
    """A loss with the load-balancing loss of a mixture of experts, where the model asks for it.

    The portions of a batch weigh in it by their ``share``; the ``mask`` counts for its mean.
    """
    if scored.balance is None:
        return loss, told
    each = torch.where(mask, scored.balance.detach(), 0.0)
    balance = masked_mean(each, mask)
    added = told.means["loss"] + balance * torch.tensor([1.0, 0.0], device=balance.device)
    means = {**told.means, "loss": added, "loss_balance": balance}
    return loss + share * scored.balance, MetricSums(means=means)


def reward_loss(
    scorer: Scorer,
    part: TrainingBatch,
    *,
    count: Tensor,
    center_rewards_coefficient: float | None,
) -> tuple[Tensor, MetricSums]:
    """Bradley-Terry, with margins and centring where the data or the options have them."""
    scores = scorer.score(part.tokens, part.attention_mask)
    chosen, rejected = _pairs(scores, part)
    margins, _other = _pairs(part.require("margins"), part)
    centering = center_rewards_coefficient or 0.0
    per_pair = bradley_terry(chosen, rejected, margin=margins, centering=centering)
    return per_pair.sum() / count, _told(per_pair, chosen, rejected)


def _pairs(values: Tensor, part: TrainingBatch) -> tuple[Tensor, Tensor]:
    """[P] of the chosen rows and [P] of the rejected ones, in the same order."""
    order = torch.argsort(part.require("pair_ids") * 2 + ~part.require("chosen"))
    return tuple(values[order].view(-1, 2).unbind(1))  # type: ignore[return-value]


def _told(per_pair: Tensor, chosen: Tensor, rejected: Tensor) -> MetricSums:
    every = torch.ones_like(per_pair, dtype=torch.bool)
    wins = (chosen > rejected).to(per_pair.dtype) + 0.5 * (chosen == rejected)
    return MetricSums(
        means={
            "loss": masked_mean(per_pair, every),
            "accuracy": masked_mean(wins, every),
            "margin": masked_mean(chosen - rejected, every),
            "reward_chosen": masked_mean(chosen, every),
            "reward_rejected": masked_mean(rejected, every),
        }
    )


def _tokens(batch: TrainingBatch) -> Tensor:
    return batch.action_mask.sum()


def _examples(batch: TrainingBatch) -> Tensor:
    return batch.require("chosen").sum()


def _pairs_and_tokens(batch: TrainingBatch) -> Tensor:
    chosen = batch.require("chosen")
    return torch.stack([chosen.sum(), (batch.action_mask & chosen[:, None]).sum()])


@dataclass(frozen=True)
class Task:
    """A verb of the native engine."""

    learner: Callable[[Any, Any], Any]
    """From the model and its tokenizer."""
    loss: Callable[..., tuple[Tensor, MetricSums]]
    """(learner, portion, count=..., **settings) -> loss and metrics."""
    count: Callable[[TrainingBatch], Tensor]
    """What the loss of a whole batch is divided by."""
    settings: tuple[str, ...] = ()
    """Options that the loss takes."""
    reference: bool = False
    """Whether it needs the log-probabilities of the model as it was at the start."""


TASKS = {
    "sft": Task(Policy, sft_loss, _tokens),
    "dpo": Task(
        Policy,
        dpo_loss,
        _pairs_and_tokens,
        ("beta", "weights"),
        reference=True,
    ),
    "reward": Task(Scorer, reward_loss, _examples, ("center_rewards_coefficient",)),
}
