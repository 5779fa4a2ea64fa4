"""Verify the sampler's log-probabilities against forward passes over whole episodes.

A model is verified once, before the first rollout. Two episodes with two turns and different
lengths are sampled in one batch. The first is longer than the attention windows of the model if
this does not take too long. The sampler's log-probabilities are compared with those of one forward
pass over each whole episode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf.errors import UserError
from rlhf.models.architecture import (
    computation_change_lengths,
    text_config,
    trunk_of,
    unwrap_peft,
    usable_context_length,
)
from rlhf.models.comparison import evaluation_mode, is_float32_or_wider, tolerance_of
from rlhf.models.fast.packing import reset_dynamic_rotary_frequencies
from rlhf.models.fast.verification import max_comparison_tokens
from rlhf.models.reduced_model import small_random_model_like
from rlhf.rollout.sampling.base import Request, SamplingParams
from rlhf.rollout.sampling.continuous import Sampler
from rlhf.rollout.sampling.decoder import force_decoder_without_cache

log = logging.getLogger(__name__)

# Maximum number of tokens of a sampled reply.
REPLY_TOKENS = 3


def check_sampler_or_disable_cache(model: Any) -> None:
    """Verify the sampler once per model. If the verification fails, sample without a cache.

    Args:
        model: Causal model with the weights and adapters with which it will sample.

    Raises:
        UserError: The log-probabilities also differ without a cache.
    """
    trunk = trunk_of(model)
    if getattr(trunk, "sampling_checked", False):
        return
    affordable = max_comparison_tokens(model)
    longest = max(computation_change_lengths(text_config(trunk)), default=0)
    if longest + 24 > affordable or not is_float32_or_wider(model):
        small = small_random_model_like(model)
        if small is not None and not _sampler_agrees_with_forward_pass(
            small, max_episode_tokens=max(affordable, 64)
        ):
            force_decoder_without_cache(model)
    if not _sampler_agrees_with_forward_pass(model, max_episode_tokens=affordable):
        force_decoder_without_cache(model)
        gap = sampler_logprob_difference(model, max_episode_tokens=affordable)
        if not gap <= tolerance_of(model):
            raise UserError(
                f"{type(unwrap_peft(model)).__name__} is not supported: the log-probabilities of "
                f"sampled tokens differ from those of a forward pass over the row by {gap:.1e}"
            )
    trunk.sampling_checked = True


def _sampler_agrees_with_forward_pass(model: Any, *, max_episode_tokens: int) -> bool:
    """Return whether `sampler_logprob_difference` is within the tolerance. If not, log it."""
    gap = sampler_logprob_difference(model, max_episode_tokens=max_episode_tokens)
    if not gap <= tolerance_of(model):
        log.info(
            "%s is sampled without a cache, which is slower, because the sampler's "
            "log-probabilities differ by %.1e",
            type(unwrap_peft(model)).__name__,
            gap,
        )
        return False
    return True


@torch.no_grad()
def sampler_logprob_difference(model: Any, *, max_episode_tokens: int) -> float:
    """Return the difference between log-probabilities of the sampler and of forward passes.

    In float32, the result is the largest absolute difference. In half precision, it is the upper
    quartile of the absolute differences, because rounding can change single log-probabilities by
    several nats. If the mean absolute log-probability exceeds 1 nat, the result is divided by it.

    Args:
        model: Causal model.
        max_episode_tokens: Maximum length of an episode, in tokens.
    """
    turns = _make_test_turns(text_config(trunk_of(model)), max_episode_tokens=max_episode_tokens)
    with evaluation_mode(unwrap_peft(model)):
        episodes = _sample_turns_with_logprobs(model, turns)
        sampled, expected = [], []
        for tokens, logprobs in episodes:
            ids = torch.tensor([tokens], device=model.device)
            reset_dynamic_rotary_frequencies(unwrap_peft(model))
            logits = unwrap_peft(model)(input_ids=ids, use_cache=False).logits[0]
            full = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            for position, logprob in logprobs.items():
                sampled.append(logprob)
                expected.append(float(full[position - 1, tokens[position]]))
    gaps = np.abs(np.array(sampled) - np.array(expected))
    size = max(1.0, float(np.abs(expected).mean()))
    return float(gaps.max() if is_float32_or_wider(model) else np.quantile(gaps, 0.75)) / size


def _make_test_turns(config: Any, *, max_episode_tokens: int) -> list[list[list[int]]]:
    """Return the new tokens of each of two turns, for each of two episodes.

    The first episode is longer than every attention window that fits in ``max_episode_tokens``
    tokens.
    """
    limits = [
        n
        for n in computation_change_lengths(config)
        if n + 24 <= min(max_episode_tokens, usable_context_length(config))
    ]
    whole = min(max_episode_tokens, usable_context_length(config), max(limits, default=0) + 24)
    room = max(2, whole - 2 * REPLY_TOKENS)
    lengths = [(room - room // 4, room // 4), (max(1, room // 5), max(1, room // 2))]
    random = np.random.default_rng(0)
    return [
        [random.integers(config.vocab_size, size=max(1, n)).tolist() for n in counts]
        for counts in lengths
    ]


def _sample_turns_with_logprobs(
    model: Any, turns: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[list[int], dict[int, float]]]:
    """Sample all turns.

    Returns:
        For each episode, the tokens, and position -> log-probability of the sampled tokens.
    """
    sampling = SamplingParams()
    sampler = Sampler(model, rows=len(turns))
    episodes: list[tuple[list[int], dict[int, float]]] = [([], {}) for _ in turns]
    turns_done = [0] * len(turns)

    def submit_next_turn(index: int) -> None:
        tokens, turn = episodes[index][0], turns_done[index]
        tokens.extend(turns[index][turn])
        # With replies of different lengths, the second turns begin at different steps.
        limit = REPLY_TOKENS - index % 2
        sampler.start_request(Request(index, list(tokens), limit, (1, index, turn), sampling))

    for index in range(len(turns)):
        submit_next_turn(index)
    while sampler.requests:
        for completion in sampler.step():
            index = completion.request.episode_id
            tokens, logprobs = episodes[index]
            logprobs.update(enumerate(completion.logprobs, len(tokens)))
            tokens.extend(completion.tokens)
            turns_done[index] += 1
            if turns_done[index] < len(turns[index]):
                submit_next_turn(index)
            else:
                sampler.release(index)
    return episodes
