"""Types of the arguments of the training functions and of `evaluate`.

The keys are those of the configuration.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from rlhf.api.results import Run
from rlhf.common.conversation import RewardFunction
from rlhf.config.data import DataSpec
from rlhf.config.evaluate import ApiSpec, HarnessTasksSpec, ZeroShotClassificationSpec
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
TextFunction: TypeAlias = Callable[..., str] | type
"""Function of the messages of an episode that returns the reply, or class of such functions."""
Environment: TypeAlias = str | Keys | EnvSpec | Callable[..., Any] | Any
"""Gymnasium id, configuration, environment class, factory, or environment."""
Data: TypeAlias = Path | Keys | DataSpec | Sequence[Any] | Any
"""Path, hub id, configuration, ``datasets.Dataset``, pandas DataFrame, or list of rows."""
Reward: TypeAlias = RewardFunction | Path | Keys | Any
"""Function of conversations, `Reward`, kind, trained reward model, or configuration."""
Sampling: TypeAlias = OnlineRolloutSpec | Keys | Any
"""Configuration, or transformers' ``GenerationConfig``."""
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
    """Arguments of `sft`, `dpo` and `kto`, and of `train_reward`."""

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


class EvaluationOptions(TypedDict, total=False):
    """Arguments of `evaluate`."""

    output_dir: Path
    policies: Mapping[str, Model | TextFunction | ApiSpec | None] | Sequence[Keys]
    env: Environment
    prompts: Data
    rewards: Reward | Sequence[Reward]
    text: Data
    classes: ZeroShotClassificationSpec | Keys
    tasks: HarnessTasksSpec | Keys
    pairs: Data
    pairs_train: Data
    rollout: Sampling
    episodes: int
    samples: int
    first_episode: int
    decoding: Literal["greedy", "sampled"]
    max_length: int
    seed: int
    resume: bool
    overwrite: bool
    plugins: Sequence[str]


class OnlineOptions(TrainingOptions, total=False):
    """Arguments of the online algorithms."""

    env: Environment
    prompts: Data
    rewards: Reward | Sequence[Reward]
    gold: Reward | Sequence[Reward]
    algorithm: Keys
    rollout: Sampling
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


F = TypeVar("F", bound=Callable[..., Run])


def show_options_in_signature(options: type) -> Callable[[F], F]:
    """Return a decorator that sets ``__signature__`` to the keys of ``options``, for help texts."""
    parameters = [
        inspect.Parameter("config", inspect.Parameter.POSITIONAL_ONLY, default=None),
        *(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=None)
            for key, hint in typing.get_type_hints(options).items()
        ),
    ]

    def decorate(function: F) -> F:
        signature = inspect.Signature(parameters, return_annotation=Run)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
