"""Configuration of offline training: `rlhf sft`, `rlhf dpo`, `rlhf kto`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import TypedDict

from rlhf.common.ranges import OTHER_KEYS_ALLOWED, PositiveInt, ProperFraction
from rlhf.config.base import TrainingConfig
from rlhf.config.data import DataSpec
from rlhf.config.optimization import OPTIONS_BY_COMMAND, NativeOptions


class TrainerOptions(TypedDict, total=False):
    """The options under `trainer` that are set, with TRL's names.

    The fields are the options that are read outside the training engines. All options of a command
    are the fields of a dataclass, such as ``trl.DPOConfig`` or `NativeOptions`, with which
    `rlhf.config.load.build_config` checks names and values.
    """

    __pydantic_config__ = OTHER_KEYS_ALLOWED  # type: ignore[misc]

    max_steps: int
    """Number of optimizer steps; -1 for the number of steps of num_train_epochs."""
    num_train_epochs: float
    """Number of epochs."""
    optim: str
    """Name of the optimizer."""
    pad_to_multiple_of: int | str | None
    """The width of a padded batch is a multiple of this number; auto: of 1."""
    center_rewards_coefficient: float | None
    """Weight of the centering term of reward models."""
    disable_dropout: bool
    """Disable the dropout layers of a reward model."""


@dataclass(frozen=True)
class OfflineConfig(TrainingConfig):
    """Configuration of `rlhf sft|dpo|kto`. Batch sizes are totals over all processes."""

    data: list[DataSpec]
    """Training rows: prompts with completions (sft), preference pairs (dpo), or replies with binary
    labels (kto)."""
    eval_data: list[DataSpec] = field(default_factory=list)
    """Held-out rows. If the list is empty, eval_fraction of the training rows is held out."""
    eval_fraction: ProperFraction = 0.1
    """Fraction of the training rows that is held out. Rows with the same prompt are either all held
    out or all used for training."""
    max_length: PositiveInt = 512
    """Maximum number of tokens of an example. Longer examples are truncated, and their number is
    logged."""
    batch_size: PositiveInt = 16
    """Number of examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 8
    """Number of examples in a micro-batch; must divide batch_size. The native engine packs examples
    that are shorter than max_length, so a micro-batch has up to micro_batch_size * max_length
    tokens."""
    engine: Literal["auto", "native", "trl"] = "auto"
    """Training engine. auto: native for sft, dpo, and reward models of kind preference with one
    head on a decoder, otherwise trl."""
    evaluations: PositiveInt = 4
    """Approximate number of evaluations during training; the steps between them are the number of
    steps divided by this number, rounded down, but at least 1. A checkpoint is saved at each
    evaluation, and the model with the best evaluation is saved as final/."""
    patience: PositiveInt | None = None
    """Stop training after this number of consecutive evaluations without an improvement. By
    default, training does not stop early."""
    data_processes: PositiveInt | None = None
    """Maximum number of processes that read and encode large datasets. By default, one for each
    available processor. Small datasets are read in the process of the run."""
    data_cache: str | None = None
    """Folder in which the rows and examples of large datasets are kept for later runs. By default,
    it is the folder rlhf in the cache of the library datasets (HF_DATASETS_CACHE)."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    """Options of the trainer, with TRL's names, e.g. learning_rate, num_train_epochs, max_steps,
    beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: the list is empty; give at least one dataset")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and "
                f"{self.micro_batch_size}"
            )


LEARNING_RATES = {"sft": 2e-5, "reward": 2e-5, "dpo": 1e-6, "kto": 1e-6}
"""Default of trainer.learning_rate, by command."""

_OWN_TOKENIZER = "the tokenizer and the chat template of model.path are used and saved"
_OWN_COLUMNS = "the examples are encoded by this toolkit, and only replies are trained on"
_LOWEST_LOSS = "the model with the lowest held-out loss is saved"

# Option of TRL that the user cannot set -> what to do instead, or why.
RESERVED_OPTIONS = {
    "output_dir": "use output_dir instead",
    "seed": "use seed instead",
    "max_length": "use max_length instead",
    "truncation_mode": "the end of a longer example is always removed",
    "per_device_train_batch_size": "use batch_size and micro_batch_size instead",
    "per_device_eval_batch_size": "use micro_batch_size instead",
    "gradient_accumulation_steps": "use batch_size and micro_batch_size instead",
    "eval_strategy": "use evaluations instead",
    "eval_steps": "use evaluations instead",
    "save_strategy": "use evaluations instead",
    "save_steps": "use evaluations instead",
    "bf16": "use model.dtype instead",
    "fp16": "use model.dtype instead",
    "resume_from_checkpoint": "use resume instead",
    "load_best_model_at_end": "use evaluations instead",
    "metric_for_best_model": _LOWEST_LOSS,
    "greater_is_better": _LOWEST_LOSS,
    "bf16_full_eval": "use model.dtype instead",
    "fp16_full_eval": "use model.dtype instead",
    "model_init_kwargs": "use the keys of model instead",
    "trust_remote_code": "code in the folder of a model is never run",
    "chat_template_path": _OWN_TOKENIZER,
    "eos_token": _OWN_TOKENIZER,
    "pad_token": _OWN_TOKENIZER,
    "dataset_text_field": "use data.columns instead",
    "dataset_kwargs": _OWN_COLUMNS,
    "completion_only_loss": _OWN_COLUMNS,
    "assistant_only_loss": _OWN_COLUMNS,
    "remove_unused_columns": _OWN_COLUMNS,
    "use_cpu": "the accelerator is used if there is one",
}


def trainer_defaults(command: str) -> dict[str, Any]:
    """Return the defaults of the options in `trainer` for an offline command.

    The native engine and TRL have the same defaults.
    """
    fields = dataclasses.fields(OPTIONS_BY_COMMAND.get(command, NativeOptions))
    values = {field.name: field.default for field in fields}
    values["learning_rate"] = LEARNING_RATES[command]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def trl_specific_defaults(trl_config_class: type) -> dict[str, Any]:
    """Return the defaults of the options that a configuration class of TRL adds to transformers'.

    Options whose default is not a text, number or boolean, and those that other keys of the
    configuration set, are omitted.

    Args:
        trl_config_class: The class, such as ``trl.KTOConfig``.
    """
    from transformers import TrainingArguments

    omitted = {field.name for field in dataclasses.fields(TrainingArguments)} | set(
        RESERVED_OPTIONS
    )
    return {
        field.name: field.default
        for field in dataclasses.fields(trl_config_class)
        if field.name not in omitted and isinstance(field.default, str | int | float)
    }
