"""`Trainer`, the base class of the training methods that `rlhf.training.loop.fit` runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rlhf.algorithms.controllers import CheckpointedNumbers
from rlhf.models.precision import MasterOptimizer
from rlhf.models.sharding.modules import ShardedModules
from rlhf.models.trainable import (
    WeightChangeDetector,
    parameter_names_without_gradient,
    trained_parameters,
)
from rlhf.runs.callbacks import Callbacks
from rlhf.runs.directory import Run
from rlhf.runs.progress import DisplayedMetrics
from rlhf.training.distributed import init_distributed
from rlhf.training.numeric_checks import check_gradient_norm_is_finite, check_parameters_are_trained
from rlhf.training.optimizers import read_hyperparameters, restore_hyperparameters

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """An object whose state can be stored as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class CheckpointableModel(Protocol):
    """Interface of a policy or reward model that is trained and saved in checkpoints."""

    model: Any
    """The transformers model."""
    tokenizer: Any
    device: torch.device
    sharding: ShardedModules | None
    """The sharded modules; None if every process holds the whole model."""

    def modules(self) -> Mapping[str, nn.Module]: ...

    def save(self, directory: Path, *, base: Path | None = None) -> None: ...

    def restore(self, directory: Path) -> None: ...


@dataclass
class TrainingProgress(CheckpointedNumbers):
    """Number of completed steps, and the best evaluation."""

    step: int = 0
    best_loss: float = math.inf
    evaluations_since_best: int = 0

    def record_evaluation(self, loss: float) -> bool:
        """Record the loss of an evaluation; return whether it is lower than all earlier ones."""
        if loss < self.best_loss:
            self.best_loss, self.evaluations_since_best = loss, 0
            return True
        self.evaluations_since_best += 1
        return False


class Trainer:
    """Base class of training methods; a subclass implements the step, the evaluation and the state.

    Args:
        config: Configuration of the run.
        model: The model in training.
        optimizer: Optimizer of the trained parameters.
        scheduler: Learning rate schedule of the optimizer.
        num_steps: Number of training steps.
        max_grad_norm: Global norm to which gradients are clipped.
    """

    displayed_metrics: DisplayedMetrics = ()
    """Metrics that the progress display shows."""
    learning_rate_key: str
    """Configuration key of the learning rate, for the error message if training diverges."""
    state_is_complete = False
    """Whether the state is complete after an error in ``step``: ``step`` has not changed it yet."""
    keep_best = False
    """Whether the model of the best evaluation is kept in ``checkpoints/best``."""
    final_is_best = False
    """Whether the final model is the model of the best evaluation instead of the last one."""
    patience: int | None = None
    """Training stops after this number of consecutive evaluations without an improvement. If it is
    None, training does not stop early."""

    def __init__(
        self,
        config: Any,
        model: CheckpointableModel,
        optimizer: MasterOptimizer,
        scheduler: Any,
        *,
        num_steps: int,
        max_grad_norm: float,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.hyperparameters = read_hyperparameters(optimizer)
        self.scheduler = scheduler
        self.num_steps = num_steps
        self.max_grad_norm = max_grad_norm
        self.weight_change_detector = WeightChangeDetector(model.model)
        self.trained = trained_parameters(model.model)
        self.world = replace(init_distributed(), sharded_model=model.sharding is not None)
        self.progress = TrainingProgress()
        self.callbacks = Callbacks(config.callbacks)
        self.num_without_gradient = 0
        """Number of trainable tensors, without those of experts, that had no gradient in the first
        update of the last step."""

    def evaluate_initial_model(self, run: Run) -> None:
        """Evaluate the initial model. This method is not called if a checkpoint was loaded."""
        raise NotImplementedError

    def step(self, step: int, run: Run) -> dict[str, float]:
        """Take training step number ``step``, counted from 0.

        Returns:
            Metrics to log; empty if this step is not logged.

        Raises:
            UserError: Training diverged, or an environment or a reward failed.
        """
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Return metrics on held-out data, with keys ``eval/...``."""
        raise NotImplementedError

    def model_selection_loss(self, metrics: Mapping[str, float]) -> float:
        """Return the loss by which evaluations are compared, computed from the metrics."""
        return metrics["eval/loss"]

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate after ``step`` steps."""
        raise NotImplementedError

    def is_checkpoint_due(self, step: int) -> bool:
        """Return whether to write a checkpoint after ``step`` steps."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write the trained model to a folder."""
        raise NotImplementedError

    def save_unfinished_work(self, checkpoint: Path) -> None:
        """Write results that later steps need to a checkpoint, in addition to ``state.json``."""

    def load_unfinished_work(self, checkpoint: Path) -> None:
        """Load the results that ``save_unfinished_work`` wrote."""

    def close(self) -> None:
        """Release the resources of the trainer, such as environments."""

    def prepare_before_resuming(self, run: Run) -> None:
        """Prepare training. The model has its initial weights when this method is called.

        If a run is resumed, this method is called before the checkpoint is loaded.
        """

    def evaluate_final_model(self, run: Run) -> None:
        """Evaluate the trained model, after it is saved."""

    @property
    def schedule_depends_on_steps(self) -> bool:
        """Whether the learning rate of a step depends on the number of steps of the run."""
        raise NotImplementedError

    def override_loaded_settings(self) -> None:
        """Replace the settings that a loaded checkpoint contains by those of the configuration.

        The two differ if a setting was changed when the run was resumed.
        """
        restore_hyperparameters(self.optimizer, self.scheduler, self.hyperparameters)

    def stateful_objects(self) -> dict[str, Stateful]:
        """Return name -> object for the objects whose state is in ``state.json`` of checkpoints."""
        stateful: dict[str, Stateful] = {"progress": self.progress}
        return {**stateful, "callbacks": self.callbacks} if self.callbacks else stateful

    @property
    def done(self) -> bool:
        """Whether all steps are done, evaluations no longer improve, or a callback ended training.

        Evaluations no longer improve if the last ``patience`` evaluations were not the best.
        """
        out_of_patience = (
            self.patience is not None and self.progress.evaluations_since_best >= self.patience
        )
        return self.callbacks.stopped or out_of_patience or self.progress.step >= self.num_steps

    def notify(self, point: str, run: Run, **fields: Any) -> None:
        """Call a method of the callbacks, and stop all processes if one of them ends training.

        Args:
            point: One of `rlhf.runs.callbacks.CALLBACK_METHODS`.
            run: The run directory.
            fields: ``metrics`` or ``folder`` of the event.

        Raises:
            UserError: A callback failed.
        """
        if not self.callbacks:
            return
        self.callbacks.notify(
            point,
            run,
            step=self.progress.step,
            num_steps=self.num_steps,
            model=self.model.model,
            tokenizer=self.model.tokenizer,
            **fields,
        )
        stopped = self.world.first_not_none(self.callbacks.stopped or None)
        self.callbacks.stopped = bool(stopped)

    def clip_and_apply_gradients(self) -> float:
        """Clip the gradients, take one optimizer step and clear them.

        Returns:
            The global norm of the gradients before clipping.

        Raises:
            Halt: A check of `clip_gradients` failed. The model is unchanged.
        """
        norm = self.clip_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def record_weights_without_gradient(self) -> None:
        """Set ``num_without_gradient``, and log a warning if it was 0 and increases.

        Every process calls this method after its backward passes.
        """
        names = parameter_names_without_gradient(self.model.model)
        # A process that had no micro-batch has no gradient at all.
        count = min(self.world.gather(len(names)))
        if count and not self.num_without_gradient:
            log.warning("no gradient in step %d: %s", self.progress.step + 1, ", ".join(names[:5]))
        self.num_without_gradient = count

    def changed_tensor_fraction(self) -> float:
        """Return the fraction of the trained parameter tensors that differ from the start."""
        changed = [self.weight_change_detector.which_tensors_changed()]
        if self.world.sharded_model:  # each process compares its rows
            changed = self.world.gather(changed[0])
        return sum(map(any, zip(*changed, strict=True))) / len(changed[0])

    def clip_gradients(self) -> float:
        """Check the gradients, and let the next optimizer step clip them.

        Returns:
            The global norm of the gradients before clipping.

        Raises:
            Halt: The norm is not finite, or `check_parameters_are_trained` fails.
        """
        check_parameters_are_trained(self.optimizer, self.trained)
        with self.world.lost_process_guard():
            norm = self.optimizer.clip_at_next_step(self.max_grad_norm)
        check_gradient_norm_is_finite(
            norm, step=self.progress.step + 1, learning_rate_key=self.learning_rate_key
        )
        return norm

    def repeat_checks_of_halted_update(self, evidence: Mapping[str, Any]) -> None:
        """Repeat the checks that precede the update at which an alarm halted the run.

        The update itself is not repeated, so the model does not change.

        Args:
            evidence: ``evidence`` of the `Halt` that ended the run.

        Raises:
            Halt: A check fails.
        """
        raise NotImplementedError
