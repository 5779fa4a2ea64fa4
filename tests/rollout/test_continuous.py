"""Decoding with the ragged cache against plain forward passes, in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.config.model import LoraSpec
from rlhf.models.adapters import add_lora
from rlhf.rollout.sampling.base import Completion, FinishReason, SamplingParams
from rlhf.rollout.sampling.draw import sample_tokens_and_logprobs
from tests.helpers.models import recomputed_logprobs, tiny_gpt2, tiny_model, tiny_qwen2
from tests.helpers.rollouts import TurnSampler, record_pass_lengths

MAKERS = [tiny_model, tiny_gpt2, tiny_qwen2]


# The seed and the largest number of tokens of a completion.
Limit = tuple[int, int]


def sampler_for(model: Any, rows: int, **settings: Any) -> TurnSampler:
    return TurnSampler(model, rows=rows, **{"stop_ids": frozenset({1}), **settings})


def reply_to(
    sampler: TurnSampler,
    new_tokens: dict[int, list[int]],
    limits: Mapping[int, Limit],
    *,
    release: bool = False,
) -> dict[int, Completion]:
    """One reply for each named row."""
    for name, ids in new_tokens.items():
        sampler.submit(name, ids, *limits[name])
    replies: dict[int, Completion] = {}
    while len(replies) < len(new_tokens):
        for name, reply in sampler.step().items():
            replies[name] = reply
            if release:
                sampler.release(name)
    return replies


def limit(seed: int, row: int, turn: int, count: int) -> Limit:
    return 10_000 * seed + 100 * row + turn, count


def play(model: Any, *, seed: int, rows: int, turns: int, **settings: Any) -> list[dict[str, Any]]:
    """Rows that take part in random turns, with new tokens of random number each time."""
    draw = np.random.default_rng(seed)
    sampler = sampler_for(model, rows, **settings)
    episodes: list[dict[str, Any]] = [{"tokens": [], "logprobs": {}} for _ in range(rows)]
    for turn in range(turns):
        active = [row for row in range(rows) if turn == 0 or draw.random() < 0.6] or [0]
        draw.shuffle(active)
        new = {row: draw.integers(5, 300, size=draw.integers(1, 6)).tolist() for row in active}
        limits = {row: limit(seed, row, turn, int(draw.integers(1, 6))) for row in active}
        for row, reply in reply_to(sampler, new, limits).items():
            episode = episodes[row]
            episode["tokens"] += new[row]
            start = len(episode["tokens"])
            episode["tokens"] += reply.tokens
            episode["logprobs"] |= dict(enumerate(reply.logprobs, start))
            assert len(reply.tokens) <= limits[row][1]
            stopped = reply.tokens[-1] in sampler.sampling.stop_ids
            assert (reply.finish_reason == FinishReason.STOP) == stopped
    return episodes


def largest_gap(model: Any, episodes: list[dict[str, Any]], temperature: float = 1.0) -> float:
    gaps = []
    for episode in episodes:
        full = recomputed_logprobs(model, episode["tokens"], temperature)
        gaps += [abs(full[t].item() - logprob) for t, logprob in episode["logprobs"].items()]
    assert len(gaps) > 20
    return max(gaps)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("seed", range(3))
def test_sampled_logprobs_are_those_of_a_plain_pass(make, seed):
    # Stop ids: rows leave at different steps. The cache grows several times.
    model, _ = make(double=True)
    episodes = play(model, seed=seed, rows=5, turns=7, stop_ids=frozenset(range(40)))
    assert largest_gap(model, episodes) < 1e-9


def test_sampled_logprobs_in_float32_and_at_a_temperature():
    model, _ = tiny_model()
    assert largest_gap(model, play(model, seed=0, rows=4, turns=5)) < 1e-4
    model = model.double()
    episodes = play(model, seed=0, rows=4, turns=5, temperature=0.6)
    assert largest_gap(model, episodes, temperature=0.6) < 1e-4


def test_eager_attention_decodes_alike():
    model, _ = tiny_model(double=True)
    model.set_attn_implementation("eager")
    episodes = play(model, seed=1, rows=4, turns=5)
    assert largest_gap(model, episodes) < 1e-5  # its softmax is float32 in any model


def test_decoding_applies_adapters():
    model = add_lora(tiny_model(double=True)[0], LoraSpec(rank=2), seed=0).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    assert largest_gap(model, play(model, seed=0, rows=3, turns=4)) < 1e-9


@pytest.mark.parametrize("make", MAKERS)
def test_greedy_decoding_is_that_of_transformers(make):
    model, _ = make(double=True)
    prompts = {0: [7, 30, 9], 1: [200, 6], 2: [12, 13, 14, 15, 16, 99]}
    limits = dict.fromkeys(prompts, (0, 20))
    replies = reply_to(sampler_for(model, 3, temperature=0), prompts, limits)
    for row, prompt in prompts.items():
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert replies[row].tokens == expected[0, len(prompt) :].tolist()


def test_greedy_logprobs_are_of_the_untempered_policy():
    model, _ = tiny_model(double=True)
    reply = reply_to(sampler_for(model, 1, temperature=0), {0: [7, 8]}, {0: (0, 3)})[0]
    full = recomputed_logprobs(model, [7, 8, *reply.tokens])
    np.testing.assert_allclose(reply.logprobs, full[2:].numpy(), atol=1e-12)


def test_row_does_not_depend_on_other_rows():
    model, _ = tiny_model(double=True)
    prompts = {0: [7, 30, 9], 1: [200, 6], 2: [12] * 11, 3: [5]}
    limits = {row: limit(3, row, 0, 6 + row) for row in prompts}
    together = reply_to(sampler_for(model, 4, stop_ids=frozenset(range(100))), prompts, limits)
    for row in prompts:
        sampler = sampler_for(model, 4, stop_ids=frozenset(range(100)))
        alone = reply_to(sampler, {row: prompts[row]}, {row: limits[row]})[row]
        assert alone.tokens == together[row].tokens
        np.testing.assert_allclose(alone.logprobs, together[row].logprobs, atol=1e-12)


class Fixed:
    """Stands for a model whose next-token distribution is known."""

    def __init__(self, probabilities: list[float]) -> None:
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log()

    def choose(self, numbers: list[float], temperature: float = 1.0) -> tuple[list, list]:
        logits = self.logits.expand(len(numbers), -1)
        numbers_ = torch.tensor(numbers, dtype=torch.float64)
        tokens, logprobs = sample_tokens_and_logprobs(
            logits, numbers_, SamplingParams(temperature=temperature)
        )
        return tokens.tolist(), logprobs.tolist()


def test_draw_selects_interval_of_number():
    # Cumulative: [0, .2) -> 0, [.2, .2) -> none, [.2, .7) -> 2, [.7, 1) -> 3, and 4 never.
    known = Fixed([0.2, 0.0, 0.5, 0.3, 0.0])
    eps = 1e-9
    numbers = [0.0, 0.2 - eps, 0.2 + eps, 0.7 - eps, 0.7 + eps, 1.0 - eps, 1 - 2**-53]
    tokens, logprobs = known.choose(numbers)
    assert tokens == [0, 0, 2, 2, 3, 3, 3]
    np.testing.assert_allclose(np.exp(logprobs), [0.2, 0.2, 0.5, 0.5, 0.3, 0.3, 0.3], rtol=1e-12)


def test_draw_shares_equal_tempered_probabilities():
    # A grid of numbers measures each interval to 1/n; p^(1/T) / sum at T = 1/2: .04 .25 .09 / .38.
    n = 2000
    tokens, _ = Fixed([0.2, 0.5, 0.3]).choose([(i + 0.5) / n for i in range(n)], temperature=0.5)
    shares = np.bincount(tokens, minlength=3) / n
    np.testing.assert_allclose(shares, np.array([0.04, 0.25, 0.09]) / 0.38, atol=1 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_near_one_never_selects_impossible_token(dtype):
    known = Fixed([0.1, 0.6, 0.3, 0.0, 0.0])
    known.logits = known.logits.to(dtype)
    tokens, _ = known.choose([1 - 2**-53, 1 - 2**-25, 1 - 2**-24])
    assert tokens == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [255, 256, 257, 1000])
def test_draws_of_a_large_vocabulary_fall_into_their_intervals(dtype, vocabulary):
    # Most tokens impossible, whole blocks too: the draw must name the token of its interval.
    random = np.random.default_rng(vocabulary)
    shares = np.zeros(vocabulary)
    likely = np.sort(random.choice(vocabulary, size=9, replace=False))
    shares[likely] = random.random(9) + 0.1
    shares /= shares.sum()
    numbers = np.concatenate([random.random(500), [0.0, 1 - 2**-53]])
    logits = torch.tensor(shares).log().to(dtype).expand(len(numbers), -1)
    tokens, logprobs = sample_tokens_and_logprobs(logits, torch.tensor(numbers), SamplingParams())
    ends = shares.cumsum()
    expected = likely[np.searchsorted(ends[likely], numbers, side="right").clip(max=8)]
    near = np.abs(numbers[:, None] - ends[likely]).min(1) < 1e-6  # rounding may decide these
    assert (tokens.numpy() == expected)[~near].all()
    assert np.isin(tokens.numpy(), likely).all()
    np.testing.assert_allclose(logprobs.exp().numpy(), shares[tokens.numpy()], rtol=1e-5)


def test_tokens_pass_through_the_model_once(monkeypatch):
    model, _ = tiny_model(double=True)
    passed = record_pass_lengths(monkeypatch, model)
    sampler = sampler_for(model, 1, stop_ids=frozenset({-1}))
    tokens = 0
    for number in range(10):
        new = list(range(5, 5 + (12 if number == 0 else 4)))
        reply = reply_to(sampler, {0: new}, {0: limit(0, 0, number, 8)})[0]
        tokens += len(new) + len(reply.tokens)
    assert tokens == 12 + 9 * 4 + 80
    assert sum(map(sum, passed)) == tokens - 1  # nobody reads the very last token
    # Each later turn first reads the last token of the reply before it.
    assert sampler.sampler.prefill_tokens == 12 + 9 * 4 + 9


def test_released_row_leaves_batch(monkeypatch):
    model, _ = tiny_model(double=True)
    passed = record_pass_lengths(monkeypatch, model)
    limits = {row: limit(0, row, 0, count) for row, count in enumerate((1, 4, 2))}
    prompts = {0: [5], 1: [6], 2: [7]}
    sampler = sampler_for(model, 3, stop_ids=frozenset({-1}))
    replies = reply_to(sampler, prompts, limits, release=True)
    assert [len(counts) for counts in passed] == [3, 2, 1, 1]
    assert [len(replies[row].tokens) for row in range(3)] == [1, 4, 2]
    assert {reply.finish_reason for reply in replies.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("seed", range(3))
def test_joining_and_leaving_rows_do_not_affect_others(make, seed):
    # Twenty episodes of up to four turns over five rows: each is what it would be alone.
    model, _ = make(double=True)
    random = np.random.default_rng(seed)
    plans = [
        [
            (
                random.integers(5, 300, size=random.integers(1, 7)).tolist(),
                int(random.integers(2**30)),
                int(length),
            )
            for length in random.integers(1, 6, size=random.integers(1, 5))
        ]
        for _ in range(20)
    ]
    plans[7] = plans[8] = plans[2]  # alike, at once or one after the other

    def replies(rows: int) -> list[list[Completion]]:
        sampler = sampler_for(model, rows, stop_ids=frozenset(range(60)))
        heard: list[list[Completion]] = [[] for _ in plans]
        queue, active = list(range(20)), 0
        while queue or active:
            while queue and active < rows:
                name, active = queue.pop(0), active + 1
                sampler.submit(name, *plans[name][0])
            for name, reply in sampler.step().items():
                heard[name].append(reply)
                if len(heard[name]) < len(plans[name]):
                    sampler.submit(name, *plans[name][len(heard[name])])
                else:
                    sampler.release(name)
                    active -= 1
        return heard

    for together, alone in zip(replies(5), replies(1), strict=True):
        assert [r.tokens for r in together] == [r.tokens for r in alone]
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-11)


def test_results_are_bit_reproducible():
    model, _ = tiny_model()
    episodes = [
        play(model, seed=4, rows=5, turns=6, stop_ids=frozenset(range(40))) for _ in range(2)
    ]
    assert episodes[0] == episodes[1]


def test_the_stop_token_is_part_of_the_reply():
    model, _ = tiny_model(double=True)
    free = reply_to(
        sampler_for(model, 1, stop_ids=frozenset({-1})), {0: [7, 8]}, {0: limit(2, 0, 0, 6)}
    )[0]
    stop = free.tokens[3]
    first = free.tokens.index(stop)
    cut = reply_to(
        sampler_for(model, 1, stop_ids=frozenset({stop})), {0: [7, 8]}, {0: limit(2, 0, 0, 6)}
    )[0]
    assert cut.tokens == free.tokens[: first + 1]
    assert cut.logprobs == free.logprobs[: first + 1]
    assert cut.finish_reason == FinishReason.STOP


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
def test_padding_may_reach_past_the_context(make):
    # A row near the end of its context takes one token while its neighbor takes many.
    model, _ = make(double=True)
    room = model.config.max_position_embeddings
    long = [5 + t % 200 for t in range(room - 4)]
    sampler = sampler_for(model, 2, stop_ids=frozenset({-1}))
    first = reply_to(sampler, {0: long, 1: [9]}, {0: limit(0, 0, 0, 1), 1: limit(0, 1, 0, 1)})
    new = {0: [11], 1: [12] * 40}
    second = reply_to(sampler, new, {0: limit(0, 0, 1, 1), 1: limit(0, 1, 1, 2)})
    for row, start in ((0, long), (1, [9])):
        tokens = [*start, *first[row].tokens, *new[row], *second[row].tokens]
        expected = recomputed_logprobs(model, tokens)[-len(second[row].tokens) :]
        np.testing.assert_allclose(second[row].logprobs, expected.numpy(), atol=1e-9)
