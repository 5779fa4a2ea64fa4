"""Common code of TRL's sides. Options are TRL's defaults unless the side is tuned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.worker import Job, StepTimer

ENDLESS = 10_000


class Paced(TrainerCallback):
    """Callback that makes a trainer wait for its turn after every step."""

    def __init__(self, timer: StepTimer, work: float) -> None:
        self.timer, self.work = timer, work

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first turn."""
        self.timer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the timer after an optimizer step; logging and loading count for the next step."""
        self.timer.done(self.work)
        self.timer.start()


def options(job: Job, *, tuned: bool, batch_size: int) -> dict[str, Any]:
    """Return the arguments of a TRL configuration.

    The defaults are bf16 autocast, gradient checkpointing and fused AdamW; without an accelerator,
    TRL requires ``use_cpu``. Tuned sides do not use checkpointing (their allocator settings are set
    by the process).
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
