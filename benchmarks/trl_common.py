"""What TRL's sides share. Options are TRL's defaults unless the side is tuned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.worker import Job, StepTimer

ENDLESS = 10_000


class Paced(TrainerCallback):
    """Makes a trainer wait for its turn after every step."""

    def __init__(self, timer: StepTimer, work: float) -> None:
        self.timer, self.work = timer, work

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first turn."""
        self.timer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimizer step was taken; its logging and the next batch belong to the next."""
        self.timer.done(self.work)
        self.timer.start()


def options(job: Job, *, tuned: bool, batch_size: int) -> dict[str, Any]:
    """Arguments of a TRL configuration.

    As it comes: bf16 autocast, gradient checkpointing, fused AdamW; ``use_cpu`` where there is no
    accelerator, without which it refuses to start. Tuned: no checkpointing (the allocator settings
    are the process's own).
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
