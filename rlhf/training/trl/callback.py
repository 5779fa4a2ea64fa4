"""Callback that logs the metrics of TRL's trainers under the keys of this toolkit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from rlhf.common.files import write_text
from rlhf.models.trainable import WeightChangeDetector, parameter_names_without_gradient
from rlhf.runs.callbacks import Callbacks
from rlhf.runs.checksums import update_checksum
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.runs.progress import OFFLINE_DISPLAYED_METRICS, ProgressDisplay
from rlhf.training.distributed import init_distributed
from rlhf.training.numeric_checks import (
    check_gradient_norm_is_finite,
    check_parameters_are_trained,
    check_weights_are_finite,
)
from rlhf.training.optimizers import set_scheduled_learning_rates
from rlhf.training.trl.checkpoints import (
    load_unlogged_metrics,
    remove_older_checkpoints,
    save_unlogged_metrics,
    write_checksums_and_remove_older,
)

CALLBACKS_FILE = "callbacks.json"
"""Name of the file in a checkpoint with the state of the user's callbacks."""


class RunCallback(TrainerCallback):
    """Logs metrics to the run directory, displays progress, and stops training after a signal.

    Args:
        run: The run directory.
        stop: Records the signals that stop the run.
        weight_change_detector: Detects changes of the model. By default, ``train/moved`` is not
            logged.
        trained: The trained parameters of the model.
        callbacks: Callbacks of the user.
        tokenizer: Tokenizer of the model.
    """

    METRIC_NAMES = {  # noqa: RUF012
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "accuracy": "accuracy",
        "mean_token_accuracy": "token_accuracy",
        "entropy": "entropy",
        "margin": "margin",
        "rmse": "rmse",
        "mean_reward": "reward_mean",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "kl": "kl",
    }

    def __init__(
        self,
        run: Run,
        stop: StopSignalRecorder,
        weight_change_detector: WeightChangeDetector | None = None,
        trained: Sequence[torch.nn.Parameter] = (),
        callbacks: Callbacks | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.run, self.stop, self.trained = run, stop, trained
        self.weight_change_detector = weight_change_detector
        self.callbacks, self.tokenizer = callbacks or Callbacks(), tokenizer
        self.world = init_distributed()
        self.trainer: Any = None
        """The trainer that calls these methods, if it runs in one process. Its unlogged metrics are
        then saved in checkpoints."""
        self.checkpoint: Path | None = None
        """The checkpoint from which the run continues."""
        self.best: Path | None = None
        """The best checkpoint of a resumed run."""
        self.has_begun = False
        """Whether a step has begun, after which no file of a checkpoint is read."""
        self.num_without_gradient = 0
        self.reporter: ProgressDisplay | None = None
        self.monitor: TrainingMonitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Start the progress display, and remove old checkpoints that a killed run left.

        The learning rates of a loaded schedule become those of the configured number of steps.
        """
        if state.global_step and isinstance(lr_scheduler, LambdaLR):
            set_scheduled_learning_rates(lr_scheduler)
        if self.trainer and self.checkpoint:
            load_unlogged_metrics(self.trainer, self.checkpoint)
        if self.best:  # transformers records an absolute path, and the run may have been moved
            state.best_model_checkpoint = str(self.best)
        if self.run.writes and state.global_step:
            remove_older_checkpoints(
                Path(args.output_dir),
                keep=int(self.run.config["keep_last"]),
                best=state.best_model_checkpoint,
            )
        name = self.run.directory.name
        self.monitor = TrainingMonitor(self.run.directory, self.run.config)
        self.reporter = ProgressDisplay(
            name,
            state.max_steps,
            num_completed=state.global_step,
            displayed_metrics=OFFLINE_DISPLAYED_METRICS,
        )
        self.reporter.__enter__()

    def close(self) -> None:
        """Close the progress display."""
        if self.reporter:
            self.reporter.__exit__(None, None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record that a step has begun."""
        self.has_begun = True

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Check the clipped gradients before the optimizer step.

        Raises:
            Halt: The norm of the gradients is not finite, or a trained parameter is frozen.
        """
        check_parameters_are_trained(optimizer, self.trained)
        self.num_without_gradient = len(parameter_names_without_gradient(model))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        check_gradient_norm_is_finite(
            float(torch.nn.utils.get_total_norm(gradients)),
            step=state.global_step + 1,
            learning_rate_key="trainer.learning_rate",
            can_change_rate=False,  # TRL reads the learning rate from the checkpoint
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Any = None,
        model: Any = None,
        **_: Any,
    ) -> Any:
        """Log the trainer's metrics under the keys of this toolkit, and call the callbacks.

        Metrics that are not in ``METRIC_NAMES`` are ignored.
        """
        row = {}
        if "train_runtime" in (logs or {}):  # the summary at the end is not that of a step
            return control
        for key, value in (logs or {}).items():
            split, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
            if not isinstance(value, int | float) or name not in self.METRIC_NAMES:
                continue
            # A mean over no examples, such as the reward of the chosen replies in a batch without
            # chosen replies, is nan and is not logged. A nan loss or gradient norm is an error and
            # raises an alarm.
            if math.isfinite(value) or name in ("loss", "grad_norm"):
                row[f"{split}/{self.METRIC_NAMES[name]}"] = float(value)
        if (
            self.weight_change_detector
            and state.global_step
            and any(key.startswith("eval/") for key in row)
        ):
            row["train/moved"] = self.weight_change_detector.changed_tensor_fraction()
        if self.num_without_gradient and any(key.startswith("train/") for key in row):
            row["train/no_gradient"] = float(self.num_without_gradient)
        if row:
            self.run.log(state.global_step, row)
        if row and self.reporter and self.monitor:
            warnings = self.monitor.update(state.global_step, row)
            self.reporter.show(state.global_step, row, warnings)
        if row and state.global_step:
            evaluated = any(key.startswith("eval/") for key in row)
            point = "on_evaluation" if evaluated else "on_step"
            self._notify(point, state, control, model=model, metrics=row)
        return control

    def _notify(self, point: str, state: Any, control: Any, **fields: Any) -> None:
        """Call the user's callbacks. If one ends training, all processes stop after this step.

        Unless this happens at a checkpoint, the model is evaluated and saved first.
        """
        if not self.callbacks:
            return
        self.callbacks.notify(
            point,
            self.run,
            step=state.global_step,
            num_steps=state.max_steps,
            tokenizer=self.tokenizer,
            **fields,
        )
        if self.world.first_not_none(self.callbacks.stopped or None):
            self.callbacks.stopped = control.should_training_stop = True
            if point != "on_checkpoint":
                control.should_evaluate = control.should_save = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Display progress, and call the user's callbacks if the step is not logged.

        After a signal to any process, all processes save and stop.

        Raises:
            Halt: The weights are not finite before an evaluation, a checkpoint or the end.
        """
        if self.reporter:
            self.reporter.show(state.global_step, {})
        self.stop.number = self.world.first_not_none(self.stop.number)
        if self.stop.requested:
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_evaluate or control.should_training_stop:
            check_weights_are_finite(
                model,
                step=state.global_step,
                learning_rate_key="trainer.learning_rate",
                can_change_rate=False,
            )
        if not control.should_log:  # otherwise `on_log` has the metrics of the step
            self._notify("on_step", state, control, model=model)
        return control

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Complete a checkpoint, remove older checkpoints, and call the user's callbacks.

        The state of the callbacks and the checksums are added to the checkpoint.
        """
        folder, stopped = Path(args.output_dir) / f"checkpoint-{state.global_step}", False
        if self.run.writes:
            self.run.flush_logs()
            stopped = self.callbacks.stopped
            if self.callbacks:
                self._write_callbacks_state(folder)
            if self.trainer:
                save_unlogged_metrics(self.trainer, folder)
            write_checksums_and_remove_older(
                folder,
                keep=int(self.run.config["keep_last"]),
                best=state.best_model_checkpoint,
            )
        self._notify("on_checkpoint", state, control, model=model, folder=folder)
        if self.run.writes and self.callbacks.stopped and not stopped:
            update_checksum(self._write_callbacks_state(folder))

    def _write_callbacks_state(self, folder: Path) -> Path:
        """Write the state of the user's callbacks to a checkpoint; return the path of the file."""
        path = folder / CALLBACKS_FILE
        write_text(path, json.dumps(self.callbacks.state_dict()))
        return path
