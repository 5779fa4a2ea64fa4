"""Set up the training of a reward model of any kind, with the native engine or TRL."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from rlhf.common.user_code import definition_location_text, guarded_call
from rlhf.config.offline import LEARNING_RATES
from rlhf.config.reward import RewardConfig
from rlhf.data.labels import check_labels_have_one_scale
from rlhf.data.load import LoadedRows, load
from rlhf.errors import UserError
from rlhf.models.adapters import load_merged_model
from rlhf.models.architecture import unwrap_peft
from rlhf.models.saving import save_model
from rlhf.models.sharding.processes import (
    has_sharded_parameters,
    this_process_writes,
    value_of_first_process,
)
from rlhf.models.sharding.saving import write_model
from rlhf.models.trainable import remove_model_dropout
from rlhf.reward_models import Sidecar
from rlhf.reward_models.chat_template import make_template_end_with_eos, template_hash
from rlhf.reward_models.losses import IGNORED
from rlhf.runs.directory import Run
from rlhf.training.methods import OfflineMethod, Row, TrainerSpec, TrainingSetup, engine_of
from rlhf.training.reward_models.base import ReportInputs, RewardKind, reward_kind_of
from rlhf.training.reward_models.encoding import RewardEncoder, collate_texts
from rlhf.training.reward_models.new_head import load_model_tokenizer_and_pooling

log = logging.getLogger(__name__)

TRL_ONLY_OPTIONS = frozenset({"center_rewards_coefficient"})
"""Options of TRL's reward trainer that transformers' trainer does not have. With transformers'
trainer, only `PairKind.loss` implements these options."""

TOOLKIT_OPTIONS = frozenset({"disable_dropout"})
"""Options that this package implements for all trainers."""


def method_of(config: RewardConfig) -> OfflineMethod:
    """Return the training method of the configured kind of reward model.

    Raises:
        UserError: ``trainer.center_rewards_coefficient`` has no effect on the kind.
    """
    kind = reward_kind_of(config)
    for key in TRL_ONLY_OPTIONS & config.trainer.keys():
        if not kind.centers_scores:
            raise UserError(f"trainer.{key} has no effect on kind: {config.kind}; remove it")
    return OfflineMethod(
        kind.data,
        LEARNING_RATES["reward"],
        functools.partial(make_reward_setup, kind),
        native=kind.in_trl,
        additional_columns=kind.columns,
    )


def make_reward_setup(
    kind: RewardKind, config: RewardConfig, rows: Sequence[Row], engine: str
) -> TrainingSetup:
    """Load the model with a new head; return it with its encoder, trainer and report.

    ``engine`` is "native" or "trl". ``rows`` are the training rows. If the model is not a decoder,
    ``engine: auto`` selects TRL.

    Raises:
        UserError: The model or ``test_data`` cannot be used, or ``engine: native`` is set for a
            model that is not a decoder.
    """
    test = None
    if config.test_data:  # errors in these rows are reported before the training
        test = load(config.test_data, kind.data, seed=config.seed, keep=kind.columns)
        if kind.range_columns:
            check_labels_have_one_scale(
                itertools.chain(rows, test.rows), "test_data", kind.range_columns
            )
    model, tokenizer, pooling = load_model_tokenizer_and_pooling(kind)
    if engine == "native" and pooling != "last":
        engine = engine_of(config, native_supported=False)  # the native engine trains decoders only
    append_eos = pooling == "last" and kind.append_eos
    if append_eos:
        make_template_end_with_eos(tokenizer)
    encoder = RewardEncoder(kind, tokenizer, append_eos=append_eos)
    if config.trainer.get("disable_dropout", True):
        remove_model_dropout(model)
    sidecar = Sidecar(
        template_hash=template_hash(tokenizer),
        append_eos=append_eos,
        max_length=config.max_length,
        pooling=pooling,
        kind=kind.scorer,
        separator=config.separator if kind.per_token else None,
    )
    writer = _ModelAndReportWriter(kind, model, encoder, sidecar, test)
    return TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        encode=encoder,
        summary=encoder.truncated_and_dropped_text,
        save=writer.save,
        trainer=reward_trainer_spec(kind, model) if engine == "trl" else None,
        write_report=writer.evaluate_and_write_report,
        dropout=True,
    )


@dataclasses.dataclass(frozen=True)
class _ModelAndReportWriter:
    """Writes the trained model and its report."""

    kind: RewardKind
    model: Any
    """The model in training, in whose dtype the report loads the saved model."""
    encoder: RewardEncoder
    """The encoder of the training rows and of the held-out rows."""
    sidecar: Sidecar
    """The sidecar of the model, whose scope is not known before rows are encoded."""
    test: LoadedRows | None
    """The rows of ``test_data``; None if the report is on the held-out rows."""

    def save(self, trained: Any, final: Path) -> None:
        """Write the model, with merged adapters, its tokenizer and its sidecar to a folder."""
        tokenizer, writes = self.encoder.tokenizer, this_process_writes(trained)
        if unwrap_peft(trained) is not trained:
            trained = _merge_reward_model_adapters(trained, tokenizer, final)
        if trained is None:
            return
        trained.config.use_cache = True
        self.kind.before_saving(trained)
        write_model(trained, final)
        if not writes:
            return
        tokenizer.save_pretrained(final)
        scope = "reply" if self.encoder.bare_texts else "conversation"
        dataclasses.replace(self.sidecar, scope=scope).write(final)

    def evaluate_and_write_report(self, run: Run) -> None:
        """Evaluate the saved model on ``test_data`` or the held-out rows; write the report."""
        kind, encoder, test = self.kind, self.encoder, self.test
        dropped: dict[str, int] = {}
        if test is not None:
            test.log_summary("test_data")
            encoder(test.rows, False)
            dropped = test.dropped
        train_rows, test_rows = encoder.encoded_rows[True], encoder.encoded_rows[False]
        dropped = {**dropped, **encoder.dropped[False]}
        dtype = str(self.model.dtype).removeprefix("torch.")
        for line in kind.report(ReportInputs(run, train_rows, test_rows, dropped, dtype)):
            log.info("%s", line)


def _merge_reward_model_adapters(trained: Any, tokenizer: Any, final: Path) -> Any:
    """Merge the adapters of a reward model into its base model.

    A sharded model is saved and loaded again, and is whole only in the first process. In the other
    processes, the result is None.
    """
    if not has_sharded_parameters(trained):
        return trained.merge_and_unload()
    writes = this_process_writes(trained)
    with contextlib.ExitStack() as stack:
        folder = None
        if writes:
            temporary = tempfile.TemporaryDirectory(dir=final.parent, prefix=".adapter-")
            folder = Path(stack.enter_context(temporary))
        save_model(trained, tokenizer, value_of_first_process(folder))
        if folder is None:
            return None
        merged = load_merged_model(str(folder))
    for parameter in merged.base_model.parameters():
        parameter.data = parameter.data.to(trained.dtype)
    return merged


def reward_trainer_spec(kind: RewardKind, model: Any) -> TrainerSpec:
    """Return the specification of TRL's trainer if TRL implements the loss of the kind.

    Otherwise, return the specification of transformers' trainer with the loss of the kind.
    """
    # The encoder has already ordered the rows into batches of similar length.
    defaults = {"train_sampling_strategy": "sequential"}
    fixed: dict[str, Any] = {"remove_unused_columns": False}
    if kind.in_trl:
        import trl

        from rlhf.training.trl.columns import reward_trainer_dataset

        return TrainerSpec(
            trl.RewardTrainer,
            trl.RewardConfig,
            functools.partial(reward_trainer_dataset, margins=kind.config.margins),
            defaults=defaults,
            # The encoder truncates long texts; TRL would drop the rows.
            fixed=fixed | {"max_length": None, "disable_dropout": False},
            handled_options=TOOLKIT_OPTIONS,
        )

    what = f"kind {kind.config.kind}"

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        with guarded_call(kind.loss, what=f"{what}: loss", advice="use tensor operations"):
            value: Any = kind.loss(outputs["logits"].float(), labels, count)
        constant = torch.is_grad_enabled() and not getattr(value, "requires_grad", False)
        if not isinstance(value, Tensor) or value.dim() or constant:
            raise UserError(
                f"{what}: loss{definition_location_text(kind.loss)} returned a "
                f"{type(value).__name__} of shape {list(getattr(value, 'shape', ()))}: return a "
                "scalar tensor that depends on the logits"
            )
        return value

    def metrics(prediction: Any) -> dict[str, float]:
        with guarded_call(kind.metrics, what=f"{what}: metrics", advice="use array operations"):
            return kind.metrics(
                np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
            )

    arguments = {
        "data_collator": functools.partial(collate_texts, pad_id=model.config.pad_token_id),
        "compute_loss_func": loss,
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": kind.group_by_example,
    }
    return TrainerSpec(
        transformers.Trainer,
        transformers.TrainingArguments,
        list,
        arguments,
        defaults,
        fixed,
        TOOLKIT_OPTIONS | TRL_ONLY_OPTIONS,
    )
