"""The contract of all rollout engines, and the traps of vLLM servers.

The contract runs with the engine in this process, with a small server, and with a real vLLM server
if the environment variable RLHF_VLLM_PYTHON names a Python interpreter with vLLM.
"""

from __future__ import annotations

import http.client
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.engine import EngineSpec
from rlhf.errors import UserError
from rlhf.models.policy_copy import PolicyCopy
from rlhf.rollout.sampling.base import (
    Completion,
    EngineStopped,
    FinishReason,
    Request,
    SamplingParams,
)
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.sampling.recording import RecordedReply, RecordingEngine
from rlhf.rollout.vllm import client as client_module
from rlhf.rollout.vllm.client import Client, ServerUnavailable
from rlhf.rollout.vllm.engine import VLLMEngine, request_seed
from rlhf.rollout.vllm.server import is_answering, start_server, stop_server, wait_until_ready
from rlhf.rollout.vllm.weights import save_with_untied_head
from tests.helpers.dripping_server import DRIPS, dripping_server
from tests.helpers.models import scratch_model, tiny_tokenizer
from tests.helpers.vllm_server import FakeVLLM

REAL = "RLHF_VLLM_PYTHON"
NEVER = SamplingParams()
TEMPERATURE = 0.7


@torch.no_grad()
def update(model: Any, *, size: float = 0.3, seed: int = 1) -> None:
    """Change every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name or not any("lora" in n for n, _ in model.named_parameters()):
            weight.add_(size * torch.randn(weight.shape, generator=generator) / 8)


def request(episode: int, prompt: list[int], *, turn: int = 0, **settings: Any) -> Request:
    settings = {
        "max_new_tokens": 6,
        "sampling": SamplingParams(temperature=TEMPERATURE),
        **settings,
    }
    return Request(episode, prompt, seed=(5, episode, turn), **settings)


def results(engine: Any, count: int, *, release: bool = False) -> dict[int, Completion]:
    """Completions by episode; with `release`, each episode is over after its completion."""
    completions: dict[int, Completion] = {}
    deadline = time.monotonic() + 30  # only ends a test that would wait for ever
    while len(completions) < count:
        assert time.monotonic() < deadline
        for completion in engine.poll():
            assert completion.request.episode_id not in completions
            completions[completion.request.episode_id] = completion
            if release:
                engine.release(completion.request.episode_id)
    return completions


def sample(engine: Any, *requests: Request) -> list[Completion]:
    """The completions of requests, in order; the engine is reset."""
    engine.submit(requests)
    completions = results(engine, len(requests), release=True)
    engine.reset()
    return [completions[r.episode_id] for r in requests]


@torch.no_grad()
def logprobs(
    model: Any, completion: Completion, *, temperature: float = TEMPERATURE
) -> list[float]:
    """Log-probabilities of a completion's tokens from one forward pass."""
    prompt = list(completion.request.prompt_ids)
    logits = model(input_ids=torch.tensor([prompt + completion.tokens])).logits[0].double()
    rows = (logits / temperature).log_softmax(-1)[len(prompt) - 1 :]
    return [float(row[t]) for row, t in zip(rows, completion.tokens, strict=False)]


def server_engine(model: Any, url: str | list[str], folder: Path, **settings: Any) -> VLLMEngine:
    urls = [url] if isinstance(url, str) else url
    settings = {"request_timeout": 60.0, "retry_seconds": 20.0, "tolerance": 1e-3, **settings}
    spec = EngineSpec(kind="vllm", urls=urls, **settings)
    return VLLMEngine(
        model, spec, folder=folder, context=64, temperature=TEMPERATURE, max_requests=4
    )


def base_folder(folder: Path, *, lora: bool) -> Path:
    model = scratch_model()
    if lora:
        model.save_pretrained(folder)
    else:
        save_with_untied_head(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def real_server(folder: Path, *, lora: bool) -> Any:
    """The process and the address of a vLLM server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = "--max-model-len 64 --dtype float32 --logprobs-mode processed_logprobs "
    flags += "--generation-config vllm --enforce-eager "
    flags += "--gpu-memory-utilization 0.3"  # the fraction of the memory, also on a CPU
    flags += " --enable-lora --max-lora-rank 8 --max-loras 2" * lora
    command = [os.environ[REAL], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "policy", "--host", "127.0.0.1"]
    command += ["--port", str(port), *flags.split()]
    log = folder.parent / "server.log"
    process = start_server(command, log=log)
    wait_until_ready(process, url, log=log, seconds=300)
    return process, url


ENGINES = ["local", "fake-full", "fake-lora", "real-full", "real-lora"]


@pytest.fixture(scope="module", params=ENGINES)
def contract(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Any, Any]]:
    """A model and an engine that samples from it."""
    kind, _, weights = request.param.partition("-")
    lora = weights == "lora"
    if kind == "real" and not os.environ.get(REAL):
        pytest.skip(f"SKIPPED, REAL ENGINE: {REAL} names no Python interpreter with vLLM")
    model = scratch_model(lora=lora)
    if kind == "local":
        yield model, ContinuousEngine(model, max_rows=4)
        return
    folder = tmp_path_factory.mktemp("engine")
    base = base_folder(folder / "base", lora=lora)
    if kind == "fake":
        fake = FakeVLLM(base)
        url, end = fake.url, fake.kill
    else:
        process, url = real_server(base, lora=lora)
        end = lambda: stop_server(process)  # noqa: E731
    engine = server_engine(model, url, folder / "weights")
    engine.update_policy(0)
    yield model, engine
    engine.close()
    end()


def test_contract_logprobs_are_those_of_the_policy_at_the_temperature(contract) -> None:
    model, engine = contract
    prompts = [list(range(5 + i, 12 + 2 * i)) for i in range(6)]
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    completions = sample(engine, *requests)
    assert len({tuple(c.tokens) for c in completions}) > 1
    for completion, expected in zip(completions, requests, strict=True):
        assert completion.request is expected
        assert len(completion.tokens) == 6
        assert completion.finish_reason == FinishReason.LENGTH
        assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-3)


def test_contract_stop_token_is_the_last_token(contract) -> None:
    _, engine = contract
    (free,) = sample(engine, request(0, [7, 8, 9]))
    stop_id = free.tokens[2]
    sampling = SamplingParams(temperature=TEMPERATURE, stop_ids=frozenset({stop_id}))
    (stopped,) = sample(engine, request(0, [7, 8, 9], sampling=sampling))
    assert stopped.tokens == free.tokens[: free.tokens.index(stop_id) + 1]
    assert stopped.finish_reason == FinishReason.STOP
    tokens = frozenset(range(len(tiny_tokenizer())))
    every = SamplingParams(temperature=TEMPERATURE, stop_ids=tokens)
    (one,) = sample(engine, request(0, [7, 8, 9], sampling=every, max_new_tokens=1))
    assert (len(one.tokens), one.finish_reason) == (1, FinishReason.STOP)


def test_contract_tokens_depend_on_the_seed(contract) -> None:
    _, engine = contract
    prompt = [9, 10, 11]
    first, other, again = (sample(engine, request(i, prompt))[0] for i in (0, 1, 0))
    assert first.tokens == again.tokens != other.tokens


def test_contract_second_turn_extends_the_first(contract) -> None:
    model, engine = contract
    engine.submit([request(0, [7, 8, 9])])
    first = results(engine, 1)[0]
    prompt = [7, 8, 9, *first.tokens, 50, 51]
    engine.submit([request(0, prompt, turn=1)])
    second = results(engine, 1)[0]
    engine.release(0)
    engine.reset()
    assert second.logprobs == pytest.approx(logprobs(model, second), abs=1e-3)


def test_contract_greedy_logprobs_are_at_temperature_one(contract) -> None:
    model, engine = contract
    greedy = SamplingParams(temperature=0.0)
    (completion,) = sample(engine, request(0, [5, 6, 7], sampling=greedy))
    expected = logprobs(model, completion, temperature=1.0)
    assert completion.logprobs == pytest.approx(expected, abs=1e-3)


def test_contract_released_request_has_no_completion(contract) -> None:
    _, engine = contract
    engine.submit([request(0, [7, 8]), request(1, [7, 8])])
    engine.release(0)
    assert list(results(engine, 1)) == [1]
    engine.reset()
    assert engine.poll() == []


def test_contract_policy_is_updated_between_resets_only(contract) -> None:
    _, engine = contract
    engine.submit([request(0, [7, 8])])
    engine.poll()
    engine.submit([request(1, [7, 8])])
    with pytest.raises(RuntimeError, match="reset the engine before"):
        engine.update_policy(9)
    engine.reset()


def test_contract_next_completions_are_of_the_new_policy(contract) -> None:
    model, engine = contract
    prompt = list(range(5, 40))
    (before,) = sample(engine, request(0, prompt))
    old = logprobs(model, before)
    for version in (4, 5):
        update(model, seed=version)
        engine.update_policy(version)
        (after,) = sample(engine, request(0, prompt))
        assert after.policy_version == version
        assert after.logprobs == pytest.approx(logprobs(model, after), abs=1e-3)
        if isinstance(engine, VLLMEngine):
            assert engine.max_mean_logprob_difference < 1e-3
    assert np.abs(np.array(logprobs(model, before)) - old).mean() > 0.01  # the update is visible


def test_contract_recorded_replies_are_returned_and_the_others_are_sampled(contract) -> None:
    """The second process gets the first turn from the record and samples the second turn."""
    model, engine = contract
    recorder = RecordingEngine(engine)
    recorder.start_batch(0, min_policy_version=0)
    first = sample(recorder, *(request(i, [7, 8, 9 + i]) for i in range(3)))
    replies = [
        RecordedReply.from_row(reply.to_row()) for reply in recorder.replies_of_unfinished_batch()
    ]
    assert len(replies) == 3
    update(model, seed=20)
    version = engine.policy_version + 1
    resumed = RecordingEngine(engine)
    resumed.update_policy(version)
    resumed.schedule_replay(replies)
    resumed.start_batch(0, min_policy_version=0)
    again = sample(resumed, *(request(i, [7, 8, 9 + i]) for i in range(4)))
    for one, other in zip(first, again, strict=False):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
        assert one.policy_version == other.policy_version == version - 1
    assert again[3].policy_version == version
    assert again[3].logprobs == pytest.approx(logprobs(model, again[3]), abs=1e-3)
    assert resumed.pop_unreplayed_reply_count() == 0


def test_contract_a_copy_of_the_policy_samples_while_the_policy_changes(contract) -> None:
    """The engine serves the snapshot that was loaded last, whatever the trainer does meanwhile."""
    model, engine = contract
    if isinstance(engine, VLLMEngine):
        pytest.skip("the engine of this contract samples from the model itself")
    policy = PolicyCopy(model)
    copied = ContinuousEngine(policy.model, max_rows=4)
    snapshot = policy.snapshot(1)
    policy.load(snapshot)
    copied.update_policy(1)
    (before,) = sample(copied, request(0, [7, 8, 9]))
    expected = logprobs(model, before)
    update(model, seed=30)
    (after,) = sample(copied, request(0, [7, 8, 9]))
    assert after.tokens == before.tokens
    assert after.logprobs == pytest.approx(expected, abs=1e-5)
    policy.load(policy.snapshot(2))
    copied.update_policy(2)
    (new,) = sample(copied, request(0, [7, 8, 9]))
    assert new.logprobs == pytest.approx(logprobs(model, new), abs=1e-5)
    assert np.abs(np.array(logprobs(model, before)) - expected).mean() > 0.01


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVLLM]:
    server = FakeVLLM(base_folder(tmp_path / "base", lora=False))
    yield server
    server.kill()


@pytest.fixture
def open_engine(fake: FakeVLLM, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that returns an engine of the small server, with its model."""
    engines = []

    def make(*, lora: bool = False, urls: list[str] | None = None, **settings: Any) -> Any:
        model = scratch_model(lora=lora)
        engine = server_engine(model, urls or fake.url, tmp_path / "weights", **settings)
        engines.append(engine)
        return model, engine

    yield make
    for engine in engines:
        engine.close()
    assert not list((tmp_path / "weights").glob("*"))  # published weights are deleted


def test_raw_logprobs_are_refused(fake, open_engine) -> None:
    fake.traps.raw_logprobs = True
    _, engine = open_engine()
    with pytest.raises(UserError, match=r"sampled tokens .* --logprobs-mode processed_logprobs"):
        engine.update_policy(0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("size", "failures"), [(0.3, 0), (3e-4, 0), (3e-4, 1)])
def test_a_server_that_keeps_the_old_policy_is_refused(
    fake, open_engine, lora, size, failures
) -> None:
    """Also after an update that changes log-probabilities by less than the tolerance.

    Also if the first attempt of the check fails.
    """
    model, engine = open_engine(lora=lora, tolerance=0.05)
    engine.update_policy(0)
    fake.traps.ignore_reload = True
    fake.traps.statuses = [503] * failures
    update(model, size=size)
    message = "does not serve the current policy" if size == 0.3 else "still serves the previous"
    with pytest.raises(UserError, match=message):
        engine.update_policy(1)


def test_stale_prefix_cache_is_refused(fake, open_engine) -> None:
    model, engine = open_engine()
    engine.update_policy(0)
    fake.traps.stale_prefix_cache = True
    update(model)
    with pytest.raises(UserError, match="log-probabilities of sampled tokens differ"):
        engine.update_policy(1)


def test_prefix_cache_in_use_is_reset_later(fake, open_engine) -> None:
    model, engine = open_engine(retry_seconds=4.0)
    fake.traps.busy_prefix_cache = 1
    engine.update_policy(0)
    (completion,) = sample(engine, request(0, [7, 8]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)
    assert fake.calls["/reset_prefix_cache"] == 2


def test_every_adapter_has_a_new_name_and_old_ones_are_unloaded(fake, open_engine) -> None:
    model, engine = open_engine(lora=True)
    names = []
    for version in (0, 1, 2):
        update(model, seed=version)
        engine.update_policy(version)
        names += [name for name in fake.models if name != "policy"]
    assert len(set(names)) == len(names) == 3


@pytest.mark.parametrize("failures", [1, 2])
def test_an_adapter_is_loaded_although_its_check_failed_at_first(
    fake, open_engine, failures
) -> None:
    """The second attempt finds the adapter in the server, which refuses to load a name twice."""
    model, engine = open_engine(lora=True, retry_seconds=4.0)
    engine.update_policy(0)
    (first,) = fake.models.keys() - {"policy"}
    update(model)
    fake.traps.statuses = [503] * failures
    engine.update_policy(1)
    (second,) = fake.models.keys() - {"policy"}
    assert first != second
    (completion,) = sample(engine, request(0, [7, 8]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_an_adapter_is_loaded_although_an_answer_was_lost(
    fake, open_engine, monkeypatch, route
) -> None:
    """The server loads or unloads the adapter, but its answer is an error of a proxy."""
    model, engine = open_engine(lora=True, retry_seconds=4.0)
    engine.update_policy(0)
    update(model)
    answer, lost = fake.answer, []

    def losing(path: str, body: Any) -> Any:
        result = answer(path, body)
        if path == route and not lost:
            lost.append(result)
            return 504, "<html>Gateway Timeout</html>"
        return result

    monkeypatch.setattr(fake, "answer", losing)
    engine.update_policy(1)
    assert lost == [(200, "Success")]
    assert len(fake.models) == 2  # the initial model and one adapter
    (completion,) = sample(engine, request(0, [7, 8]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_version_is_published_once(fake, open_engine, tmp_path, lora) -> None:
    """An evaluation after a step, and the next step, use the same weights."""
    model, engine = open_engine(lora=lora)
    route = "/v1/load_lora_adapter" if lora else "/collective_rpc"
    folders = []
    for count, version in enumerate((0, 1, 2), start=1):
        update(model, seed=version)
        for _ in range(3):
            engine.update_policy(version)
            assert fake.calls[route] == count
            folders += [path.name for path in (tmp_path / "weights").iterdir()]
            (completion,) = sample(engine, request(0, [7, 8]))
            assert completion.policy_version == version
            assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)
    assert len(set(folders)) == 3
    fake.restart()
    engine.update_policy(2)  # the restarted server loads the same publication
    assert fake.calls[route] == 4
    (completion,) = sample(engine, request(0, [7, 8]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


def test_another_base_model_is_refused(tmp_path, open_engine) -> None:
    scratch_model(seed=3).save_pretrained(tmp_path / "other")
    server = FakeVLLM(tmp_path / "other")
    _, engine = open_engine(lora=True, urls=[server.url])
    with pytest.raises(UserError, match="the server needs the initial model of the run"):
        engine.update_policy(0)
    server.kill()


def _without_logprobs(choice: dict[str, Any]) -> None:
    choice["logprobs"] = None


def _nan(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][1] = math.nan


def _minus_infinity(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][0] = -9999.0


def _one_logprob_less(choice: dict[str, Any]) -> None:
    del choice["logprobs"]["token_logprobs"][0]


def _foreign_token(choice: dict[str, Any]) -> None:
    choice["token_ids"][0] = 100_000


def _other_prompt(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]


def _no_ids(choice: dict[str, Any]) -> None:
    del choice["token_ids"]


def _too_long(choice: dict[str, Any]) -> None:
    choice["token_ids"] *= 2
    choice["logprobs"]["token_logprobs"] *= 2


def _too_short(choice: dict[str, Any]) -> None:
    choice["token_ids"].pop()
    choice["logprobs"]["token_logprobs"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_logprobs, "6 tokens with no log-probabilities"),
        (_one_logprob_less, "6 tokens with 5 log-probabilities"),
        (_nan, "returned the log-probability nan"),
        (_minus_infinity, "returned the log-probability -9999.0"),
        (_foreign_token, "token id 100000, which is not in the vocabulary"),
        (_other_prompt, "a prompt that was not requested"),
        (_no_ids, "no completion with token ids"),
        (_too_long, "returned 12 tokens, expected 1 to 6"),
        (_too_short, "does not end at its first stop token or at 6 tokens"),
    ],
)
def test_wrong_answer_is_refused_in_one_line(fake, open_engine, change, message) -> None:
    _, engine = open_engine()
    engine.update_policy(0)
    fake.traps.change_answer = change
    engine.submit([request(0, [7, 8, 9])])
    with pytest.raises(UserError, match=message) as error:
        results(engine, 1)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, EngineStopped)


def test_refused_request_states_the_reason_of_the_server(fake, open_engine) -> None:
    _, engine = open_engine()
    engine.update_policy(0)
    fake.traps.statuses = [400]
    engine.submit([request(0, [7, 8, 9])])
    with pytest.raises(UserError, match="status 400, failure requested by the test"):
        results(engine, 1)


def test_completions_that_arrive_with_an_error_are_returned_before_it(fake, open_engine) -> None:
    """A run that stops records them, so that they are not sampled again."""
    _, engine = open_engine()
    engine.update_policy(0)
    fake.traps.statuses = [400]
    engine.submit([request(episode, [7, 8, 9]) for episode in range(3)])
    with engine._idle:
        assert engine._idle.wait_for(lambda: not engine._running, timeout=30)
    assert len(engine.poll()) == 2
    with pytest.raises(UserError, match="failure requested by the test"):
        engine.poll()
    assert engine.poll() == []


def test_a_request_keeps_its_model_if_another_one_loads_the_weights_again(
    fake, open_engine, monkeypatch
) -> None:
    """Another thread can find that the adapter was lost, just before this request is sent."""
    model, engine = open_engine(lora=True)
    engine.update_policy(0)
    ensure = engine._ensure_current_weights

    def ensure_and_lose(index: int) -> Any:
        found = ensure(index)
        engine.servers[index].mark_not_loaded()
        return found

    monkeypatch.setattr(engine, "_ensure_current_weights", ensure_and_lose)
    (completion,) = sample(engine, request(0, [7, 8]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_restarted_server_gets_the_current_weights(fake, open_engine, lora) -> None:
    """The server has its initial weights again, and answers without an error."""
    model, engine = open_engine(lora=lora)
    update(model)
    engine.update_policy(1)
    fake.restart()
    (completion,) = sample(engine, request(0, [7, 8, 9]))
    assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


def test_a_killed_server_loses_and_repeats_no_completion(fake, open_engine) -> None:
    model, engine = open_engine()
    update(model)
    engine.update_policy(1)
    fake.traps.delay = 0.5  # all requests are unanswered when the server ends
    prompts = [[7 + i, 8, 9] for i in range(8)]
    engine.submit([request(i, prompt) for i, prompt in enumerate(prompts)])
    timer = threading.Timer(0.25, fake.restart)
    timer.start()
    completions = results(engine, 8)
    timer.join()
    assert engine.pop_failed_attempt_count() > 0
    assert engine.poll() == []
    for completion in completions.values():
        assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)


def test_internal_errors_are_repeated(fake, open_engine, caplog) -> None:
    _, engine = open_engine(retry_seconds=8.0)
    engine.update_policy(0)
    (expected,) = sample(engine, request(0, [7, 8, 9]))
    fake.traps.statuses = [500, 503]
    (completion,) = sample(engine, request(0, [7, 8, 9]))
    assert completion.tokens == expected.tokens
    assert engine.pop_failed_attempt_count() == 2
    assert "status 500, failure requested by the test" in caplog.text


def test_dead_server_stops_the_engine_after_the_limit(fake, open_engine) -> None:
    _, engine = open_engine(retry_seconds=0.4)
    engine.update_policy(0)
    fake.kill()
    engine.submit([request(0, [7, 8, 9])])
    message = r"no answer within 0.4 s \(rollout.engine.retry_seconds\).*--resume"
    with pytest.raises(EngineStopped, match=message):
        results(engine, 1)
    engine.reset()
    with pytest.raises(EngineStopped, match=message):
        engine.update_policy(1)
    fake.start()


def test_slow_server_stops_the_engine_after_the_limit(fake, open_engine) -> None:
    _, engine = open_engine(retry_seconds=0.4, request_timeout=0.5)
    engine.update_policy(0)
    fake.traps.delay = 2.0
    engine.submit([request(0, [7, 8, 9])])
    with pytest.raises(EngineStopped, match="timed out"):
        results(engine, 1)


def test_requests_of_a_dead_server_go_to_another_one(fake, open_engine, tmp_path) -> None:
    second = FakeVLLM(tmp_path / "base")
    model, engine = open_engine(urls=[fake.url, second.url])
    engine.update_policy(0)
    fake.kill()
    completions = sample(engine, request(0, [7, 8]), request(1, [7, 8]))
    for completion in completions:
        assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)
    fake.start()
    second.kill()


def open_engine_and_lose_first_server(fake: FakeVLLM, open_engine: Any, tmp_path: Path) -> Any:
    """The second server, the model, and an engine that continues without the first server."""
    second = FakeVLLM(tmp_path / "base")
    model, engine = open_engine(urls=[fake.url, second.url], retry_seconds=0.4)
    engine.update_policy(0)
    fake.kill()
    update(model, seed=1)
    engine.update_policy(1)
    return second, model, engine


def test_the_engine_continues_without_a_lost_server(fake, open_engine, tmp_path, caplog) -> None:
    second, model, engine = open_engine_and_lose_first_server(fake, open_engine, tmp_path)
    assert f"{fake.url}: no answer within 0.4 s; the run continues" in caplog.text
    before = engine.pop_failed_attempt_count()
    assert before > 0
    for completion in sample(engine, request(0, [7, 8]), request(1, [7, 8])):
        assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)
    assert engine.pop_failed_attempt_count() == 0  # the lost server is not asked
    assert engine.max_mean_logprob_difference < 1e-4
    fake.start()
    second.kill()
    update(model, seed=2)
    engine.update_policy(2)
    for completion in sample(engine, request(0, [7, 8]), request(1, [7, 8])):
        assert completion.logprobs == pytest.approx(logprobs(model, completion), abs=1e-4)
    fake.kill()
    with pytest.raises(EngineStopped, match="no answer within"):
        engine.update_policy(3)
    fake.start()


def test_only_the_first_request_waits_for_a_server_that_does_not_answer(
    fake, open_engine, tmp_path
) -> None:
    second = FakeVLLM(tmp_path / "base")
    _, engine = open_engine(urls=[fake.url, second.url])
    engine.update_policy(0)
    engine.servers[0].client.timeout = 0.3
    fake.traps.delay = 2.0
    for expected in (1, 0, 0):  # failed attempts
        sample(engine, request(0, [7, 8]))
        assert engine.pop_failed_attempt_count() == expected
    second.kill()


def test_a_lost_server_that_does_not_answer_costs_one_short_request(
    fake, open_engine, tmp_path, monkeypatch
) -> None:
    """Its machine can be switched off, so that every request would last until the time limit."""
    second, model, engine = open_engine_and_lose_first_server(fake, open_engine, tmp_path)
    limits = []
    with socket.create_server(("127.0.0.1", fake.port)):  # connects, but does not answer
        monkeypatch.setattr(client_module, "PROBE_SECONDS", 0.2)
        connect = client_module.connection_with_deadline

        def recorded(*arguments: Any, timeout: float, **settings: Any) -> Any:
            if settings["port"] == fake.port:
                limits.append(timeout)
            return connect(*arguments, timeout=timeout, **settings)

        monkeypatch.setattr(client_module, "connection_with_deadline", recorded)
        update(model, seed=2)
        engine.update_policy(2)
    assert limits == [0.2]
    fake.start()
    second.kill()


def test_every_server_must_answer_at_the_start(fake, open_engine, tmp_path) -> None:
    second = FakeVLLM(tmp_path / "base")
    second.kill()
    _, engine = open_engine(urls=[fake.url, second.url], retry_seconds=0.4)
    with pytest.raises(EngineStopped, match=rf"{second.url}.*no answer within 0.4 s"):
        engine.update_policy(0)


def test_request_has_all_parameters_of_the_distribution(fake, open_engine) -> None:
    _, engine = open_engine()
    engine.update_policy(0)
    sampling = SamplingParams(0.5, top_k=7, top_p=0.9, min_p=0.1, stop_ids=frozenset({3, 1}))
    sample(engine, request(0, [7, 8], sampling=sampling))
    body = fake.requests[-1]
    expected = {
        "prompt": [7, 8],
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "stop_token_ids": [1, 3],
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "repetition_penalty": 1.0,
        "seed": request_seed((5, 0, 0)),
    }
    assert {key: body[key] for key in expected} == expected


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_published_head_is_not_tied_to_the_embedding(tmp_path, monkeypatch, shards) -> None:
    """vLLM keeps the old output head if it reloads a tied model."""
    model = scratch_model()
    assert model.config.tie_word_embeddings
    save = type(model).save_pretrained
    if shards:
        monkeypatch.setattr(
            type(model), "save_pretrained", lambda m, f: save(m, f, max_shard_size=shards)
        )
    save_with_untied_head(model, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    assert torch.equal(head, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings


def test_seeds_of_requests_differ_and_are_in_the_range_of_vllm() -> None:
    seeds = {
        request_seed((7, seed, i, t)) for seed in range(20) for i in range(5) for t in range(5)
    }
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_key_is_sent_and_not_part_of_the_address(fake, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert Client(fake.url, timeout=5)._headers["Authorization"] == "Bearer secret"
    for url in ("http://user:secret@localhost:1", "localhost:8000", "ftp://a", "http://", ""):
        with pytest.raises(ValueError, match=r"rollout\.engine\.urls") as error:
            EngineSpec(kind="vllm", urls=[url])
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("part", DRIPS)
def test_a_server_that_sends_single_bytes_exceeds_the_time_limit(monkeypatch, part) -> None:
    monkeypatch.setattr(http.client, "_MAXHEADERS", 10**9)
    with dripping_server(part) as (url, connections):
        with pytest.raises(ServerUnavailable, match="timed out"):
            Client(url, timeout=0.5).post("/v1/completions", {})
        assert connections[0].wait(60.0)


def test_no_answer_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    assert not is_answering(url)
    with pytest.raises(ServerUnavailable, match=str(port)):
        Client(url, timeout=5).get("/v1/models")
