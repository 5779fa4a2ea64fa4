"""`rlhf reward`: a reward model of any kind, through TRL where TRL has the loss, else through plain
transformers; what it leaves loads back as the scorer of its kind."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rlhf.config.model import LoraSpec
from rlhf.config.offline import LEARNING_RATES
from rlhf.config.reward import RewardConfig
from rlhf.data.load import load
from rlhf.errors import UserError
from rlhf.models.adapters import add_lora, is_adapter, merged_model
from rlhf.models.fast.packing import keep_attention
from rlhf.models.hub import refuse_quantised
from rlhf.models.load_check import check_scorer, read_causal
from rlhf.models.loading import Source, cast, give_pad_token, load_tokenizer, set_template_options
from rlhf.models.logprobs import bare
from rlhf.models.precision import choose_dtype, default_device, use_threads
from rlhf.models.trainable import make_trainable, remove_own_dropout
from rlhf.reward_models import Sidecar
from rlhf.reward_models.checkpoint import heads_in_fp32, keep_first_output, pooling_of
from rlhf.reward_models.encoding import end_template_at_score, template_hash
from rlhf.reward_models.generic_heads import has_own_classifier, with_head
from rlhf.runs.directory import Run
from rlhf.training.examples import Example
from rlhf.training.reward_models.encoders import Collator, RewardEncoder
from rlhf.training.reward_models.kinds import RewardKind, kind_of, outputs_of
from rlhf.training.reward_models.report import judge
from rlhf.training.stages import Row, Stage, TrainerSpec, Work, engine_of

log = logging.getLogger(__name__)

# What TRL's reward trainer does and transformers' own does not; the kinds see to it themselves.
TRL_ONLY = frozenset({"center_rewards_coefficient"})
# Dropout is the same for every trainer: that of adapters stays as configured.
OURS = frozenset({"disable_dropout"})


def stage_of(config: RewardConfig) -> Stage:
    """Return the training method of a kind of reward model."""
    kind = kind_of(config)
    columns = config.labels if kind.data == "rated" else []
    plain = kind.data == "rated" and columns in ([], ["label"])  # the column of that name
    return Stage(
        "classification" if plain else kind.data,
        LEARNING_RATES["reward"],
        functools.partial(prepare, kind),
        native=is_bradley_terry(config),
        keep=() if plain else (*kind.keep, *columns),
    )


def is_bradley_terry(config: RewardConfig) -> bool:
    """Whether the kind is Bradley-Terry with one head, which TRL and our engine implement."""
    return config.kind == "preference" and config.num_heads == 1


def prepare(kind: RewardKind, config: RewardConfig, rows: list[Row], engine: str) -> Work:
    """Set up a run: the model with a new head, the encoder, and the trainer of this kind."""
    stage = stage_of(config)
    model, tokenizer, pooling = load_scorer(config, kind)
    if engine == "native" and pooling != "last":
        engine = engine_of(config, native=False)  # our engine has no encoders
    append_eos = pooling == "last" and kind.report != "compare"
    if append_eos:
        end_template_at_score(tokenizer)
    encoder = RewardEncoder(config, tokenizer, kind.encode, append_eos=append_eos)
    if config.trainer.get("disable_dropout", True):
        remove_own_dropout(model)
    sidecar = Sidecar(
        template_hash=template_hash(tokenizer),
        append_eos=append_eos,
        max_length=config.max_length,
        pooling=pooling,
        kind="heads" if config.num_heads > 1 else kind.scorer,
        separator=config.separator if kind.scorer == "process" else None,
    )

    def encode(rows: Sequence[Row], training: bool) -> list[Any]:
        examples = encoder(rows, training)
        return [_pair_example(row) for row in examples] if is_bradley_terry(config) else examples

    def save(trained: Any, final: Path) -> None:
        trained = trained.merge_and_unload() if bare(trained) is not trained else trained
        trained.config.use_cache = True
        if config.kind == "length_debiased":
            keep_first_output(trained, name="reward")
        trained.save_pretrained(final)
        tokenizer.save_pretrained(final)
        scope = "reply" if encoder.bare_texts else "conversation"
        dataclasses.replace(sidecar, scope=scope).write(final)

    def report(run: Run) -> None:
        dropped: dict[str, int] = {}
        if config.test_data:
            loaded = load(config.test_data, stage.data, seed=config.seed, keep=stage.keep)  # type: ignore[arg-type]
            log.info("test_data: %s", loaded.summary())
            encoder(loaded.rows, False)
            dropped = loaded.dropped
        kept = encoder.kept
        dropped = {**dropped, **encoder.dropped[False]}
        judge(kind, config, run, kept[True], kept[False], dropped=dropped, dtype=model.dtype)

    trainer = reward_trainer(kind, config, model) if engine == "trl" else None
    return Work(
        model=model,
        tokenizer=tokenizer,
        encode=encode,
        summary=encoder.summary,
        save=save,
        trainer=trainer,
        judge=report,
        dropout=True,
    )


def _pair_example(row: Row) -> Example:
    texts = tuple(row["texts"])
    return Example(texts, texts, margin=row["labels"][0])


def reward_trainer(kind: RewardKind, config: RewardConfig, model: Any) -> TrainerSpec:
    """Return TRL's trainer where TRL has the loss, else transformers' own with ours."""
    # The encoder has ordered the rows: batches of like length, in random order.
    defaults = {"train_sampling_strategy": "sequential"}
    owned: dict[str, Any] = {"remove_unused_columns": False}
    if is_bradley_terry(config):
        import trl

        from rlhf.training.trl.columns import reward_columns

        return TrainerSpec(
            trl.RewardTrainer,
            trl.RewardConfig,
            functools.partial(reward_columns, margins=config.margins),
            defaults=defaults,
            # The encoder truncates; TRL would drop the row.
            owned=owned | {"max_length": None, "disable_dropout": False},
            handled=OURS,
        )
    arguments = {
        "data_collator": Collator(model.config.pad_token_id),
        "compute_loss_func": kind.loss(config),
        "compute_metrics": kind.metrics,
        "preprocess_logits_for_metrics": kind.shape,
    }
    return TrainerSpec(
        transformers.Trainer,
        transformers.TrainingArguments,
        list,
        arguments,
        defaults,
        owned,
        OURS | TRL_ONLY,
    )


def load_scorer(config: RewardConfig, kind: RewardKind) -> tuple[Any, Any, str]:
    """Model, tokenizer and pooling: a fresh float32 head on the backbone, pad distinct from EOS.

    Raises:
        UserError: there is no such model, or its positions do not reach max_length.
    """
    if config.model.scratch:
        raise UserError("model.scratch: a reward model starts from a language model; give a path")
    place = Source.of(config.model).place
    tokenizer = load_tokenizer(place)
    set_template_options(tokenizer, config.model)
    model = with_new_head(place, outputs_of(config), steps=kind.scorer == "process")
    model.config.problem_type = problem_type(kind)
    model.config.use_cache = False  # keys and values are of no use in training
    positions = model.config.to_dict().get("max_position_embeddings")
    if positions is not None and config.max_length > positions:
        raise UserError(
            f"max_length must be <= {positions} for this model, got {config.max_length}"
        )
    give_pad_token(tokenizer, model)
    if config.num_heads > 1:
        spread_heads(model)
    device = default_device()
    size = model.num_parameters()
    cast(model, device, choose_dtype(config.model.dtype, size, device))
    if config.model.attn_implementation:
        keep_attention(model, config.model.attn_implementation)
    use_threads(model, device)
    heads_in_fp32(model)
    if kind.scorer != "process":
        check_scorer(model)
    pooling = "steps" if kind.scorer == "process" else pooling_of(model)
    if config.model.lora:
        model = add_adapters(model, config.model.lora, kind, seed=config.seed)
    return make_trainable(model), tokenizer, pooling


def with_new_head(place: str, names: list[str], *, steps: bool) -> Any:
    """The backbone of a model folder with a fresh head, in float32; adapters are merged first.

    Args:
        place: folder of a language model, or of an adapter on one.
        names: of the outputs.
        steps: read every token instead of the whole text.

    Raises:
        UserError: there is no such model, or it cannot carry a head.
    """
    labels = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    refuse_quantised(place)
    options = {"dtype": torch.float32, "output_loading_info": True}
    automatic: Any = (
        AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    )
    try:
        merged = merged_model(place) if is_adapter(place) else None
        config = merged.config if merged else AutoConfig.from_pretrained(place)
        if not has_own_classifier(config, steps=steps):
            causal = merged or read_causal(place, dtype=torch.float32)
            return with_head(causal, labels, steps=steps)
        if merged is None:
            model, info = automatic.from_pretrained(place, **options, **labels)
        else:
            for key, value in labels.items():
                setattr(config, key, value)
            with torch.device("meta"):
                kind = type(automatic.from_config(config))
            model, info = kind.from_pretrained(
                None, config=config, state_dict=merged.state_dict(), **options
            )
    except UserError:
        raise
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place} cannot carry a reward head: {reason}") from error
    _refuse_random_backbone(place, model, info["missing_keys"])
    return model


def _refuse_random_backbone(place: str, model: Any, missing: Iterable[str]) -> None:
    """Refuse a model of which more than the new head would be random.

    Raises:
        UserError: names the weights.
    """
    prefix = f"{model.base_model_prefix}."
    # A pooler belongs to the head: language models are saved without one.
    lost = sorted(name for name in missing if name.startswith(prefix) and ".pooler." not in name)
    if lost:
        raise UserError(
            f"{place} cannot carry a reward head: weights {', '.join(lost[:3])} of the backbone "
            "are missing and would be random"
        )


def problem_type(kind: RewardKind) -> str | None:
    """How transformers calls what the outputs mean, for whoever loads the checkpoint plainly."""
    names = {"ratings": "regression", "flags": "multi_label_classification"}
    if kind.report == "classes" and kind.encode.__name__ == "many_classes":
        return "single_label_classification"
    return names.get(kind.report)


def head_modules(model: Any) -> dict[str, Any]:
    """The modules beside the backbone, by name."""
    return {name: m for name, m in model.named_children() if m is not model.base_model}


def spread_heads(model: Any) -> None:
    """Give the heads weights of the usual size for a linear layer, 1 / sqrt(width).

    Where the data do not decide, heads differ by what they started from; language models start new
    layers so small that they would hardly differ at all.
    """
    for module in head_modules(model).values():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


def add_adapters(model: Any, spec: LoraSpec, kind: RewardKind, *, seed: int) -> Any:
    """LoRA on the backbone; the head, which is new, is trained whole and saved."""
    # Without modules_to_save the head would stay random, frozen under the adapters.
    heads = [name for name, m in head_modules(model).items() if any(True for _ in m.parameters())]
    task = "TOKEN_CLS" if kind.scorer == "process" else "SEQ_CLS"
    return add_lora(model, spec, seed=seed, task=task, heads=heads)
