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


def test_requests_of_one_batch_share_sampling_params():
    model, _ = tiny_model(double=True)
    engine = ContinuousEngine(model, max_rows=2)
    engine.submit([request(0, [7]), request(1, [7], sampling=SamplingParams(temperature=0.5))])
    with pytest.raises(ValueError, match="same sampling parameters"):
        engine.poll()
