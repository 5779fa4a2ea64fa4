"""Types of the arguments of the training functions. The keys are those of the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from rlhf.algorithms.settings import Settings
from rlhf.common.conversation import RewardFunction
from rlhf.config.data import DataSpec
from rlhf.config.model import LoraSpec, ModelSpec
from rlhf.config.online import EvaluationSpec, KLSpec, OptimizerSpec, RewardShaping
from rlhf.config.rollout import EnvSpec, OnlineRolloutSpec
from rlhf.runs.callbacks import Callback, TrainingEvent

Path: TypeAlias = str | os.PathLike[str]
Keys: TypeAlias = Mapping[str, Any]
"""A part of a configuration as plain data."""
Config: TypeAlias = Mapping[str, Any] | Path
"""A configuration: a mapping, or the path of a YAML file."""
Model: TypeAlias = Path | Keys | ModelSpec | Any
"""Hub id, folder, finished `Run`, configuration, or loaded transformers model."""
Environment: TypeAlias = str | Keys | EnvSpec | Callable[..., Any] | Any
"""Gymnasium id, configuration, environment class, factory, or environment."""
Data: TypeAlias = Path | Keys | DataSpec | Sequence[Any] | Any
"""Path, hub id, configuration, ``datasets.Dataset``, pandas DataFrame, or list of rows."""
Reward: TypeAlias = RewardFunction | Path | Keys | Any
"""Function of conversations, `Reward`, kind, trained reward model, or configuration."""
CallbackLike: TypeAlias = Callback | type[Callback] | Callable[[TrainingEvent], Any] | str | Keys


class TrainingOptions(TypedDict, total=False):
    """Arguments of every training function."""

    output_dir: Path
    model: Model
    tokenizer: Any
    lora: LoraSpec | Keys | Any
    seed: int
    resume: bool
    allow_changes: Sequence[str]
    overwrite: bool
    plugins: Sequence[str]
    callbacks: CallbackLike | Sequence[CallbackLike]
    track: Sequence[str]
    keep_last: int
    alarms: Mapping[str, str]
    activation_checkpointing: bool
    sharding: Literal["none", "fsdp"]
    profile: bool


class OfflineOptions(TrainingOptions, total=False):
    """Arguments of `sft`, `dpo` and `kto`."""

    data: Data
    eval_data: Data
    eval_fraction: float
    max_length: int
    batch_size: int
    micro_batch_size: int
    engine: Literal["auto", "native", "trl"]
    evaluations: int
    patience: int
    data_processes: int
    data_cache: Path
    trainer: Keys


class RewardOptions(OfflineOptions, total=False):
    """Arguments of `train_reward`."""

    kind: str
    margins: bool
    flip_rate: float
    length_coef: float
    labels: Sequence[str]
    num_heads: int
    separator: str
    test_data: Data


class OnlineOptions(TrainingOptions, total=False):
    """Arguments of the online algorithms."""

    env: Environment
    prompts: Data
    rewards: Reward | Sequence[Reward]
    gold: Reward | Sequence[Reward]
    algorithm: Settings | Keys
    rollout: OnlineRolloutSpec | Keys
    optimizer: OptimizerSpec | Keys
    kl: KLSpec | Keys
    shaping: RewardShaping | Keys
    evaluation: EvaluationSpec | Keys
    critic: Literal["shared", "separate"]
    critic_warmup_steps: int
    num_steps: int
    episodes_per_step: int
    micro_batch_tokens: int
    save_every: int
    keep_best: bool
    samples_per_step: int
