"""A server over a tiny model, in a thread of the test process, and clients for it."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from rlhf.config.serve import ServerLimits
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.serving.app import Server
from rlhf.serving.model import ServedModel
from rlhf.web.server import Listener
from tests.helpers.models import tiny_model
from tests.helpers.web import serve_in_thread


@dataclass(frozen=True)
class Running:
    """A running server."""

    server: Server
    listener: Listener

    @property
    def scheduler(self) -> Any:
        assert self.server.completions is not None
        return self.server.completions.model.scheduler

    @property
    def url(self) -> str:
        return self.listener.url("/v1")

    def openai(self, **settings: Any) -> Any:
        """The official client."""
        from openai import OpenAI

        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return OpenAI(base_url=self.url, **settings)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the response to a body, which can be bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request(path, content, **headers)

    def request(self, path: str, content: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a response."""
        request = urllib.request.Request(self.listener.url(path), content, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def running(
    model: Any = None,
    tokenizer: Any = None,
    *,
    engine: Any = None,
    reward: Any = None,
    parallel: int = 4,
    api_key: str = "",
    **limits: Any,
) -> Iterator[Running]:
    """A server with the given model, reward and limits."""
    bounds, served = ServerLimits(**limits), None
    if model is not None:
        engine = engine or ContinuousEngine(model, max_rows=parallel, open_ended=True)
        served = ServedModel("tiny", model, tokenizer, engine, parallel=parallel, limits=bounds)
    server = Server(served, reward, limits=bounds)
    try:
        app = server.app(host="127.0.0.1", api_key=api_key)
        with serve_in_thread(app, unread_seconds=bounds.seconds) as listener:
            yield Running(server, listener)
    finally:
        server.close()


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    """A server with a tiny model in float32 and its chat template."""
    model, tokenizer = tiny_model(context=512)
    with running(model, tokenizer) as server:
        yield server
