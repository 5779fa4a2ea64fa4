"""Configuration of offline training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.common.ranges import PositiveInt, ProperFraction
from rlhf.config.base import TrainingConfig
from rlhf.config.data import DataSpec
from rlhf.config.optimization import OPTIONS_BY_COMMAND, NativeOptions


@dataclass(frozen=True)
class OfflineConfig(TrainingConfig):
    """Configuration of `rlhf sft|dpo|kto`. Batch sizes are over all processes."""

    data: list[DataSpec]
    """Training rows: prompts with completions (sft), pairs (dpo), or labels (kto)."""
    eval_data: list[DataSpec] = field(default_factory=list)
    """Held-out rows; empty: eval_fraction of the training rows, split by prompt."""
    eval_fraction: ProperFraction = 0.1
    """Share of the training rows that is held out, with all rows of a prompt in one part."""
    max_length: PositiveInt = 512
    """Largest number of tokens of an example; longer examples are truncated and counted."""
    batch_size: PositiveInt = 16
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 8
    """Examples of max_length in a micro-batch; divides batch_size. The native engine packs shorter
    examples into the same number of tokens."""
    engine: Literal["auto", "native", "trl"] = "auto"
    """Training engine. auto: native for sft, dpo and reward models on pairs, else TRL."""
    evaluations: PositiveInt = 4
    """Number of evaluations and checkpoints; the best model is kept as final/."""
    patience: PositiveInt | None = None
    """Stop after this number of evaluations without an improvement; None: never."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Options under TRL's names, e.g. learning_rate, num_train_epochs, max_steps, beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: the list is empty; name at least one data set")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and "
                f"{self.micro_batch_size}"
            )


LEARNING_RATES = {"sft": 2e-5, "reward": 2e-5, "dpo": 1e-6, "kto": 1e-6}
"""Default of trainer.learning_rate, by command."""

# Option of TRL that the user cannot set -> the keys that set it.
RESERVED_OPTIONS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "max_length": "max_length",
    "truncation_mode": "nothing: a longer example loses its end",
    "per_device_train_batch_size": "batch_size and micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "eval_strategy": "evaluations",
    "eval_steps": "evaluations",
    "save_strategy": "evaluations",
    "save_steps": "evaluations",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "resume_from_checkpoint": "resume",
    "load_best_model_at_end": "evaluations",
    "use_cpu": "nothing: the accelerator is used if there is one",
}


def trainer_defaults(command: str) -> dict[str, Any]:
    """Return the defaults of `trainer` for an offline command, for both engines."""
    fields = dataclasses.fields(OPTIONS_BY_COMMAND.get(command, NativeOptions))
    values = {field.name: field.default for field in fields}
    values["learning_rate"] = LEARNING_RATES[command]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
