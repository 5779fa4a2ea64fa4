"""The application: its routes, errors and access rules."""

from __future__ import annotations

import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhf.config.serve import ServerLimits
from rlhf.reward_models.core import Reward
from rlhf.serving.completions import CompletionRoutes
from rlhf.serving.errors import ApiError, refusal_response, unknown_model_error
from rlhf.serving.metrics import RequestCounter, ServerMetrics
from rlhf.serving.model import ServedModel
from rlhf.serving.scheduler import EngineFailed
from rlhf.serving.scores import ScoreRoute
from rlhf.web.security import LOOPBACK_NAMES, secured
from rlhf.web.server import is_loopback

OPEN_PATHS = ("/health",)
"""Paths that need no key."""
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_CLIENT_GONE = 499
"""Status, in the metrics, of a request whose client closed the connection."""


class Server:
    """A model, a reward, or both, with their routes.

    Args:
        model: The language model, if one is served.
        reward: The reward, if one is served.
        reward_name: Name of the reward in requests.
        limits: Limits of requests.
    """

    def __init__(
        self,
        model: ServedModel | None,
        reward: Reward | None,
        *,
        reward_name: str = "reward",
        limits: ServerLimits | None = None,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.metrics, self._created = ServerMetrics(), int(time.time())
        self.completions = self.scores = None
        if model is not None:
            self.completions = CompletionRoutes(model, self.metrics)
            self.metrics.add_completion_gauges(model.scheduler)
        if reward is not None:
            self.scores = ScoreRoute(reward_name, reward, self.limits, self.metrics)

    def app(self, *, host: str, api_key: str = "") -> ASGIApp:
        """Return the application.

        Args:
            host: Address on which the server listens.
            api_key: Key that requests must contain; "" if no key is required.
        """
        routes = self._routes()
        handlers: Any = {
            ApiError: _api_error_response,
            HTTPException: _http_error_response,
            EngineFailed: _engine_failure_response,
            ClientDisconnect: _client_disconnected_response,
            Exception: _internal_error_response,
        }
        app = secured(
            Starlette(routes=routes, exception_handlers=handlers),
            token=api_key,
            # If other machines can connect, a key is required, which other sites do not know.
            allowed_hosts={*LOOPBACK_NAMES, host} if is_loopback(host) else None,
            open_paths=OPEN_PATHS,
            max_body_bytes=self.limits.body_bytes,
            headers=_HEADERS,
            refusal=refusal_response,
        )
        return RequestCounter(app, self.metrics, routes)

    def close(self) -> None:
        """Stop the threads of the model and of the reward."""
        for part in (self.completions, self.scores):
            if part is not None:
                part.close()

    def _routes(self) -> list[Route]:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._prometheus_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._get_model),
        ]
        if self.completions is not None:
            routes += [
                Route("/v1/completions", self.completions.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.completions.chat, methods=["POST"]),
            ]
        if self.scores is not None:
            routes.append(Route("/v1/score", self.scores.score, methods=["POST"]))
        return routes

    async def _health(self, request: Request) -> Response:
        """Respond with status 200 if the model can be used, otherwise with status 503."""
        if self.completions is not None and self.completions.model.scheduler.failure is not None:
            return JSONResponse({"status": "the model cannot be used any more"}, 503)
        return JSONResponse({"status": "ok"})

    async def _prometheus_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._model_descriptions()})

    async def _get_model(self, request: Request) -> Response:
        name, models = request.path_params["name"], self._model_descriptions()
        for model in models:
            if model["id"] == name:
                return JSONResponse(model)
        raise unknown_model_error(name, [model["id"] for model in models])

    def _model_descriptions(self) -> list[dict[str, Any]]:
        """Return the descriptions of the model and of the reward."""
        shared = {"object": "model", "created": self._created, "owned_by": "rlhf"}
        rows: list[dict[str, Any]] = []
        if self.completions is not None:
            model = self.completions.model
            rows.append({"id": model.name, **shared, "max_model_len": model.max_tokens})
        if self.scores is not None:
            rows.append({"id": self.scores.name, **shared})
        return rows


async def _api_error_response(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error_response(request: Request, error: HTTPException) -> Response:
    """Return the error for an unknown path, or for a method that the path does not support."""
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _engine_failure_response(request: Request, error: EngineFailed) -> Response:
    return ApiError(500, str(error)).response()


async def _client_disconnected_response(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _internal_error_response(request: Request, error: Exception) -> Response:
    """Return the error for an unexpected exception. The server logs its traceback."""
    return ApiError(500, "internal error; the log of the server contains the traceback").response()
