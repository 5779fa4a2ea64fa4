"""Classification heads for decoder families that Transformers has none for.

Transformers' own generic head, a linear layer read at the last token, is put on the family's trunk,
under the name that such a class would have. A checkpoint saved from it is an ordinary folder that
this module opens again; beside its weights lies the sidecar that says how it is read.
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


class LastTokenHead(GenericForSequenceClassification):
    """Scores of the last token that is not padding, for trunks of any form."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        """Logits [B, K] of texts [B, T] padded on the right or, where masked, on the left."""
        trunk = getattr(self, self.base_model_prefix)
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        states = trunk(input_ids, use_cache=False, **given).last_hidden_state
        config: Any = self.config  # type: ignore[attr-defined]
        unmasked = input_ids != config.get_text_config().pad_token_id
        real = unmasked if attention_mask is None else attention_mask.bool()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(real, places, 0).amax(1)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutput(logits=self.score(states[rows, last]))


class EveryTokenHead(GenericForTokenClassification):
    """Scores of every token, for trunks of any form."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> TokenClassifierOutput:
        """Logits [B, T, K] of texts [B, T]."""
        trunk = getattr(self, self.base_model_prefix)
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        states = trunk(input_ids, use_cache=False, **given).last_hidden_state
        return TokenClassifierOutput(logits=self.score(self.dropout(states)))


def sequence_classifier(place: str | Path) -> Any:
    """The class whose ``from_pretrained`` reads the model at ``place`` with a head on whole texts.

    Transformers' automatic class where the family has a classifier of its own.

    Args:
        place: folder or hub id.

    Raises:
        OSError, ValueError: as transformers, where there is no configuration.
    """
    return _class_for(place, AutoModelForSequenceClassification, LastTokenHead)


def token_classifier(place: str | Path) -> Any:
    """As ``sequence_classifier``, with a head on every token."""
    return _class_for(place, AutoModelForTokenClassification, EveryTokenHead)


def with_head(causal: Any, labels: Mapping[str, Any], *, steps: bool) -> Any:
    """A language model's trunk under a fresh generic head.

    The trunk itself is taken over: buffers that are not saved stay as its family computes them.

    Args:
        causal: the language model, which is used up.
        labels: ``num_labels``, ``id2label`` and ``label2id`` of the configuration.
        steps: with a head on every token.

    Raises:
        UserError: the family can carry no head.
    """
    kind = _generic_class(type(causal.config), EveryTokenHead if steps else LastTokenHead)
    if kind is None:
        raise UserError(f"{type(causal).__name__} has no trunk that a head can be put on")
    config = copy.deepcopy(causal.config)
    for key, value in labels.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = kind(config)
    trunk = causal.base_model
    if type(trunk) is not type(getattr(model, model.base_model_prefix)):
        raise UserError(f"{type(causal).__name__} has no trunk of its own")
    trunk.config = config
    setattr(model, model.base_model_prefix, trunk)
    model.score = nn.Linear(
        model.score.in_features, model.score.out_features, bias=model.score.bias is not None
    )
    nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))
    return model


def has_own_classifier(config: Any, *, steps: bool) -> bool:
    """Whether Transformers has a classifier of a configuration's family."""
    automatic: Any = (
        AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    )
    return type(config) in automatic._model_mapping


def _class_for(place: str | Path, automatic: Any, generic: Any) -> Any:
    kind = type(AutoConfig.from_pretrained(place))
    if kind in automatic._model_mapping:
        return automatic
    return _generic_class(kind, generic) or automatic  # which says that it does not know the family


@functools.cache
def _generic_class(kind: Any, generic: Any) -> Any:
    """The generic head on the trunk of a configuration's family; None where that is no decoder."""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_MAPPING:
        return None
    family = _family_of(MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    if family is None:
        return None
    suffix = "ForTokenClassification" if generic is EveryTokenHead else "ForSequenceClassification"
    attributes = {
        "config_class": kind,
        "base_model_prefix": family.base_model_prefix,
        # Transformers initialises buffers, and chooses implementations of attention and experts, by
        # the module that a class was written in.
        "__module__": family.__module__,
    }
    name = family.__name__.removesuffix("PreTrainedModel") + suffix
    return type(name, (generic, family), attributes)


def _family_of(causal: Any) -> Any:
    """The class that a family's models share; None where it has none."""
    shared = (
        each
        for each in causal.__mro__
        if issubclass(each, PreTrainedModel)
        and each is not PreTrainedModel
        and each.__name__.endswith("PreTrainedModel")
    )
    return next(shared, None)
