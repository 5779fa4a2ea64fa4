"""Define a callback and arguments that all benchmarks of TRL use."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.worker import Job, StepTimer

ENDLESS = 10_000


class PacedCallback(TrainerCallback):
    """Callback that pauses a trainer after every step until the harness starts the next step."""

    def __init__(self, timer: StepTimer, work: float) -> None:
        self.timer, self.work = timer, work

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the start of the first step."""
        self.timer.wait_for_start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the timer after an optimizer step, and wait for the start of the next step.

        Logging and data loading are part of the next step.
        """
        self.timer.done(self.work)
        self.timer.wait_for_start()


def trl_arguments(job: Job, *, tuned: bool, batch_size: int) -> dict[str, Any]:
    """Return the arguments of a TRL configuration.

    TRL's defaults are bf16 autocast, gradient checkpointing and fused AdamW. Without an
    accelerator, TRL requires ``use_cpu``. With ``tuned``, gradient checkpointing is off. The
    allocator settings of the tuned configuration are applied before the process imports torch.
    """
    import torch

    chosen: dict[str, Any] = {
        "output_dir": str(job.folder / "trl"),
        "per_device_train_batch_size": batch_size,
        "max_steps": ENDLESS,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return {**chosen, "gradient_checkpointing": False} if tuned else chosen
