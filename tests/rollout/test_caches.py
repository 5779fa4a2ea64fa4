"""Families whose layers slide, chunk or carry states: sampled and scored as by plain passes.

The oracle is the model's own forward pass over one row at a time, without cache or padding.
"""

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models.architecture import UNLIMITED_CONTEXT, context_length_of, usable_context_length
from rlhf.models.fast.packing import enable_packing
from rlhf.models.policy import Policy
from rlhf.rollout.sampling.base import Completion
from rlhf.rollout.sampling.decoder import (
    FusedDecoder,
    PaddedBatchDecoder,
    make_fastest_matching_decoder,
)
from rlhf.rollout.sampling.kv_cache import RaggedCache
from tests.helpers.models import recomputed_logprobs
from tests.helpers.rollouts import TurnSampler
from tests.rollout.families import LENGTHS, RECURRENT, SIZES, SLIDING, tiny_family

FAMILIES = [*SLIDING, *RECURRENT]


def episodes_of(seed: int, count: int = 7) -> list[list[tuple[list[int], int, int]]]:
    """Turns of new tokens, seed and limit, longer than a window of 8 in most; some begin alike."""
    random, seeds = np.random.default_rng(seed), itertools.count(100 * seed)
    episodes = [
        [
            (
                random.integers(3, 97, size=random.integers(1, 14)).tolist(),
                next(seeds),
                int(length),
            )
            for length in random.integers(1, 7, size=random.integers(2, 4))
        ]
        for _ in range(count)
    ]
    episodes[1][0] = (episodes[0][0][0], *episodes[1][0][1:])  # the group's prompt is read once
    return episodes


def sampled(model: Any, episodes: Any, *, rows: int, **settings: Any) -> list[list[Completion]]:
    """Replies to every turn; a row that is free takes the next episode."""
    sampler = TurnSampler(model, rows=rows, **{"stop_ids": frozenset(range(12)), **settings})
    heard: list[list[Completion]] = [[] for _ in episodes]
    queue, active = list(range(len(episodes))), 0
    while queue or active:
        while queue and active < rows:
            name, active = queue.pop(0), active + 1
            sampler.submit(name, *episodes[name][0])
        for name, reply in sampler.step().items():
            heard[name].append(reply)
            if len(heard[name]) < len(episodes[name]):
                sampler.submit(name, *episodes[name][len(heard[name])])
            else:
                sampler.release(name)
                active -= 1
    return heard


def whole(turns: Any, replies: list[Completion]) -> tuple[list[int], dict[int, float]]:
    """An episode's tokens, and the sampler's log-probabilities by position."""
    tokens: list[int] = []
    found: dict[int, float] = {}
    for (new, *_), reply in zip(turns, replies, strict=True):
        tokens += new
        found |= dict(enumerate(reply.logprobs, len(tokens)))
        tokens += reply.tokens
    return tokens, found


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_logprobs_are_those_of_a_plain_pass(name):
    model = tiny_family(name)
    episodes = episodes_of(seed=0)
    lengths = []
    for turns, replies in zip(episodes, sampled(model, episodes, rows=3), strict=True):
        tokens, found = whole(turns, replies)
        expected = recomputed_logprobs(model, tokens)
        lengths.append(len(tokens))
        for position, logprob in found.items():
            assert abs(expected[position].item() - logprob) < 1e-5, (name, position)
    assert max(lengths) > 24  # three windows


@pytest.mark.parametrize("name", FAMILIES)
def test_reply_does_not_depend_on_other_rows(name):
    model, episodes = tiny_family(name), episodes_of(seed=1, count=5)
    together = sampled(model, episodes, rows=4)
    alone = sampled(model, episodes, rows=1)
    for a, b in zip(together, alone, strict=True):
        assert [reply.tokens for reply in a] == [reply.tokens for reply in b]
        for left, right in zip(a, b, strict=True):
            tolerance = 1e-5 * np.abs(right.logprobs).max()
            np.testing.assert_allclose(left.logprobs, right.logprobs, atol=tolerance)


def _forget_lengths(model: Any) -> None:
    """What transformers does before a row that is as long as the original context, or longer."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq.clone(), 16


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *LENGTHS])
def test_scores_and_gradients_are_those_of_one_row_at_a_time(name, tie):
    model = tiny_family(name, tie_word_embeddings=tie)
    random = torch.Generator().manual_seed(2)
    lengths = [21, 5, 13, 21]
    tokens = torch.randint(3, 97, (4, 21), generator=random)
    tokens[3, :12] = tokens[0, :12]
    mask = torch.arange(21) < torch.tensor(lengths)[:, None]
    actions = mask & (torch.rand(4, 21, generator=random) < 0.6)
    actions[:, 0] = False
    weights = torch.randn(4, 21, generator=random)

    loss = torch.zeros(())
    for row, length in enumerate(lengths):
        _forget_lengths(model)
        logits = model(input_ids=tokens[row : row + 1, :length]).logits[0].log_softmax(-1)
        for position in actions[row].nonzero()[:, 0].tolist():
            chosen = logits[position - 1, tokens[row, position]]
            loss = loss + weights[row, position] * chosen
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain = loss.item()
    model.zero_grad()

    policy = Policy(model, tokenizer=None)
    scored = policy.score(tokens, mask, actions, with_entropy=False)
    ours = torch.where(actions, scored.logprobs * weights, 0.0).sum()
    assert abs(ours.item() - plain) < 1e-4
    ours.backward()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for n, parameter in model.named_parameters():
        if n in expected:
            assert parameter.grad is not None, n
            assert (parameter.grad - expected[n]).abs().max() < 1e-5 * largest, n


@pytest.mark.parametrize("name", FAMILIES)
def test_the_context_does_not_end_at_a_window(name):
    assert context_length_of(tiny_family(name)) == 128


def test_family_without_positions_has_unbounded_context():
    config = tiny_family("mamba2").config
    del config.max_position_embeddings
    assert usable_context_length(config) == UNLIMITED_CONTEXT


def test_rows_of_different_rotary_frequencies_are_separate():
    # Rows of at most 16 tokens have the short factors, rows that begin longer the long ones.
    model, random = tiny_family("longrope"), np.random.default_rng(3)
    episodes = []
    for first, limits in ((4, (3, 5)), (19, (6, 4)), (9, (4,)), (30, (5, 5)), (17, (2, 3))):
        lengths = [first, *[2] * (len(limits) - 1)]
        episodes.append(
            [
                (random.integers(3, 97, size=length).tolist(), int(random.integers(2**30)), limit)
                for length, limit in zip(lengths, limits, strict=True)
            ]
        )
    sides = set()
    heard = sampled(model, episodes, rows=4, stop_ids=frozenset({-1}))
    for turns, replies in zip(episodes, heard, strict=True):
        tokens, found = whole(turns, replies)
        sides.add(len(tokens) > 16)
        expected = recomputed_logprobs(model, tokens)
        for position, logprob in found.items():
            assert abs(expected[position].item() - logprob) < 1e-5
    assert sides == {True, False}
    assert context_length_of(model) == 16


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_windows_do_not_keep_a_model_from_joined_products(name):
    assert isinstance(make_fastest_matching_decoder(tiny_family(name)), FusedDecoder)


def words_of(caplog: Any, model: Any) -> str:
    with caplog.at_level(logging.INFO, logger="rlhf"):
        make_fastest_matching_decoder(model)
        make_fastest_matching_decoder(model)
    lines = [record.message for record in caplog.records if "sampled" in record.message]
    assert len(lines) <= 1  # said once
    return "".join(lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3", ""),
        ("lfm2", ""),
        ("jamba", "token by token"),
        ("gpt_neo", "one row at a time with the model's own cache"),
    ],
)
def test_log_names_slower_decoder(caplog, name, words):
    said = words_of(caplog, tiny_family(name))
    assert (words in said) if words else not said


@pytest.mark.parametrize("name", ["jamba", "mamba"])
def test_bf16_decoder_selection_keeps_states(name):
    # In half precision the trial's bar is wide; a way that drops states must not pass under it.
    decoder = make_fastest_matching_decoder(tiny_family(name).bfloat16())
    assert isinstance(decoder, PaddedBatchDecoder)
    assert decoder.stepwise


class Miscounting(LlamaForCausalLM):
    """Says it is a Llama, and scores a token by the number of columns of its cache."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inner = self.model.forward

        def forward(*args: Any, past_key_values: Any = None, **given: Any) -> Any:
            output = inner(*args, past_key_values=past_key_values, **given)
            if isinstance(past_key_values, RaggedCache):
                output.last_hidden_state += past_key_values.get_seq_length()
            return output

        self.model.forward = forward


def test_model_incompatible_with_ragged_cache_decodes_one_row_at_a_time(caplog):
    config = LlamaConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    config.model_type = "another"
    model = Miscounting(config).eval()
    assert "one row at a time" in words_of(caplog, model)
    episodes = episodes_of(seed=4, count=3)
    for turns, replies in zip(episodes, sampled(model, episodes, rows=2), strict=True):
        tokens, found = whole(turns, replies)
        expected = recomputed_logprobs(model, tokens)
        for position, logprob in found.items():
            assert abs(expected[position].item() - logprob) < 1e-5


def test_models_with_states_are_not_packed():
    # A state would run on from one document into the next.
    for name in RECURRENT:
        assert not enable_packing(tiny_family(name))


@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_results_are_bit_reproducible(name):
    model, episodes = tiny_family(name), episodes_of(seed=5, count=3)
    first, second = (
        [[(r.tokens, r.logprobs) for r in replies] for replies in sampled(model, episodes, rows=2)]
        for _ in range(2)
    )
    assert first == second


def test_greedy_decoding_beyond_a_window_is_that_of_transformers():
    model = tiny_family("gemma3")
    prompts = {0: [7, 30, 9], 1: list(range(20, 40)), 2: [12, 13, 14, 15, 16, 90]}
    episodes = [[(prompt, 0, 20)] for prompt in prompts.values()]
    heard = sampled(model, episodes, rows=3, temperature=0, stop_ids=frozenset({-1}))
    for prompt, (reply,) in zip(prompts.values(), heard, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert reply.tokens == expected[0, len(prompt) :].tolist()
