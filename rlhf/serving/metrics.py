"""Metrics of a server in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.serving.scheduler import Scheduler

_DURATION_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper limits of the buckets of the histogram of durations, in seconds."""


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlhf_requests", "Finished requests.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rlhf_request_seconds",
            "Time from the start of a request to the end of its response.",
            ["route"],
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "rlhf_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.completion_tokens = Counter(
            "rlhf_completion_tokens", "Sampled tokens.", registry=self.registry
        )
        self.scored = Counter(
            "rlhf_scored_conversations", "Conversations that were scored.", registry=self.registry
        )

    def add_completion_gauges(self, scheduler: Scheduler) -> None:
        """Add the numbers of running and of unfinished completions of a scheduler."""
        running = Gauge(
            "rlhf_completions_running", "Completions in the engine.", registry=self.registry
        )
        running.set_function(lambda: scheduler.num_running)
        unfinished = Gauge(
            "rlhf_completions_unfinished",
            "Completions, and requests for log-probabilities of prompts, in the engine or waiting.",
            registry=self.registry,
        )
        unfinished.set_function(lambda: scheduler.num_unfinished)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class RequestCounter:
    """ASGI application that counts the requests to another application, including refused ones.

    Args:
        app: The application.
        metrics: The counters.
        routes: Routes that are counted separately, each under its path with the names of its
            parameters. All other paths are counted as ``other``. Clients can therefore not create
            counters.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, routes: Sequence[Route]) -> None:
        self._app, self._metrics, self._routes = app, metrics, tuple(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        matching_paths = (
            r.path_format for r in self._routes if r.matches(scope)[0] is not Match.NONE
        )
        route = next(matching_paths, "other")
        began, status = time.monotonic(), 499  # a disconnected client receives no status

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - began)
