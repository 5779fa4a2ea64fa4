"""The web server of local pages: foreign requests get nothing, and signals end it with a code."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from rlhf.errors import UserError
from rlhf.web import security
from rlhf.web.pages import Templates, asset_routes
from rlhf.web.security import new_token, secured
from rlhf.web.server import is_loopback, open_listener
from tests.helpers.web import serve_in_thread

SECRET = "the content of the page"
ROOT = Path(__file__).resolve().parents[2]


async def content(request: Request) -> PlainTextResponse:
    return PlainTextResponse(SECRET)


async def size(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(iter(["one ", "two"]))


TOKEN = new_token()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    app = Starlette(
        routes=[
            Route("/", content),
            Route("/size", size, methods=["POST"]),
            Route("/stream", stream),
            Route("/health", content),
            *asset_routes("rlhf.labeling"),
        ]
    )
    safe = secured(app, token=TOKEN, open_paths=["/health"], max_body_bytes=1000)
    with serve_in_thread(safe) as listener:
        yield listener.url("")


def authorized(**headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}", **headers}


def test_the_token_moves_from_the_url_to_a_cookie(address: str):
    with httpx.Client(base_url=address) as client:
        first = client.get(f"/?token={TOKEN}&x=1")
        assert first.status_code == 303
        assert first.headers["location"] == "/?x=1"
        cookie = first.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert SECRET not in first.text
        assert client.get("/").text == SECRET


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=", {}),
        ("/?token=wrong", {}),
        ("/?token=%ff", {}),
        ("/", {"Authorization": "Bearer wrong"}),
        ("/", {"Authorization": f"Basic {TOKEN}"}),
        ("/", {"Cookie": "rlhf-token-1=wrong"}),
        ("/", {"Cookie": f"token={TOKEN}"}),
        ("/style.css", {}),
        ("/static/label.js", {}),
        ("/unknown", {}),
    ],
)
def test_without_the_token_there_is_nothing(address: str, path: str, headers: dict[str, str]):
    answer = httpx.get(address + path, headers=headers)
    assert answer.status_code == 401
    assert answer.text == "missing or wrong token\n"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Host": "evil.example@127.0.0.1"},
        {"Host": "127.0.0.1/evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_foreign_origin_gets_nothing_although_it_has_the_token(
    address: str, headers: dict[str, str]
):
    for path in ("/", "/health", f"/?token={TOKEN}"):
        answer = httpx.get(address + path, headers=authorized(**headers))
        assert answer.status_code in (400, 403)  # the server itself refuses a malformed host
        assert SECRET not in answer.text
        assert "set-cookie" not in answer.headers


def test_the_page_s_own_requests_are_answered(address: str):
    own = authorized(Origin=address, **{"Sec-Fetch-Site": "same-origin"})
    assert httpx.get(address, headers=own).text == SECRET
    assert httpx.post(f"{address}/size", headers=own, content=b"x" * 1000).json() == {"bytes": 1000}
    assert httpx.get(f"{address}/stream", headers=own).text == "one two"
    assert httpx.get(f"{address}/health").text == SECRET


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(address: str, chunked: bool):
    body = iter([b"x" * 600] * 2) if chunked else b"x" * 1200
    answer = httpx.post(f"{address}/size", headers=authorized(), content=body)
    assert answer.status_code == 413
    assert answer.text == "the request is larger than 1000 bytes\n"


def test_a_body_that_does_not_end_is_refused(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "MAX_BODY_SECONDS", 0.1)
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        head = f"POST /size HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        client.sendall(f"{head}Content-Length: 9\r\n\r\nabc".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_shutdown_answers_requests_whose_body_does_not_end():
    """Uvicorn cancels them after its time limit, and would print a traceback for each."""
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def canceled() -> None:
        scope = {"type": "http", "method": "POST", "path": "/size", "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")]}
        request = asyncio.create_task(secured(Starlette())(scope, receive, send))
        await asyncio.sleep(0)
        request.cancel()
        await request

    asyncio.run(canceled())
    assert sent[0]["status"] == 503


def test_every_answer_has_the_security_headers(address: str):
    answers = [
        httpx.get(address),
        httpx.get(address, headers=authorized()),
        httpx.get(f"{address}/unknown", headers=authorized()),
        httpx.get(address, headers={"Host": "evil.example"}),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_assets_are_inside_their_folder(address: str):
    style = httpx.get(f"{address}/style.css", headers=authorized())
    assert style.headers["content-type"].startswith("text/css")
    assert "prefers-color-scheme: dark" in style.text
    assert httpx.get(f"{address}/static/label.js", headers=authorized()).status_code == 200
    for path in ("/static/../page.py", "/static/%2e%2e/page.py", "/static/..%2fpage.py"):
        assert httpx.get(address + path, headers=authorized()).status_code == 404


def test_templates_escape_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hostile = '<script>alert(1)</script>\u202e\x1b[2J"'
    page = Templates("rlhf.labeling").page(
        "label.html",
        annotator=hostile,
        file="a",
        guidelines=hostile,
        mode="pairs",
        question="q",
        strengths=3,
        scale=5,
        settings_id="0",
    )
    text = bytes(page.body).decode()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e\\u001b[2J&#34;" in text


def test_only_addresses_of_this_machine_are_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")))


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: .*in use.*--port 0"):
            open_listener(port=port)
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.host\.invalid") as error:
        open_listener("no.such.host.invalid")
    assert "--port 0" not in str(error.value)


SLOW = """
import asyncio, sys
from rlhf.cli.main import _report_error
from rlhf.web.server import open_listener, serve
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def slow(request):
    print("started", flush=True)
    await asyncio.sleep(1)
    return PlainTextResponse("finished")

listener = open_listener()
print(listener.url(), flush=True)
try:
    serve(Starlette(routes=[Route("/", slow)]), listener, stop_message_suffix="all is saved")
except BaseException as error:
    sys.exit(_report_error(error, debug=False))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_requests_finish_and_ends_with_its_code(number: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.endswith(b"finished")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"rlhf: stopped by {number.name}; all is saved\n"
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_running_requests(number: signal.Signals):
    """The request would run for an hour, and the time limit after one signal is as long."""
    program = SLOW.replace("sleep(1)", "sleep(3600)").replace(
        'suffix="all is saved"', 'suffix="all is saved", graceful_seconds=3600'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        while is_listening(host, int(port)):
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.endswith(f"rlhf: stopped by {number.name}; all is saved\n")


def is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
