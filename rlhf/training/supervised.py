"""Trainer of the native engine for SFT, which is also the base class of other offline trainers."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import aggregate
from rlhf.algorithms.metrics import MetricSums, masked_sum_and_count
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import NativeOptions
from rlhf.errors import UserError
from rlhf.models.fast.packing import disable_row_packing
from rlhf.models.policy import Policy, TokenLogprobsAndValues
from rlhf.models.trainable import set_dropout
from rlhf.reward_models.losses import IGNORED
from rlhf.runs.alarms import Halt
from rlhf.runs.directory import Run
from rlhf.runs.progress import OFFLINE_DISPLAYED_METRICS
from rlhf.training.batching import group_into_micro_batches
from rlhf.training.distributed import prepare_for_sharding
from rlhf.training.examples import Example
from rlhf.training.methods import (
    TrainingSetup,
    default_logging_interval,
    default_warmup_steps,
    num_steps,
    steps_between_evaluations,
)
from rlhf.training.numeric_checks import check_losses_are_finite, tensors_on_cpu
from rlhf.training.optimizers import (
    make_optimizer,
    optimizer_settings,
    toolkit_optimizer_name,
)
from rlhf.training.reply_samples import write_reply_samples
from rlhf.training.streamed_examples import ExampleStream
from rlhf.training.throughput import Throughput
from rlhf.training.trainer import Stateful, Trainer

log = logging.getLogger(__name__)

_UNLOGGED_FILE = "unlogged_metrics.pt"
"""Name of the file in a checkpoint with the metrics of steps that are not logged yet."""


@dataclass(frozen=True)
class BatchSchedule:
    """Order of the training examples, with a new random permutation in every epoch."""

    num_rows: int
    batch_size: int
    num_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return math.ceil(self.num_rows / self.batch_size)

    def example_indices(self, step: int) -> list[int]:
        """Return the indices of the examples of a step; steps are counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_rows, self.seed, epoch)
        return order[index * self.batch_size : (index + 1) * self.batch_size].tolist()


@functools.lru_cache(maxsize=1)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the examples in an epoch. The last result is cached."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def collate_examples(
    examples: Sequence[Example], *, pad_id: int, device: torch.device, with_margins: bool = False
) -> TrainingBatch:
    """Collate examples to a batch that is padded on the right.

    Args:
        examples: Examples with one text, or with a chosen and a rejected text. The texts of an
            example are adjacent rows of the batch, in this order.
        pad_id: Id of the padding token.
        device: Device of the tensors.
        with_margins: Whether the examples are pairs whose labels are margins. By default, the
            labels are token ids.
    """
    ids = [text for example in examples for text in example.ids]
    labels = ids if with_margins else [text for example in examples for text in example.labels]
    column = partial(torch.tensor, device=device)
    margins = None
    if with_margins:
        margins = column([example.labels[0] for example in examples for _ in example.ids])

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return pad_sequence(list(map(torch.tensor, rows)), True, fill).to(device)

    return TrainingBatch(
        tokens=padded(ids, pad_id),
        attention_mask=padded([[1] * len(text) for text in ids], 0).bool(),
        action_mask=padded(labels, IGNORED) != IGNORED,
        pair_ids=column([index for index, example in enumerate(examples) for _ in example.ids]),
        chosen=column([row == 0 for example in examples for row in range(len(example.ids))]),
        margins=margins,
    )


class SupervisedTrainer(Trainer):
    """Trainer of SFT. Subclasses for DPO and reward models replace the loss.

    Args:
        config: Configuration of the run.
        options: Options of the run under ``trainer:``.
        setup: The model, and the function that saves it.
        train_set: Training examples, or a stream of them.
        eval_set: Held-out examples.

    Raises:
        UserError: The optimizer or the learning rate schedule cannot be used.
    """

    model: Any
    """The model in training, an instance of ``model_class``."""
    model_class: type = Policy
    """Class that wraps the model with the forward passes that the loss needs."""
    displayed_metrics = OFFLINE_DISPLAYED_METRICS
    learning_rate_key = "trainer.learning_rate"
    keep_best = True
    final_is_best = True
    with_margins = False
    """Whether the labels of examples are margins; see `collate_examples`."""

    def __init__(
        self,
        config: OfflineConfig,
        options: NativeOptions,
        setup: TrainingSetup,
        train_set: Sequence[Example] | ExampleStream,
        eval_set: Sequence[Example],
    ) -> None:
        self.stream = train_set if isinstance(train_set, ExampleStream) else None
        examples = [] if isinstance(train_set, ExampleStream) else train_set
        steps = num_steps(config, len(examples))
        model = self.model_class(setup.model, setup.tokenizer)
        if getattr(model, "balancing_loss_weight", 0.0):
            disable_row_packing(setup.model)  # the load-balancing loss needs padded rows
        if config.activation_checkpointing:
            model.checkpoint_activations()
        if prepare_for_sharding(config):
            model.shard()
        optimizer = make_optimizer(
            toolkit_optimizer_name(options.optim),
            model.parameters(),
            optimizer_settings(options),
            sharded=config.sharding != "none",
        )
        warmup = (
            default_warmup_steps(steps) if options.warmup_steps is None else options.warmup_steps
        )
        name = options.lr_scheduler_type
        if name == "constant" and options.warmup_steps:
            raise UserError(
                "trainer.warmup_steps has no effect with lr_scheduler_type constant; set "
                "lr_scheduler_type: constant_with_warmup"
            )
        try:
            scheduler = get_scheduler(
                name, optimizer, num_warmup_steps=warmup, num_training_steps=steps
            )
        except (TypeError, ValueError) as error:  # unknown name, or arguments are missing
            raise UserError(f"trainer.lr_scheduler_type {name!r}: {error}") from error
        if not isinstance(scheduler, LambdaLR):
            raise UserError(
                f"trainer.lr_scheduler_type {name!r} needs a metric at every step, which this "
                "engine does not pass; set another schedule, or engine: trl"
            )
        super().__init__(
            config,
            model,
            optimizer,
            scheduler,
            num_steps=steps,
            max_grad_norm=options.max_grad_norm,
        )
        self.options, self.setup = options, setup
        self.patience = config.patience
        self.examples = {"train": examples, "eval": eval_set}
        self.schedule = BatchSchedule(len(examples), config.batch_size, steps, config.seed)
        self.evaluate_every = steps_between_evaluations(config, steps)
        self.log_every = options.logging_steps or default_logging_interval(steps)
        self.throughput = Throughput(model, processes=self.world.size) if config.profile else None
        self._unlogged: list[tuple[MetricSums, float, int]] = []

    def loss_denominators(self, batch: TrainingBatch) -> Tensor:
        """Return the denominator of the loss, which is the number of trained tokens in a batch."""
        return batch.action_mask.sum()

    def loss(
        self, micro_batch: TrainingBatch, *, denominators: Tensor
    ) -> tuple[Tensor, MetricSums]:
        """Return the loss and the metrics of a micro-batch.

        Args:
            micro_batch: Rows of a batch.
            denominators: Result of `loss_denominators` for the whole batch; the loss is divided
                by it.
        """
        return sft_loss(self.model, micro_batch, denominator=denominators)

    def evaluate_initial_model(self, run: Run) -> None:
        """Evaluate the initial model, log the metrics as those of step 0, and record replies."""
        run.log(0, self.evaluate())
        self._write_reply_samples(run, "before")

    def evaluate_final_model(self, run: Run) -> None:
        """Record replies of the trained model."""
        self._write_reply_samples(run, "after")

    def _write_reply_samples(self, run: Run, split: str) -> None:
        """Write replies of the model to ``samples.jsonl``, if one process holds the whole model."""
        if self.model.sharding is None:
            write_reply_samples(
                run,
                self.model.model,
                self.model.tokenizer,
                self.setup.prompts,
                step=self.progress.step,
                before_or_after=split,
            )

    def step(self, step: int, run: Run) -> dict[str, float]:
        """Take an optimizer step; return the metrics to log, or {} if this step is not logged."""
        if self.stream is None:
            batch = self.make_batch("train", self.schedule.example_indices(step))
        else:
            batch = self._collate(self.stream.take(self.config.batch_size))
        started = time.perf_counter()
        sums, norm = self.update_on_batch(batch)
        if self.throughput:
            self.throughput.add(batch, seconds=time.perf_counter() - started)
        self._unlogged.append((sums, norm, int(batch.attention_mask.sum())))
        if (step + 1) % self.log_every and not self.is_evaluation_due(step + 1):
            return {}
        return self._pop_metrics()

    def update_on_batch(self, batch: TrainingBatch) -> tuple[MetricSums, float]:
        """Take an optimizer step on a batch; return its metrics and the gradient norm.

        Raises:
            Halt: A check of the loss or of the gradients failed. The model is unchanged.
        """
        try:
            total = self.compute_checked_gradients(batch)
            return total, self.clip_and_apply_gradients()
        except Halt as halt:
            halt.evidence = {"batch": tensors_on_cpu(batch), "rows": None}
            raise

    def compute_checked_gradients(self, batch: TrainingBatch) -> MetricSums:
        """Compute the gradients of a batch over all processes, and check that its loss is finite.

        The global seed of torch is set, from the seed of the run and the step.

        Returns:
            Metrics over all processes.

        Raises:
            Halt: The loss is not finite.
        """
        torch.manual_seed(self.config.seed + self.progress.step)  # for dropout
        set_dropout(self.model.model, active=self.setup.dropout)
        denominators, total = self.loss_denominators(batch), MetricSums()
        for rows, weight in self.micro_batch_rows_and_weights(batch):
            loss, sums = self.loss(batch.select(rows), denominators=denominators)
            (weight * loss).backward()
            if weight:
                total = total + sums
        self.record_weights_without_gradient()
        self.world.all_reduce_gradients(self.model.parameters())
        total = self.world.sum_metrics(total)
        check_losses_are_finite(total, learning_rate_key=self.learning_rate_key)
        return total

    def repeat_checks_of_halted_update(self, evidence: Mapping[str, Any]) -> None:
        device = self.model.device
        batch = {name: value.to(device) for name, value in evidence["batch"].items()}
        self.compute_checked_gradients(TrainingBatch(**batch))
        self.clip_gradients()

    def _pop_metrics(self) -> dict[str, float]:
        """Return the metrics of the steps since the last logged step, and clear them."""
        sums, norms, tokens = zip(*self._unlogged, strict=True)
        self._unlogged.clear()
        metrics = _metrics_with_prefix("train", sum(sums, MetricSums())) | {
            "train/grad_norm": float(np.mean(norms)),
            "train/learning_rate": self.scheduler.get_last_lr()[0],
            "train/tokens": sum(tokens),
        }
        return metrics | (self.throughput.pop_metrics() if self.throughput else {})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the loss on the held-out examples. Dropout is turned off."""
        set_dropout(self.model.model, active=False)
        if self.stream is not None and self.stream.rows_read:
            log.info("data: %s", self.stream.summary())
        total = MetricSums()
        for examples in self.eval_batch_row_indices():
            batch = self.make_batch("eval", examples)
            for rows, weight in self.micro_batch_rows_and_weights(batch):
                micro_batch = batch.select(rows)
                denominators = self.loss_denominators(micro_batch)
                sums = self.loss(micro_batch, denominators=denominators)[1]
                if weight:
                    total = total + sums
        return _metrics_with_prefix("eval", self.world.sum_metrics(total))

    def stateful_objects(self) -> dict[str, Stateful]:
        state = super().stateful_objects()
        return state if self.stream is None else {**state, "stream": self.stream}

    def save_unfinished_work(self, checkpoint: Path) -> None:
        """Write the metrics of the steps since the last logged step, if there are any."""
        if self._unlogged:
            rows = [(dataclasses.asdict(sums), *rest) for sums, *rest in self._unlogged]
            with (checkpoint / _UNLOGGED_FILE).open("wb") as file:
                torch.save(rows, file)

    def load_unfinished_work(self, checkpoint: Path) -> None:
        if (file := checkpoint / _UNLOGGED_FILE).exists():
            rows = torch.load(file, map_location=self.model.device, weights_only=True)
            self._unlogged = [(MetricSums(**sums), *rest) for sums, *rest in rows]

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def is_evaluation_due(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.num_steps

    def is_checkpoint_due(self, step: int) -> bool:
        """Return whether to save a checkpoint, which is the case after every evaluation."""
        return self.is_evaluation_due(step)

    @property
    def schedule_depends_on_steps(self) -> bool:
        """Whether the learning rate decays until the last step, or has the default warm-up."""
        name = self.options.lr_scheduler_type
        if name in ("constant_with_warmup", "inverse_sqrt"):
            return self.options.warmup_steps is None
        return name != "constant"

    def save(self, directory: Path) -> None:
        self.setup.save(self.model.model, directory)

    def eval_batch_row_indices(self) -> Iterable[list[int]]:
        """Return the indices of the held-out examples of each batch."""
        size, count = self.config.batch_size, len(self.examples["eval"])
        return (list(range(i, min(i + size, count))) for i in range(0, count, size))

    def make_batch(self, split: str, rows: Sequence[int]) -> TrainingBatch:
        """Collate the examples of a split ("train" or "eval") with the given indices."""
        return self._collate([self.examples[split][row] for row in rows])

    def _collate(self, examples: Sequence[Example]) -> TrainingBatch:
        pad_id = self.model.tokenizer.pad_token_id
        return collate_examples(
            examples, pad_id=pad_id, device=self.model.device, with_margins=self.with_margins
        )

    def micro_batch_rows_and_weights(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, float]]:
        """Yield the row indices and the weight of each micro-batch of this process.

        The weight is 1, or 0 for a micro-batch that is also in another process; see `World`.
        """
        indices = group_into_micro_batches(
            batch.tokens,
            batch.attention_mask,
            batch.require("pair_ids").tolist(),
            max_tokens=self.config.micro_batch_size * self.config.max_length,
            packed=self.model.packs_rows(batch.attention_mask.sum(1)),
        )
        device = self.model.device
        for rows, weight in self.world.own_micro_batches_with_weights(indices):
            yield torch.tensor(rows, device=device), weight


def _metrics_with_prefix(split: str, sums: MetricSums) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in sums.compute().items()}


def sft_loss(
    policy: Policy, micro_batch: TrainingBatch, *, denominator: Tensor
) -> tuple[Tensor, MetricSums]:
    """Return the SFT loss of a micro-batch, and its metrics.

    The loss is the sum of the negative log-likelihoods of the completion tokens, divided by
    ``denominator``. The load-balancing loss of a mixture of experts is added.

    Args:
        policy: The model in training.
        micro_batch: Rows of a batch.
        denominator: Number of completion tokens of the whole batch.
    """
    scored = compute_logprobs(policy, micro_batch)
    mask = micro_batch.action_mask
    loss = aggregate(-scored.logprobs, mask, aggregation="token", denominator=denominator)
    sums = MetricSums(means={"loss": masked_sum_and_count(-scored.logprobs, mask)})
    return add_balancing_loss(loss, sums, scored, mask, share=mask.sum() / denominator)


def compute_logprobs(policy: Policy, micro_batch: TrainingBatch) -> TokenLogprobsAndValues:
    """Compute the log-probabilities and, for a mixture of experts, the load-balancing loss."""
    return policy.score(
        micro_batch.tokens,
        micro_batch.attention_mask,
        micro_batch.action_mask,
        with_entropy=False,
        with_balancing_loss=True,
    )


def add_balancing_loss(
    loss: Tensor, sums: MetricSums, scored: TokenLogprobsAndValues, mask: Tensor, *, share: Tensor
) -> tuple[Tensor, MetricSums]:
    """Add the load-balancing loss of a mixture of experts, if the model has one.

    Args:
        loss: Loss of a micro-batch.
        sums: Metrics of the micro-batch, including ``loss``.
        scored: Result of the forward pass.
        mask: True for the entries (tokens or pairs) that metrics average over.
        share: Fraction of the batch that is in the micro-batch. The added loss is multiplied by it.

    Returns:
        The new loss, and the metrics with ``loss_balance``. Both are unchanged if the model has no
        load-balancing loss.
    """
    if scored.balancing_loss is None:
        return loss, sums
    each = torch.where(mask, scored.balancing_loss.detach(), 0.0)
    balance = masked_sum_and_count(each, mask)
    added = sums.means["loss"] + balance * torch.tensor([1.0, 0.0], device=balance.device)
    means = {**sums.means, "loss": added, "loss_balance": balance}
    return loss + share * scored.balancing_loss, MetricSums(means=means)
