"""Which way of decoding computes what a model computes: each is tried on the model itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.models.architecture import (
    has_states,
    text_config,
    trunk_of,
    unwrap_peft,
    usable_context,
    window_of,
)
from rlhf.models.output_head import logits_of
from rlhf.rollout.sampling.protocols import Decoder, read

log = logging.getLogger(__name__)

# Windows up to this size are passed in the trial.
SHORT_WINDOW = 64

# Largest gap of a right way, and in half precision, where rounding hides smaller ones.
BAR, HALF_BAR = 1e-4, 0.1
# Recurrences sum up decays over long chunks, and round more when they are cut otherwise.
STATE_BAR = 1e-3


@dataclass(frozen=True)
class Way:
    """A way of decoding.

    Args:
        words: what the log says of it, after "replies are sampled".
        make: makes the decoder.
        safer: index of a slower way that is preferred where rounding cannot tell the two apart.
    """

    words: str
    make: Callable[[], Decoder]
    safer: int | None = None


# What a way of decoding that does not suit a model may raise.
MISFITS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def first_right(model: Any, ways: Sequence[Way]) -> int:
    """Index of the first way whose logits are those of plain passes.

    Args:
        model: a causal model.
        ways: quickest first; the last one is not tried.
    """
    trunk = trunk_of(model)
    half = model.dtype not in (torch.float32, torch.float64)
    bar = HALF_BAR if half else STATE_BAR if has_states(text_config(trunk)) else BAR
    training = trunk.training
    trunk.eval()  # dropout would differ from pass to pass
    try:
        for index, way in enumerate(ways[:-1]):
            gap = _tried(model, way)
            if gap > bar:
                continue
            if way.safer is None or (gap <= BAR and not half):
                return index
            return index if gap <= 1.25 * _tried(model, ways[way.safer]) else way.safer
        return len(ways) - 1
    finally:
        trunk.train(training)


def _tried(model: Any, way: Way) -> float:
    """``decoding_gap`` of a way; infinite where it cannot be used."""
    try:
        gap = decoding_gap(model, way.make())
    except MISFITS as error:
        log.debug("%s: not %s: %s", type(unwrap_peft(model)).__name__, way.words, error)
        return math.inf
    return math.inf if math.isnan(gap) else gap


@torch.no_grad()
def decoding_gap(model: Any, decoder: Decoder) -> float:
    """Mean difference of logits between a decoder and plain passes over one row at a time.

    Relative to the mean size of the logits. Two rows of different lengths take a first turn, a
    second one and a single token each, in changing order and company.
    """
    config = text_config(unwrap_peft(model))
    window = window_of(config) or 0
    first = window + 5 if window <= SHORT_WINDOW else 5
    turns = [([0, 1], [first, 3]), ([1, 0], [2, 4]), ([0, 1], [1, 1]), ([1], [1])]
    if first + 5 > usable_context(config):
        turns = [([0, 1], [2, 1]), ([1, 0], [1, 1])]
    # Not multiples of one number: equal tokens in both rows would hide a mix-up of rows.
    texts = [(torch.arange(first + 5) * step + step) % config.vocab_size for step in (7, 11)]
    texts = [text.to(model.device) for text in texts]
    plain = [
        logits_of(model, trunk_of(model)(input_ids=text[None], use_cache=False).last_hidden_state)
        for text in texts
    ]
    cache = decoder.new_cache(2)
    cache.reserve(first + 5)
    done, gaps = [0, 0], []
    for rows, counts in turns:
        parts = [
            texts[row][done[row] : done[row] + n].tolist()
            for row, n in zip(rows, counts, strict=True)
        ]
        logits = read(decoder, cache, np.array(rows), parts, model.device)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            done[row] += count
            expected = plain[row][0, done[row] - 1].double()
            gap = (logits[place].double() - expected).abs().mean()
            gaps.append(float(gap / expected.abs().mean()))
    return float(np.max(gaps))
