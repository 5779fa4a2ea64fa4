"""Requests to the endpoint for chat completions of an OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf.common.http import deadline_opener_without_redirects, json_headers, read_body
from rlhf.errors import UserError

Result = TypeVar("Result")

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of the server."""
_MAX_BODY = 16 * 2**20
"""Size of the largest response that is read, in bytes."""


def check_url_has_no_credentials(url: str, *, what: str) -> None:
    """Check the address of a server.

    Args:
        url: Address, such as ``http://localhost:8000/v1``.
        what: Start of error messages.

    Raises:
        UserError: The address contains a user name or a password, which would be saved in run
            directories.
    """
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise UserError(
            f"{what}: url contains a user name or a password, which would be saved in the run "
            f"directory; set the environment variable {API_KEY_VARIABLE} instead"
        )


def chat_completion_function(
    url: str, *, timeout: float, what: str
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function from the JSON of a request to the JSON of the response.

    The function raises an exception if a request fails, for example after a timeout or if the
    response is not JSON. Further requests can be sent afterwards. The API key is read from the
    environment variable `API_KEY_VARIABLE`.

    Args:
        url: Address of the server, such as ``http://localhost:8000/v1``.
        timeout: Time limit, in seconds, of a request, from the connection to the end of the answer.
        what: Start of error messages.

    Raises:
        UserError: The address contains a user name or a password, or the API key contains a
            character that is not allowed in an HTTP header.
    """
    check_url_has_no_credentials(url, what=what)
    address = url.rstrip("/") + "/chat/completions"
    headers = json_headers(API_KEY_VARIABLE)
    opener = deadline_opener_without_redirects()

    def complete(query: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(address, json.dumps(query).encode(), headers)
        with opener.open(request, timeout=timeout) as response:
            return json.loads(read_body(response, max_bytes=_MAX_BODY))

    return complete


def result_within(seconds: float, request: Callable[[], Result]) -> Result | TimeoutError:
    """Return the result of a request, or a TimeoutError if it takes longer than ``seconds``.

    The request runs in a daemon thread, because the time that the system needs to resolve the name
    of the server and to try its addresses has no limit. After the time limit, the thread continues
    until the request ends. The request must not raise an exception.
    """
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(request()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else TimeoutError("timed out")
