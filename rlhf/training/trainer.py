"""The interface between `fit` and a training method, and the state that all methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf.algorithms.controllers import SavedNumbers
from rlhf.models.precision import MasterOptimizer
from rlhf.models.trainable import WeightChange, trained_parameters
from rlhf.runs.directory import Run
from rlhf.runs.progress import Slots
from rlhf.training.distributed import init_distributed
from rlhf.training.sentinel import check_gradient_norm, check_trainable


class Stateful(Protocol):
    """An object whose state can be stored as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class SavedModel(Protocol):
    """A policy or a reward model in training."""

    model: Any
    """The transformers model that is saved."""
    tokenizer: Any
    device: torch.device

    def save(self, directory: Path, *, base: Path | None = None) -> None: ...

    def restore(self, directory: Path) -> None: ...


@dataclass
class Progress(SavedNumbers):
    """Steps taken, and the best evaluation so far."""

    step: int = 0
    best_loss: float = math.inf
    evaluations_since_best: int = 0

    def record_evaluation(self, loss: float) -> bool:
        """Record the loss of an evaluation; return whether it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.evaluations_since_best = loss, 0
            return True
        self.evaluations_since_best += 1
        return False


class Trainer:
    """A training method: one class implements its step, its evaluation and its state.

    Args:
        scheduler: Learning rate schedule of the optimizer.
        num_steps: Number of training steps.
        max_grad_norm: Global norm to which gradients are clipped.
    """

    slots: Slots = ()
    """Metrics that the progress display shows."""
    learning_rate_key: str
    """Configuration key of the learning rate, for the message when training diverges."""
    keep_best = False
    """Whether the run ends with the model of the evaluation with the lowest ``eval/loss``."""
    patience: int | None = None
    """Number of successive evaluations without improvement after which training stops."""

    def __init__(
        self,
        config: Any,
        model: SavedModel,
        optimizer: MasterOptimizer,
        scheduler: Any,
        *,
        num_steps: int,
        max_grad_norm: float,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.num_steps = num_steps
        self.max_grad_norm = max_grad_norm
        self.movement = WeightChange(model.model)
        self.trained = trained_parameters(model.model)
        self.world = init_distributed()
        self.progress = Progress()

    def start(self, run: Run) -> None:
        """Evaluate the initial model; not called when a run is resumed."""
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
        """Return metrics on held-out data, under keys ``eval/...``."""
        raise NotImplementedError

    def evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate when ``step`` steps are done."""
        raise NotImplementedError

    def save_due(self, step: int) -> bool:
        """Return whether to write a checkpoint when ``step`` steps are done."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write the trained model."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what the trainer opened, such as environments."""

    def prepare(self, run: Run) -> None:
        """Prepare training with the initial model; also called when a run is resumed."""

    def finish(self, run: Run) -> None:
        """Evaluate the trained model before it is saved."""

    def state(self) -> dict[str, Stateful]:
        """Return, by name, the objects besides the optimizer whose state checkpoints contain."""
        return {"progress": self.progress}

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        out_of_patience = (
            self.patience is not None and self.progress.evaluations_since_best >= self.patience
        )
        return out_of_patience or self.progress.step >= self.num_steps

    def apply_gradients(self) -> float:
        """Clip the gradients, take one optimizer step and clear them.

        Returns:
            The global norm of the gradients before clipping.

        Raises:
            Halt: The errors of `clip_gradients`; the model is then unchanged.
        """
        norm = self.clip_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def clip_gradients(self) -> float:
        """Clip the gradients and return their global norm before clipping.

        Raises:
            Halt: The norm is not finite, or weights that should train have no gradient.
        """
        check_trainable(self.optimizer, self.trained)
        norm = self.optimizer.clip_at_next_step(self.max_grad_norm)
        check_gradient_norm(
            norm, step=self.progress.step + 1, learning_rate_key=self.learning_rate_key
        )
        return norm

    def repeat_update(self, evidence: Mapping[str, Any]) -> None:
        """Repeat the gradients and the checks of the update that ended a run; apply nothing.

        Args:
            evidence: The evidence of the `Halt` that ended the run.

        Raises:
            Halt: The check fails again.
        """
        raise NotImplementedError
