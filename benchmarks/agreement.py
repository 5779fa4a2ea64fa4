"""Compare loss and gradient of TRL and of the toolkit on one batch in float32.

TRL's trainer runs until its first loss. The toolkit then computes the loss and the gradient on the
same batch with the same weights. The results are differences relative to TRL's values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.trl import grpo, offline
from benchmarks.worker import Job
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.registry import configured_algorithm
from rlhf.models.policy import Policy, ReferencePolicy
from rlhf.reward_models.losses import bradley_terry_loss
from rlhf.training.dpo import dpo_loss
from rlhf.training.reward_models.trainer import TrainableRewardModel
from rlhf.training.supervised import sft_loss

MIN_LOSS_SCALE = 1e-2
"""Minimum of the denominator in the relative difference between two losses.

It is required because the first loss of GRPO is zero up to rounding.
"""


class _LossCaptured(Exception):
    """Exception that ends a trainer at its first loss."""


def compare_offline_loss(job: Job, *, command: str) -> dict[str, float]:
    """Return the relative differences of loss and gradient in SFT, reward training or DPO.

    ``command`` is "sft", "reward" or "dpo".
    """
    trainer = offline.make_trainer(job, command, tuned=True, bf16=False)
    inputs, theirs = run_to_first_loss(trainer)
    ours = {"sft": _toolkit_sft_loss, "reward": _toolkit_reward_loss, "dpo": _toolkit_dpo_loss}[
        command
    ]
    return compare_loss_and_gradient(trainer.model, theirs, lambda: ours(trainer, inputs))


def compare_grpo_loss(job: Job) -> dict[str, float]:
    """Return the relative differences of loss and gradient of a GRPO update on TRL's rollouts."""
    trainer = grpo.make_trainer(job, tuned=True, bf16=False)
    inputs, theirs = run_to_first_loss(trainer)
    return compare_loss_and_gradient(
        trainer.model, theirs, lambda: _toolkit_grpo_loss(trainer, inputs)
    )


def run_to_first_loss(trainer: Any) -> tuple[Mapping[str, Any], Tensor]:
    """Run a TRL trainer until its first loss, and compute the gradient of this loss.

    The gradient is stored in the parameters of the model.

    Returns:
        The arguments of the loss function (the batch) and the value of the loss.
    """
    kept: list[Any] = []
    compute = trainer.compute_loss

    def compute_gradient_and_stop(
        model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        loss = compute(model, dict(inputs), *args, **kwargs)
        loss.backward()
        kept.extend([inputs, loss.detach()])
        raise _LossCaptured

    trainer.compute_loss = compute_gradient_and_stop
    try:
        trainer.train()
    except _LossCaptured:
        return kept[0], kept[1]
    raise AssertionError("the trainer ended without a loss")


def compare_loss_and_gradient(
    model: Any, trl_loss: Tensor, compute_toolkit_loss: Callable[[], Tensor]
) -> dict[str, float]:
    """Compare TRL's loss and gradient with those of the toolkit.

    Args:
        model: model whose parameters have TRL's gradients.
        trl_loss: TRL's loss.
        compute_toolkit_loss: function that computes the toolkit's loss with the same model and
            batch.

    Returns:
        The relative differences of "loss" and "gradient".
    """
    expected = pop_gradient_vector(model)
    loss = compute_toolkit_loss()
    loss.backward()
    gradient = pop_gradient_vector(model)
    scale = max(abs(trl_loss.item()), MIN_LOSS_SCALE)
    return {
        "loss": abs(loss.item() - trl_loss.item()) / scale,
        "gradient": ((gradient - expected).norm() / expected.norm()).item(),
    }


def pop_gradient_vector(model: Any) -> Tensor:
    """Return all gradients of a model as one vector, and clear them."""
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def _training_batch(inputs: Mapping[str, Any], action_mask: Tensor, **more: Any) -> TrainingBatch:
    """Convert TRL's batch to a `TrainingBatch` in which the two rows of a pair are adjacent.

    TRL's batch has all chosen rows first, then all rejected rows.
    """
    count = len(inputs["input_ids"])
    rows = torch.arange(count)
    half = max(count // 2, 1)
    batch = TrainingBatch(
        tokens=inputs["input_ids"],
        attention_mask=inputs["attention_mask"].bool(),
        action_mask=action_mask,
        pair_ids=rows % half,
        chosen=rows < half,
        margins=torch.zeros(count),
        **more,
    )
    return batch.select(torch.argsort(rows % half, stable=True))


def _toolkit_sft_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the toolkit's SFT loss on TRL's batch."""
    mask = inputs["labels"] != -100
    policy = Policy(trainer.model, trainer.processing_class)
    return sft_loss(policy, _training_batch(inputs, mask), denominator=mask.sum())[0]


def _toolkit_reward_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the toolkit's reward-model loss on TRL's batch."""
    scorer = TrainableRewardModel(trainer.model, trainer.processing_class)
    part = _training_batch(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))
    chosen, rejected = scorer.score(part.tokens, part.attention_mask).view(-1, 2).unbind(1)
    return bradley_terry_loss(chosen, rejected).mean()


def _toolkit_dpo_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the toolkit's DPO loss on TRL's batch."""
    policy = Policy(trainer.model, trainer.processing_class)
    mask = inputs["completion_mask"].bool()
    attention = inputs["attention_mask"].bool()
    ref_logprobs = ReferencePolicy(policy).logprobs(inputs["input_ids"], attention, mask)
    part = _training_batch(inputs, mask, ref_logprobs=ref_logprobs)
    pairs = torch.tensor(len(part.tokens) // 2)
    beta = trainer.args.beta
    return dpo_loss(
        policy, part, denominators=torch.stack([pairs, pairs]), beta=beta, weights={"sigmoid": 1.0}
    )[0]


def _toolkit_grpo_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the toolkit's GRPO loss on TRL's rollouts."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
    actions = inputs["completion_mask"].bool()
    mask = torch.cat([torch.zeros_like(inputs["prompt_ids"], dtype=torch.bool), actions], 1)
    algorithm = configured_algorithm("grpo", group_size=len(tokens), kl_placement="none")
    policy = Policy(trainer.model, trainer.processing_class)
    scored = policy.score(tokens, attention, mask)
    advantages = torch.where(mask, inputs["advantages"][:, None], 0.0)
    batch = TrainingBatch(
        tokens=tokens,
        attention_mask=attention,
        action_mask=mask,
        old_logprobs=scored.logprobs.detach(),
        advantages=advantages,
        loss_mask=mask,
    )
    limit = int(mask.sum(1).max())
    return compute_loss(
        algorithm,
        scored.logprobs,
        batch,
        denominator=loss_denominator(algorithm, mask, max_tokens=limit),
    )[0]
