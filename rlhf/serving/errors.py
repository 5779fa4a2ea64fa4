"""Errors of requests, in the JSON format of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from rlhf.common.ranges import shortened_repr
from rlhf.common.text import escape_invisible, mask_secrets

_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error"}
"""Status -> type of the error. For other statuses, `ApiError.body` determines the type."""


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: HTTP status.
        message: Description of the error.
        param: Name of the invalid option of the request.
        code: Short name of the error for programs.
        headers: Additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the JSON of the error."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": mask_secrets(escape_invisible(self.message)),
                "type": _TYPES.get(self.status, default),
                "param": mask_secrets(escape_invisible(self.param)) if self.param else None,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the response with the error."""
        return JSONResponse(self.body(), self.status, self.headers)


def unknown_model_error(name: str, known: Sequence[str], *, place: str = "this server") -> ApiError:
    """Return the error for the name of a model that a server or a route, ``place``, lacks."""
    return ApiError(
        404,
        f"the model {shortened_repr(name)} is not among those of {place}: {', '.join(known)}",
        param="model",
        code="model_not_found",
    )


def overloaded_error(retry_seconds: int) -> ApiError:
    """Return the error for a full queue, with the time until the client should try again."""
    return ApiError(
        503,
        f"too many requests wait; repeat the request in {retry_seconds} s",
        code="overloaded",
        headers={"Retry-After": str(retry_seconds)},
    )


def timeout_error(seconds: float) -> ApiError:
    """Return the error for a request that exceeds the time limit."""
    # Without the header, the official client would repeat the request.
    return ApiError(
        408,
        f"the request took longer than {seconds:g} s",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def refusal_response(status: int, reason: str) -> JSONResponse:
    """Return the response to a request that the access rules refuse.

    For status 401, a hint on the header of the key replaces ``reason``.
    """
    if status == 401:
        reason = "missing or wrong API key; send the header Authorization: Bearer KEY"
        return ApiError(401, reason, code="invalid_api_key").response()
    return ApiError(status, reason).response()
