"""The in-process rollout engine: queueing, versions, seeds and cancellation."""

from typing import Any

import pytest
import torch

from rlhf.rollout.sampling.base import Completion, FinishReason, Request, SamplingParams
from rlhf.rollout.sampling.continuous import ContinuousEngine
from tests.helpers.models import tiny_model

SAMPLING = SamplingParams(stop_ids=frozenset(range(40)))


def request(episode_id: int, prompt: list[int], *, turn: int = 0, **settings: Any) -> Request:
    settings = {"max_new_tokens": 6, "sampling": SAMPLING, **settings}
    return Request(episode_id, prompt, seed=(5, episode_id, turn), **settings)


def results(engine: ContinuousEngine, count: int) -> dict[int, Completion]:
    """Completions by episode; each episode is released after its completion."""
    completions: dict[int, Completion] = {}
    for _ in range(1000):
        for completion in engine.poll():
            completions[completion.request.episode_id] = completion
            engine.release(completion.request.episode_id)
        if len(completions) == count:
            return completions
    raise AssertionError(f"only {len(completions)} of {count} requests were completed")


def tokens(completions: dict[int, Completion]) -> dict[int, list[int]]:
    return {name: completion.tokens for name, completion in sorted(completions.items())}


def test_engine_completions_do_not_depend_on_number_of_rows():
    model, _ = tiny_model(double=True)
    requests = [request(i, list(range(5, 8 + i))) for i in range(7)]
    outcomes = []
    for rows in (1, 3, 7):
        engine = ContinuousEngine(model, max_rows=rows)
        engine.submit(requests)
        outcomes.append(tokens(results(engine, 7)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(set(map(tuple, outcomes[0].values()))) > 1


def test_engine_second_turn_equals_one_prompt_of_both_turns():
    model, _ = tiny_model(double=True)
    engine = ContinuousEngine(model, max_rows=2)
    engine.submit([request(0, [7, 8, 9])])
    (first,) = [c for _ in range(6) for c in engine.poll()]
    prompt = [7, 8, 9, *first.tokens, 50, 51]
    engine.submit([request(0, prompt, turn=1)])
    second = results(engine, 1)[0]
    prefilled = engine._sampler.prefill_tokens  # type: ignore[union-attr]
    assert prefilled == 3 + 3  # the prompt; the last sampled token and two new ones
    whole = ContinuousEngine(model, max_rows=1)
    whole.submit([request(0, prompt, turn=1)])
    assert results(whole, 1)[0].tokens == second.tokens
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + second.tokens])).logits[0].log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(second.tokens)]
    assert second.logprobs == pytest.approx(expected, abs=1e-9)


def test_completion_names_request_version_and_finish_reason():
    model, _ = tiny_model(double=True)
    engine = ContinuousEngine(model, max_rows=2)
    engine.update_policy(3)
    never = SamplingParams()
    requests = [request(name, [9, 9], sampling=never, max_new_tokens=2 + name) for name in (0, 1)]
    engine.submit(requests)
    completions = results(engine, 2)
    assert [completions[name].request for name in (0, 1)] == requests
    assert len({r.request_id for r in requests}) == 2
    assert {c.policy_version for c in completions.values()} == {3}
    assert {c.finish_reason for c in completions.values()} == {FinishReason.LENGTH}
    assert [len(completions[name].tokens) for name in (0, 1)] == [2, 3]
    engine.reset()
    stop = completions[0].tokens[0]
    engine.submit([request(0, [9, 9], sampling=SamplingParams(stop_ids=frozenset({stop})))])
    completion = results(engine, 1)[0]
    assert (completion.tokens, completion.finish_reason) == ([stop], FinishReason.STOP)


def test_update_policy_is_refused_until_reset():
    model, _ = tiny_model(double=True)
    engine = ContinuousEngine(model, max_rows=2)
    engine.submit([request(0, [7, 8])])
    engine.poll()
    with pytest.raises(RuntimeError, match="reset the engine before"):
        engine.update_policy(1)
    engine.reset()
    engine.update_policy(1)
    before = engine.prefill_tokens
    assert (engine.policy_version, before, engine.poll()) == (1, 2, [])


def test_release_cancels_running_and_queued_requests():
    model, _ = tiny_model(double=True)
    alone = ContinuousEngine(model, max_rows=1)
    alone.submit([request(2, [7, 8])])
    expected = results(alone, 1)[2].tokens
    engine = ContinuousEngine(model, max_rows=1)
    engine.submit([request(name, [7, 8 - name // 2]) for name in (0, 1)] + [request(2, [7, 8])])
    engine.poll()
    engine.release(0)  # holds the only row
    engine.release(1)  # is queued
    assert tokens(results(engine, 1)) == {2: expected}


MIXED = {
    0: SAMPLING,
    1: SamplingParams(temperature=0.0),
    2: SamplingParams(temperature=0.5, stop_ids=frozenset({3})),
    3: SamplingParams(top_p=0.5),
}


@pytest.mark.parametrize("open_ended", [False, True])
def test_a_completion_has_its_own_sampling_parameters_beside_others(open_ended):
    model, _ = tiny_model(double=True)
    requests = [request(i, [5, 6, 7 + i], sampling=sampling) for i, sampling in MIXED.items()]
    alone = {}
    for one in requests:
        engine = ContinuousEngine(model, max_rows=1)
        engine.submit([one])
        alone |= results(engine, 1)
    together = ContinuousEngine(model, max_rows=3, open_ended=open_ended)
    together.submit(requests)
    completions = results(together, 4)
    assert tokens(completions) == tokens(alone)
    for name, completion in completions.items():
        assert completion.logprobs == pytest.approx(alone[name].logprobs, abs=1e-9)
        assert completion.finish_reason == alone[name].finish_reason


def test_an_open_ended_engine_takes_requests_while_it_decodes_and_grows_its_cache():
    model, _ = tiny_model(double=True)
    never = SamplingParams()
    requests = [request(i, [5, 6, 7 + i], sampling=never, max_new_tokens=90) for i in range(3)]
    fixed = ContinuousEngine(model, max_rows=3)
    fixed.submit(requests)
    expected = results(fixed, 3)
    engine = ContinuousEngine(model, max_rows=2, open_ended=True)
    engine.submit(requests[:1])
    for _ in range(3):
        engine.poll()
    cache = engine._sampler.cache  # type: ignore[union-attr]
    assert cache.capacity == 64
    engine.submit(requests[1:])  # one of them waits for a row
    engine.poll()
    assert [len(engine.new_tokens(i, 0).tokens) for i in range(3)] == [3, 1, 0]
    assert tokens(results(engine, 3)) == tokens(expected)
    assert cache.capacity == 128


def test_unfinished_tokens_are_the_start_of_the_completion():
    model, _ = tiny_model(double=True)
    engine = ContinuousEngine(model, max_rows=2, open_ended=True)
    wants = {"max_new_tokens": 5, "num_alternatives": 3, "sampling": SamplingParams(top_k=2)}
    engine.submit([request(0, [7, 8, 9], **wants), request(1, [4], max_new_tokens=5)])
    assert engine.new_tokens(0, 0).tokens == []
    engine.poll()
    first = engine.new_tokens(0, 0)
    engine.poll()
    second = engine.new_tokens(0, 1)
    completion = results(engine, 2)[0]
    assert first.tokens + second.tokens == completion.tokens[:2]
    assert first.logprobs + second.logprobs == completion.logprobs[:2]
    assert first.alternatives + second.alternatives == completion.alternatives[:2]
    assert engine.new_tokens(0, 0).tokens == []  # the completion has ended


def test_alternatives_are_the_most_likely_tokens_of_the_distribution_of_sampling():
    model, _ = tiny_model(double=True)
    sampling = SamplingParams(temperature=0.7, top_k=2)
    engine = ContinuousEngine(model, max_rows=1)
    engine.submit([request(0, [7, 8, 9], sampling=sampling, num_alternatives=3)])
    completion = results(engine, 1)[0]
    prefix = [7, 8, 9]
    for token, logprob, likely in zip(
        completion.tokens, completion.logprobs, completion.alternatives, strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prefix])).logits[0, -1] / 0.7
        values, ids = logits.topk(2)
        assert [i for i, _ in likely] == ids.tolist()
        assert [p for _, p in likely] == pytest.approx(values.log_softmax(0).tolist(), abs=1e-9)
        assert dict(likely)[token] == pytest.approx(logprob, abs=1e-9)
        prefix.append(token)
