"""Select the fastest decoder whose logits equal those of the model's plain forward pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.models.architecture import (
    has_recurrent_states,
    original_rotary_contexts,
    smallest_attention_window,
    text_config,
    trunk_of,
    unwrap_peft,
    usable_context_length,
)
from rlhf.models.comparison import (
    FORWARD_ERRORS,
    HALF_TOLERANCE,
    evaluation_mode,
    is_float32_or_wider,
)
from rlhf.models.output_head import logits_of
from rlhf.rollout.sampling.protocols import Decoder, forward_new_tokens

log = logging.getLogger(__name__)

# Largest attention window or original rotary context in tokens for which the compared rows are
# longer than it.
MAX_TESTED_WINDOW = 64

# Largest relative difference of logits in float32 that is attributed to rounding.
TOLERANCE = 1e-4
# The same limit for models with recurrent layers, which accumulate rounding errors.
STATE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DecoderOption:
    """A decoder that can be selected for a model.

    Args:
        description: Text for the log that follows the words "replies are sampled".
        make: Function that makes the decoder.
        safer_index: Index of a slower option, or None. The two options are compared if the
            difference of this option exceeds ``TOLERANCE``, or if the model has half precision. The
            slower option is selected if its difference is smaller by a factor of more than 1.25.
    """

    description: str
    make: Callable[[], Decoder]
    safer_index: int | None = None


# Exceptions of decoders that do not support a model.
UNSUPPORTED_ERRORS = (*FORWARD_ERRORS, KeyError, NotImplementedError, StopIteration)


def select_decoder_index(model: Any, options: Sequence[DecoderOption]) -> int:
    """Return the index of the first option whose logits equal those of the model's forward pass.

    Args:
        model: Causal model.
        options: Decoders in order of decreasing speed. If no other decoder agrees with the forward
            pass, the last one is selected without a comparison.
    """
    trunk = trunk_of(model)
    precise = is_float32_or_wider(model)
    tolerance = STATE_TOLERANCE if has_recurrent_states(text_config(trunk)) else TOLERANCE
    tolerance = tolerance if precise else HALF_TOLERANCE
    with evaluation_mode(trunk):  # with dropout, two passes would differ
        for index, option in enumerate(options[:-1]):
            gap = _option_logit_difference(model, option)
            if gap > tolerance:
                continue
            if option.safer_index is None or (gap <= TOLERANCE and precise):
                return index
            return (
                index
                if gap <= 1.25 * _option_logit_difference(model, options[option.safer_index])
                else option.safer_index
            )
    return len(options) - 1


def _option_logit_difference(model: Any, option: DecoderOption) -> float:
    """Return `decoder_logit_difference` of an option, or infinity for an unsupported model."""
    try:
        gap = decoder_logit_difference(model, option.make())
    except UNSUPPORTED_ERRORS as error:
        log.debug("%s: not %s: %s", type(unwrap_peft(model)).__name__, option.description, error)
        return math.inf
    return math.inf if math.isnan(gap) else gap


@torch.no_grad()
def decoder_logit_difference(model: Any, decoder: Decoder) -> float:
    """Return the largest relative difference of logits between a decoder and forward passes.

    The relative difference at a position is the mean absolute difference of the logits, divided by
    the mean absolute logit. The decoder processes two rows of different lengths: first the tokens
    of two turns, then single tokens. The order of the rows changes between forward passes.
    """
    config = text_config(unwrap_peft(model))
    # The computation of a token can change after these numbers of tokens.
    changes = [smallest_attention_window(config) or 0, *original_rotary_contexts(config)]
    longest = min(MAX_TESTED_WINDOW, usable_context_length(config) - 10)
    first = 5 + max((length for length in changes if length <= longest), default=0)
    turns = [([0, 1], [first, 3]), ([1, 0], [2, 4]), ([0, 1], [1, 1]), ([1], [1])]
    if first + 5 > usable_context_length(config):
        turns = [([0, 1], [2, 1]), ([1, 0], [1, 1])]
    # The tokens of the two rows differ, so that interchanged rows are detected.
    texts = [(torch.arange(first + 5) * step + step) % config.vocab_size for step in (7, 11)]
    texts = [text.to(model.device) for text in texts]
    plain = [
        logits_of(model, trunk_of(model)(input_ids=text[None], use_cache=False).last_hidden_state)
        for text in texts
    ]
    cache = decoder.new_cache(2)
    cache.ensure_capacity(first + 5)
    done, gaps = [0, 0], []
    for rows, counts in turns:
        parts = [
            texts[row][done[row] : done[row] + n].tolist()
            for row, n in zip(rows, counts, strict=True)
        ]
        logits = forward_new_tokens(decoder, cache, np.array(rows), parts, model.device)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            done[row] += count
            expected = plain[row][0, done[row] - 1].double()
            gap = (logits[index].double() - expected).abs().mean()
            gaps.append(float(gap / expected.abs().mean()))
    return float(np.max(gaps))
