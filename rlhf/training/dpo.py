"""Direct preference optimization."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.kl import approx_kl
from rlhf.algorithms.metrics import MetricSums, masked_sum_and_count
from rlhf.common.files import atomic_path
from rlhf.config.optimization import DPOOptions
from rlhf.models.policy import Policy
from rlhf.models.trainable import set_dropout
from rlhf.reward_models.losses import bradley_terry_loss
from rlhf.runs.checksums import DamagedFolderError, verify_checksums, write_checksums
from rlhf.runs.directory import Run
from rlhf.training.numeric_checks import check_ratios_before_first_update
from rlhf.training.supervised import SupervisedTrainer, add_balancing_loss, compute_logprobs

log = logging.getLogger(__name__)


class DPOTrainer(SupervisedTrainer):
    """Trainer of DPO on pairs of replies, with the initial model as the reference."""

    options: DPOOptions
    model: Policy
    reference_logprobs: Mapping[str, Sequence[Tensor]]
    """Split -> log-probabilities [2, T] of each pair under the reference, where T is the length of
    the longer reply with its prompt. The tensors of pairs that training does not use are empty."""

    def loss_denominators(self, batch: TrainingBatch) -> Tensor:
        """Return the denominators of the DPO loss and the SFT loss, [2].

        They are the number of pairs and the number of tokens of the chosen replies.
        """
        chosen = batch.require("chosen")
        return torch.stack([chosen.sum(), (batch.action_mask & chosen[:, None]).sum()])

    def loss(
        self, micro_batch: TrainingBatch, *, denominators: Tensor
    ) -> tuple[Tensor, MetricSums]:
        return dpo_loss(
            self.model,
            micro_batch,
            denominators=denominators,
            beta=self.options.beta,
            weights=self.options.weight_by_loss,
        )

    def compute_checked_gradients(self, batch: TrainingBatch) -> MetricSums:
        """Compute and check gradients.

        In the first step, also check that the policy and the reference have equal
        log-probabilities.
        """
        total = super().compute_checked_gradients(batch)
        if self.progress.step == 0:
            check_ratios_before_first_update(total.means["approx_kl"], self.model.model.dtype)
        return total

    def make_batch(self, split: str, rows: Sequence[int]) -> TrainingBatch:
        """Collate the pairs of a split with the given indices, and add ``ref_logprobs``."""
        batch = super().make_batch(split, rows)
        width = batch.tokens.shape[1]
        pairs = [self.reference_logprobs[split][row] for row in rows]
        padded = [nn.functional.pad(pair, (0, width - pair.shape[1])) for pair in pairs]
        return replace(batch, ref_logprobs=torch.cat(padded).to(batch.tokens.device))

    def prepare_before_resuming(self, run: Run) -> None:
        """Compute the reference's log-probabilities, or load them if the run is resumed.

        The log-probabilities are saved in the folder of the checkpoints, so that a resumed run uses
        the same values. If the file is damaged, or more steps use further pairs, they are computed
        again. This is possible because the model has its initial weights when this method is
        called.
        """
        folder = run.directory / "checkpoints" / "reference"
        if self.config.resume and folder.exists():
            try:
                verify_checksums(folder)
                saved = torch.load(folder / "logprobs.pt", weights_only=True)
                if all(
                    saved["train"][row].numel()
                    for rows in self._first_epoch_batches()
                    for row in rows
                ):
                    self.reference_logprobs = saved
                    return
            except DamagedFolderError as error:
                log.warning("%s; computing the reference log-probabilities again", error)
        self.reference_logprobs = self._compute_reference_logprobs()
        if run.writes:
            with atomic_path(folder) as partial:
                partial.mkdir()
                torch.save(self.reference_logprobs, partial / "logprobs.pt")
                write_checksums(partial)

    def _compute_reference_logprobs(self) -> dict[str, list[Tensor]]:
        """Return split -> log-probabilities under the initial model of every pair that is used.

        The batches are those of the first epoch, so the rounding errors are the same as in
        training. The DPO loss of the first step is therefore exactly ln 2.
        """
        log.info("Precomputing reference log-probabilities (once)")
        set_dropout(self.model.model, active=False)
        return {
            "train": self._compute_split_logprobs("train", self._first_epoch_batches()),
            "eval": self._compute_split_logprobs("eval", self.eval_batch_row_indices()),
        }

    def _first_epoch_batches(self) -> Iterator[list[int]]:
        """Yield the indices of the pairs of each batch of the first epoch that training uses."""
        num_batches = min(self.schedule.num_steps, self.schedule.steps_per_epoch)
        return (self.schedule.example_indices(step) for step in range(num_batches))

    @torch.no_grad()
    def _compute_split_logprobs(self, split: str, batches: Iterable[Sequence[int]]) -> list[Tensor]:
        """Return the log-probabilities [2, T] of each pair of a split under the current weights.

        The tensors of pairs that are in none of ``batches`` are empty.
        """
        logprobs = [torch.zeros(0)] * len(self.examples[split])
        for rows in batches:
            batch = super().make_batch(split, rows)
            scored = torch.zeros_like(batch.tokens, dtype=self.model.logprob_dtype)
            for indices, weight in self.micro_batch_rows_and_weights(batch):
                micro_batch = batch.select(indices)
                width = micro_batch.tokens.shape[1]
                outputs = self.model.score(
                    micro_batch.tokens,
                    micro_batch.attention_mask,
                    micro_batch.action_mask,
                    with_entropy=False,
                )
                if weight:
                    scored[indices, :width] = outputs.logprobs
            self.world.all_reduce([scored])
            scored = scored.cpu()
            for index, row in enumerate(rows):
                in_pair = (batch.require("pair_ids") == index).cpu()
                width = int(batch.attention_mask[in_pair].sum(1).max())
                logprobs[row] = scored[in_pair, :width].clone()
        return logprobs


def dpo_loss(
    policy: Policy,
    micro_batch: TrainingBatch,
    *,
    denominators: Tensor,
    beta: float,
    weights: Mapping[str, float],
) -> tuple[Tensor, MetricSums]:
    """Return the weighted sum of the losses of a micro-batch, and its metrics.

    Args:
        policy: The policy in training.
        micro_batch: P pairs in 2 P rows, with the log-probabilities of the reference. Each chosen
            reply is followed by the rejected reply of the same pair.
        denominators: [2], number of pairs and number of tokens of chosen replies in the whole
            batch.
        beta: Weight of the KL to the reference.
        weights: Weights of the losses. "sigmoid" is the DPO loss (Rafailov et al. 2023, equation
            7); "sft" is the negative log-likelihood per token of the chosen replies (Pang et al.
            2024, arXiv:2404.19733).
    """
    scored = compute_logprobs(policy, micro_batch)
    mask = micro_batch.action_mask
    log_ratio = scored.logprobs - micro_batch.require("ref_logprobs")
    rewards = beta * torch.where(mask, log_ratio, 0.0).sum(1)
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    losses = bradley_terry_loss(chosen, rejected)
    sums = pair_metric_sums(losses, chosen, rejected)
    sums = sums + MetricSums(means={"approx_kl": masked_sum_and_count(approx_kl(log_ratio), mask)})
    loss = weights.get("sigmoid", 0.0) * (losses.sum() / denominators[0])
    if "sft" in weights:
        chosen_mask = mask & micro_batch.require("chosen")[:, None]
        likelihood = -torch.where(chosen_mask, scored.logprobs, 0.0).sum() / denominators[1]
        loss = loss + weights["sft"] * likelihood
        sums = sums + MetricSums(
            means={"loss_sft": masked_sum_and_count(-scored.logprobs, chosen_mask)}
        )
    all_pairs = torch.ones_like(losses, dtype=torch.bool)
    return add_balancing_loss(
        loss, sums, scored, all_pairs, share=all_pairs.sum() / denominators[0]
    )


def pair_metric_sums(losses: Tensor, chosen: Tensor, rejected: Tensor) -> MetricSums:
    """Return the sums from which the metrics of P pairs are computed.

    In ``accuracy``, a pair with equal scores counts one half.

    Args:
        losses: [P], loss of each pair.
        chosen: [P], score or implicit reward of the chosen reply.
        rejected: [P], score or implicit reward of the rejected reply.
    """
    every = torch.ones_like(losses, dtype=torch.bool)
    values = {
        "loss": losses,
        "accuracy": (chosen > rejected).to(losses.dtype) + 0.5 * (chosen == rejected),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return MetricSums(
        means={name: masked_sum_and_count(value, every) for name, value in values.items()}
    )
