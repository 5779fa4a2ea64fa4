"""Refused requests, limits, failures, cancellation and access."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from rlhf.errors import UserError
from rlhf.rollout.sampling.continuous import ContinuousEngine
from tests.helpers.models import tiny_model
from tests.serving.conftest import Running, running

CHAT = [{"role": "user", "content": "Say a number."}]
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30  # only ends a test that would wait for ever
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(server: Running, status: int, path: str, body: Any, **headers: str) -> dict[str, Any]:
    found, answer = server.post(path, body, **headers)
    assert found == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "prompt is required"),
    ({"prompt": []}, "prompt", "must be a text"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": [1, "a"]}, "prompt", "every prompt must be"),
    ({"prompt": [10**9]}, "prompt", "a token id is not in"),
    ({"prompt": [-1]}, "prompt", "a token id is not in"),
    ({"prompt": "a " * 2000}, "prompt", "limited to 512 tokens"),
    ({"max_tokens": 512}, "max_tokens", "exceed the limit of 512 tokens"),
    ({"max_tokens": 0}, "max_tokens", "at least 1 without echo"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"temperature": 1e-9}, "temperature", "at least 0.001"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 129}, "n", "limited to 128"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"best_of": 2}, "best_of", "unless it equals n"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "no effect without stream"),
]


@pytest.mark.parametrize(("options", "param", "message"), REFUSALS)
def test_a_wrong_option_is_refused_by_name(tiny, options, param, message):
    body = {"model": "tiny", "prompt": "a", **options}
    error = refused(tiny, 400, "/v1/completions", body)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "at least one message"),
    ({"messages": "hello"}, "at least one message"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "role must be"),
    ({"messages": [{"role": "user"}]}, "content must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "'tool_calls'"),
    ({"top_logprobs": 2}, "no effect without logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "not both"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens: 1000000 tokens after"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"echo": True}, "unknown option 'echo'"),
]


@pytest.mark.parametrize(("options", "message"), CHAT_REFUSALS)
def test_a_wrong_chat_option_is_refused(tiny, options, message):
    body = {"model": "tiny", "messages": CHAT, **options}
    assert message in refused(tiny, 400, "/v1/chat/completions", body)["message"]


def test_neutral_options_and_parts_of_text_are_accepted(tiny):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say a number."}]}]
    neutral = {"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "n": 1}
    neutral |= {"user": "someone", "logit_bias": {}, "top_k": -1, "seed": -3, "stop": None}
    body = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    first = tiny.post("/v1/chat/completions", {**body, "messages": CHAT})[1]
    second = tiny.post("/v1/chat/completions", {**body, **neutral, "messages": parts})[1]
    assert first["choices"] == second["choices"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"a"', b"\xff", b'{"model": NaN}', b"[" * 100_000, b"1" * 9000]
)
def test_a_body_that_is_no_json_object_is_refused(tiny, body):
    assert "body" in refused(tiny, 400, "/v1/completions", body)["message"]


def test_an_unpaired_surrogate_is_refused(tiny):
    body = b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}'
    refused(tiny, 400, "/v1/completions", body)


def test_an_unknown_model_path_or_method_is_refused(tiny):
    error = refused(tiny, 404, "/v1/completions", {"model": "other", "prompt": "a"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "is not among those of the routes for completions: tiny" in error["message"]
    assert tiny.request("/v1/models/other")[0] == 404
    assert tiny.request("/v1/completions")[0] == 405
    assert tiny.post("/v1/nothing", {})[0] == 404
    assert tiny.post("/v1/score", {})[0] == 404  # no reward is served


def test_a_large_body_is_refused():
    model, tokenizer = tiny_model()
    with running(model, tokenizer, body_bytes=1000) as server:
        body = {"model": "tiny", "prompt": "a" * 2000}
        assert refused(server, 413, "/v1/completions", body)["type"] == "invalid_request_error"


def test_a_full_queue_answers_503_with_a_time():
    model, tokenizer = tiny_model(context=512)
    with running(model, tokenizer, parallel=1, queue=1) as server:
        client = server.openai()
        with pytest.raises(openai.BadRequestError, match="limited to 2"):
            client.completions.create(model="tiny", prompt="a", n=3)
        results: list[Any] = []

        def run() -> None:
            results.append(server.post("/v1/completions", {**LONG, "n": 2})[0])

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: server.scheduler.num_unfinished == 2)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.status_code == 503
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
        thread.join()
        assert results == [200]
        # The official client repeats a refused request by itself.
        assert client.with_options(max_retries=3).completions.create(model="tiny", prompt="a")


def test_a_request_that_takes_too_long_ends():
    model, tokenizer = tiny_model(context=512)
    with running(model, tokenizer, seconds=0.05) as server:
        error = refused(server, 408, "/v1/completions", LONG)
        assert (error["type"], error["code"]) == ("timeout_error", "timeout")
        stream = server.openai().completions.create(
            model="tiny", prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="took longer"):
            list(stream)
        wait_until(lambda: server.scheduler.num_running == 0)


class SlowEngine(ContinuousEngine):
    """An engine whose forward passes take a while."""

    def poll(self) -> Any:
        time.sleep(0.02)
        return super().poll()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_frees_the_engine(stream):
    model, tokenizer = tiny_model(context=512)
    engine = SlowEngine(model, max_rows=2, open_ended=True)
    with running(model, tokenizer, engine=engine, parallel=2) as server:
        client = server.openai(timeout=0.3)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "n": 2}
        if stream:
            events = client.completions.create(stream=True, extra_body={"ignore_eos": True}, **body)
            next(iter(events))
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(extra_body={"ignore_eos": True}, **body)
        wait_until(lambda: server.scheduler.num_unfinished == 0)
        wait_until(lambda: server.scheduler.num_running == 0)
        assert engine._sampler is not None
        assert engine._sampler.row_of == {}
        again = server.openai().completions.create(model="tiny", prompt="a", max_tokens=3)
        assert again.usage.completion_tokens <= 3


class CountingEngine(SlowEngine):
    """A slow engine that counts its forward passes."""

    passes = 0

    def poll(self) -> Any:
        self.passes += 1
        return super().poll()


def test_a_client_that_never_reads_its_stream_is_disconnected():
    model, tokenizer = tiny_model(context=512)
    engine = CountingEngine(model, max_rows=4, open_ended=True)
    with running(model, tokenizer, engine=engine, seconds=1) as server:
        server.listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps({**LONG, "n": 4, "logprobs": 20, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.listener.port))
            client.sendall(head.format(len(body)).encode() + body)
            wait_until(lambda: server.scheduler.num_running == 4)
            wait_until(lambda: server.scheduler.num_unfinished == 0)
            assert engine.passes < LONG["max_tokens"]  # ended by the limit, not by the last token
            ended = 'rlhf_requests_total{route="/v1/completions",status="200"} 1.0'
            wait_until(lambda: ended in server.server.metrics.text().decode())
            received = b""
            while part := client.recv(65536):
                received += part
            assert received.startswith(b"HTTP/1.1 200 OK")
            assert b"[DONE]" not in received


class FailingEngine(ContinuousEngine):
    """An engine that fails once, and whose reset can fail."""

    failures, reset_fails = 1, False

    def poll(self) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        return super().poll()

    def reset(self) -> None:
        if self.reset_fails:
            raise RuntimeError("the device is lost")
        super().reset()


def test_a_failed_forward_pass_fails_its_requests_only():
    model, tokenizer = tiny_model()
    engine = FailingEngine(model, max_rows=2, open_ended=True)
    with running(model, tokenizer, engine=engine) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        error = refused(server, 500, "/v1/completions", body)
        assert error["message"] == "the engine failed: RuntimeError"
        assert server.post("/v1/completions", body)[0] == 200
        engine.failures = 1
        stream = server.openai().completions.create(stream=True, **body)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)


def test_an_engine_that_cannot_continue_makes_the_server_unhealthy():
    model, tokenizer = tiny_model()
    engine = FailingEngine(model, max_rows=2, open_ended=True)
    engine.reset_fails = True
    with running(model, tokenizer, engine=engine) as server:
        assert server.request("/health") == (200, {"status": "ok"})
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        refused(server, 500, "/v1/completions", body)
        wait_until(lambda: server.scheduler.failure is not None)
        assert server.request("/health")[0] == 503
        refused(server, 500, "/v1/completions", body)
        refused(server, 500, "/v1/completions", {**body, "echo": True, "logprobs": 1})


def test_a_key_protects_every_route_but_the_health():
    model, tokenizer = tiny_model()
    with running(model, tokenizer, api_key="secret-key") as server:
        assert server.request("/health")[0] == 200
        for path in ("/v1/models", "/metrics"):
            assert server.request(path)[0] == 401
            assert server.request(path, Authorization="Bearer wrong")[0] == 401
        error = refused(server, 401, "/v1/completions", {"model": "tiny", "prompt": "a"})
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        client = server.openai(api_key="secret-key")
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            server.openai(api_key="other").models.list()


def test_pages_of_other_sites_get_nothing(tiny):
    body = {"model": "tiny", "prompt": "a"}
    refused(tiny, 403, "/v1/completions", body, Origin="http://evil.example")
    refused(tiny, 403, "/v1/completions", body, Host="evil.example")


def test_an_error_does_not_contain_the_key(tiny, monkeypatch):
    monkeypatch.setenv("RLHF_API_KEY", "secret-key-of-a-server")
    body = {"model": "secret-key-of-a-server", "prompt": "a"}
    for wrong in (body, {**body, "x-secret-key-of-a-server": 1}):
        status, error = tiny.post("/v1/completions", wrong)
        assert status in (400, 404)
        assert "secret-key" not in json.dumps(error)


def test_a_template_that_refuses_messages_is_a_mistake_of_the_client(tiny, monkeypatch):
    def refuse(messages: Any) -> Any:
        raise UserError("the model's chat template has no system role")

    monkeypatch.setattr(tiny.server.completions.model.chat_format, "encode_prompt", refuse)
    error = refused(tiny, 400, "/v1/chat/completions", {"model": "tiny", "messages": CHAT})
    assert error["message"] == "messages: the model's chat template has no system role"
