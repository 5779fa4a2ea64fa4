"""Malformed requests, drawn from a seed: each is refused with a 4xx status, and nothing is lost."""

from __future__ import annotations

import gc
import json
import random
import socket
import string
from pathlib import Path
from typing import Any

import pytest

from rlhf.models.rewards import load_rewards
from tests.helpers.models import tiny_model
from tests.serving.conftest import Running, running

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 1, "n": 1},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
    },
    "/v1/score": {
        "model": "reward",
        "conversations": [[{"role": "user", "content": "a"}]],
    },
}
JUNK: list[Any] = ["", "x", -1, 0.5, 10**30, [], [[]], {}, {"a": 1}, True, [None], "\x00", "漢"]
NUMBERS = ("max_tokens", "temperature", "top_p", "n", "seed", "min_p", "top_k")
MAX_GROWTH = 24 * 2**20
"""Growth of the memory, in bytes, after the first quarter of the requests. It is less than 6 kB for
each of the requests of the sweep."""


def wrong_value(draw: random.Random, path: str) -> dict[str, Any]:
    """A body in which one option has a value of a wrong type or range."""
    body = dict(VALID[path])
    if path == "/v1/score":
        body["conversations"] = draw.choice([*JUNK, [[{"role": 1, "content": "a"}]], [["a"]]])
    elif draw.random() < 0.5:
        name = draw.choice(NUMBERS)
        body[name] = draw.choice(["1", [1], {"a": 1}, True, -(10**30), 10**30, {}])
        if body[name] == 10**30 and name == "temperature":
            body[name] = "warm"
    else:
        key = "prompt" if path == "/v1/completions" else "messages"
        body[key] = draw.choice([{}, -1, 0.5, True, [], [[]], [None], [{"role": "user"}], [[1.5]]])
    return body


def text_of(draw: random.Random) -> str:
    return "".join(draw.choices(string.printable + "é漢🙂\u202e", k=draw.randint(1, 20)))


def malformed(draw: random.Random) -> tuple[str, str, bytes]:
    """The method, the path and the body of a malformed request."""
    path = draw.choice(list(VALID))
    body = dict(VALID[path])
    content = json.dumps(body).encode()
    kind = draw.randrange(9)
    if kind == 0:
        return "POST", path, draw.randbytes(draw.randint(0, 200))
    if kind == 1:
        return "POST", path, content[: draw.randrange(len(content))]
    if kind in (2, 3, 4):
        return "POST", path, json.dumps(wrong_value(draw, path)).encode()
    if kind == 5:
        body[f"z{text_of(draw)}"] = draw.choice(JUNK)
        return "POST", path, json.dumps(body).encode()
    if kind == 6:
        del body[draw.choice(sorted({"model", "prompt", "messages", "conversations"} & set(body)))]
        return "POST", path, json.dumps(body).encode()
    if kind == 7:
        methods = ["GET", "PUT", "DELETE", "PATCH"]
        return draw.choice(methods), path, draw.choice([b"", content])
    depth = draw.randint(1000, 100_000)
    return "POST", path, b'{"model": ' + draw.choice([b"[", b'{"a":']) * depth


def exchange(server: Running, request: bytes) -> bytes:
    """The response to the bytes of a request."""
    address = ("127.0.0.1", server.listener.port)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def send(server: Running, method: str, path: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON of the response."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    response = exchange(server, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, _, content = response.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(content)


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def check_malformed_requests(count: int, seed: int) -> None:
    draw = random.Random(seed)
    model, tokenizer = tiny_model()
    with running(model, tokenizer, reward=load_rewards([{"kind": "length"}])) as server:
        memory = 0
        for index in range(count):
            method, path, body = malformed(draw)
            status, answer = send(server, method, path, body)
            place = f"seed {seed}, request {index}: {method} {path} {body[:300]!r}: {answer}"
            assert 400 <= status < 500, place
            assert answer["error"]["message"], place
            if index == count // 4:
                memory = resident_bytes()
        assert resident_bytes() - memory < MAX_GROWTH
        assert server.scheduler.num_unfinished == 0
        assert server.request("/health") == (200, {"status": "ok"})
        for path, valid in VALID.items():
            assert server.post(path, valid)[0] == 200


def test_malformed_requests_are_refused():
    check_malformed_requests(300, seed=1)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", [2])
def test_many_malformed_requests_are_refused_with_flat_memory(seed):
    check_malformed_requests(5000, seed)


NO_HTTP = [
    b"\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    bytes(range(256)),
]


@pytest.mark.parametrize("request_bytes", NO_HTTP, ids=lambda value: repr(value[:40]))
def test_what_is_no_http_request_ends_its_connection_only(tiny, request_bytes):
    response = exchange(tiny, request_bytes)
    assert response == b"" or response.split()[1][:1] == b"4"
    assert tiny.request("/health")[0] == 200


def test_a_body_that_ends_early_changes_nothing(tiny):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n\r\n"
    exchange(tiny, head + b'{"model": ')
    assert tiny.scheduler.num_unfinished == 0
    assert tiny.request("/health")[0] == 200
