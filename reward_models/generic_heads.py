"""Classification heads for decoder families that have no classifier in Transformers.

This module creates classes that combine the base model of a family with the generic head of
Transformers (a linear layer on the last token or on every token). A class has the name that it
would have in Transformers, and its checkpoints have the usual format. The file
``reward_model.json`` next to the weights describes how texts are encoded.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from rlhf.errors import UserError


def _hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the last hidden states [B, T, D] of the base model of ``model``."""
    trunk = getattr(model, model.base_model_prefix)
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    return trunk(input_ids, use_cache=False, **mask).last_hidden_state


class LastTokenClassifier(GenericForSequenceClassification):
    """Mix-in for a classifier with a linear head on the last token that is not padding.

    ``_generic_classifier_class`` combines it with a family. ``forward`` ignores other arguments,
    such as ``labels``, and returns no loss.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        """Return logits [B, K] of texts [B, T].

        Without a mask, every pad token counts as padding, and padding must be on the right.
        """
        states = _hidden_states(self, input_ids, attention_mask)
        config: Any = self.config  # type: ignore[attr-defined]
        is_token = input_ids != config.get_text_config().pad_token_id
        if attention_mask is not None:
            is_token = attention_mask.bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(is_token, positions, 0).amax(1)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutput(logits=self.score(states[rows, last]))


class EveryTokenClassifier(GenericForTokenClassification):
    """Mix-in for a classifier with a linear head on every token; see `LastTokenClassifier`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> TokenClassifierOutput:
        """Return logits [B, T, K] of texts [B, T]."""
        states = _hidden_states(self, input_ids, attention_mask)
        return TokenClassifierOutput(logits=self.score(self.dropout(states)))


def classifier_class(path: str | Path, *, per_token: bool = False) -> Any:
    """Return the class whose ``from_pretrained`` loads a classification checkpoint.

    The class is the auto class of Transformers if Transformers has a classifier for the family, and
    a class of this module otherwise.

    Args:
        path: Folder or Hugging Face Hub id.
        per_token: Whether the head is applied to every token instead of to whole texts.

    Raises:
        OSError: There is no configuration (from Transformers).
        ValueError: The configuration is not valid (from Transformers).
    """
    config = AutoConfig.from_pretrained(path)
    # For an unknown family, `from_pretrained` of the returned class raises an error.
    generic = (
        None
        if transformers_has_classifier(config, per_token=per_token)
        else _generic_classifier_class(type(config), per_token)
    )
    return generic or _auto_classifier_class(per_token)


def classifier_with_new_head(
    causal_model: Any, label_config: Mapping[str, Any], *, per_token: bool
) -> Any:
    """Return a classifier with the base model of a language model and a newly initialized head.

    The base model is reused and not copied, so that its non-persistent buffers keep their values.

    Args:
        causal_model: The language model; it must not be used afterwards.
        label_config: ``num_labels``, ``id2label`` and ``label2id`` of the configuration.
        per_token: Whether the head is applied to every token instead of to whole texts.

    Raises:
        UserError: The model has no separate base model, or is not of a decoder family.
    """
    model_class = _generic_classifier_class(type(causal_model.config), per_token)
    if model_class is None:
        raise UserError(f"{type(causal_model).__name__} has no decoder-only base model")
    config = copy.deepcopy(causal_model.config)
    for key, value in label_config.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = model_class(config)
    trunk = causal_model.base_model
    if type(trunk) is not type(getattr(model, model.base_model_prefix)):
        raise UserError(f"{type(causal_model).__name__} has no separate base model")
    trunk.config = config
    setattr(model, model.base_model_prefix, trunk)
    model.score = nn.Linear(
        model.score.in_features, model.score.out_features, bias=model.score.bias is not None
    )
    nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))
    return model


def transformers_has_classifier(config: Any, *, per_token: bool) -> bool:
    """Return whether Transformers has a classifier for the family of a configuration.

    If ``per_token`` is set, this is a token classifier, else a sequence classifier.
    """
    return type(config) in _auto_classifier_class(per_token)._model_mapping


def _auto_classifier_class(per_token: bool) -> Any:
    return AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification


@functools.cache
def _generic_classifier_class(config_class: Any, per_token: bool) -> Any:
    """Return the class that combines a decoder family with a generic head.

    The result is None if Transformers has no causal language model of this configuration class, or
    no base class of its family.
    """
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING or config_class not in MODEL_MAPPING:
        return None
    family = _family_base_class(MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
    if family is None:
        return None
    suffix = "ForTokenClassification" if per_token else "ForSequenceClassification"
    attributes = {
        "config_class": config_class,
        "base_model_prefix": family.base_model_prefix,
        # Transformers uses the module of a class to initialize buffers and to select
        # implementations of attention and experts.
        "__module__": family.__module__,
    }
    name = family.__name__.removesuffix("PreTrainedModel") + suffix
    return type(
        name, (EveryTokenClassifier if per_token else LastTokenClassifier, family), attributes
    )


def _family_base_class(causal_class: Any) -> type[PreTrainedModel] | None:
    """Return the base class that all models of a family share, or None if there is none."""
    names = (base for base in causal_class.__mro__ if base.__name__.endswith("PreTrainedModel"))
    family = next(names, PreTrainedModel)
    return None if family is PreTrainedModel else family
