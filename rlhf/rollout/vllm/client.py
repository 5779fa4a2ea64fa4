"""HTTP client of one vLLM server, with detection of restarts and cancellation of requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import urllib.parse
from typing import Any

from rlhf.common.http import ResponseTooLarge, connection_with_deadline, json_headers, read_body
from rlhf.errors import UserError, first_line

MAX_BODY = 64 * 2**20
"""Size of the largest response that is read, in bytes."""
PROBE_SECONDS = 5.0
"""Time limit of a request that tests whether a server answers."""
_UNAVAILABLE_STATUS = (408, 425, 429)
"""Status codes below 500 after which a request is repeated."""


class ServerUnavailable(Exception):
    """A server does not answer, is slow, reports a temporary or internal error, or restarted."""


class ServerRefusal(UserError):
    """A server refused a request, for example because it is invalid."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Cancellation:
    """Cancels a request from another thread."""

    def __init__(self) -> None:
        self.canceled = False
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()

    def attach(self, connection: http.client.HTTPConnection | None) -> None:
        """Set the connection of the request, None after its end; close it if already canceled."""
        with self._lock:
            self._connection = connection
            if self.canceled and connection is not None:
                _shut_down(connection)

    def cancel(self) -> None:
        """Close the connection of the request, so that the server stops sampling."""
        with self._lock:
            self.canceled = True
            if self._connection is not None:
                _shut_down(self._connection)


def _shut_down(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


class Client:
    """Sends requests to one server.

    Args:
        url: Address of the server, such as ``http://localhost:8000``.
        timeout: Time limit of a request, in seconds.

    Raises:
        UserError: The key in VLLM_API_KEY contains a character that is not allowed in a header.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        parts = urllib.parse.urlsplit(self.url)
        self._secure, self._path = parts.scheme == "https", parts.path
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._headers = json_headers("VLLM_API_KEY")
        self._sentinel: socket.socket | None = None
        self.process_count = 0
        """Number of calls of `start_restart_detection`; it differs before and after a restart."""

    def start_restart_detection(self) -> None:
        """Open the connection with which `restarted` detects the end of the server's process.

        Raises:
            ServerUnavailable: The server cannot be reached.
        """
        self.close()
        self.process_count += 1
        try:
            sentinel = socket.create_connection((self._host, self._port), self.timeout)
            sentinel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sentinel.setblocking(False)
            self._sentinel = sentinel
        except OSError as error:
            raise ServerUnavailable(f"{self.url}: {first_line(error)}") from error

    def restarted(self) -> bool:
        """Return whether the server's process may have ended since `start_restart_detection`.

        The operating system closes all connections of a process that ends, also if nothing is sent.
        A server that was restarted between two requests has its initial weights again.
        """
        sentinel = self._sentinel
        if sentinel is None:
            return True
        try:
            return sentinel.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def answers(self) -> bool:
        """Return whether the server answers within `PROBE_SECONDS` and within ``timeout``."""
        try:
            Client(self.url, timeout=min(self.timeout, PROBE_SECONDS)).get("/v1/models")
        except ServerUnavailable:
            return False
        return True

    def close(self) -> None:
        """Close the connection of `start_restart_detection`."""
        if self._sentinel is not None:
            self._sentinel.close()
            self._sentinel = None

    def get(self, path: str) -> Any:
        """Send a GET request and return the JSON of the response; see `post`."""
        return self._request("GET", path, None, None)

    def post(self, path: str, body: Any = None, *, cancel: Cancellation | None = None) -> Any:
        """Send a POST request.

        Args:
            path: Path, such as ``/v1/completions``.
            body: JSON of the request.
            cancel: Cancels the request from another thread.

        Returns:
            JSON of the response, its text if it is not JSON, or None if it is empty.

        Raises:
            ServerUnavailable: The request may succeed later, or it was canceled.
            ServerRefusal: The server refuses the request.
            UserError: The response is too large.
        """
        return self._request("POST", path, body, cancel)

    def _request(self, method: str, path: str, body: Any, cancel: Cancellation | None) -> Any:
        kind = http.client.HTTPConnection
        settings: dict[str, Any] = {"timeout": self.timeout}
        if self._secure:
            kind, settings["context"] = http.client.HTTPSConnection, ssl.create_default_context()
        connection = connection_with_deadline(kind, self._host, port=self._port, **settings)
        try:
            connection.connect()
            if cancel is not None:
                cancel.attach(connection)
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, content, self._headers)
            response = connection.getresponse()
            text = read_body(response, max_bytes=MAX_BODY).decode(errors="replace")
        except ResponseTooLarge as error:
            raise UserError(f"{self.url}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = first_line(error) or type(error).__name__
            raise ServerUnavailable(f"{self.url}: {reason}") from error
        finally:
            if cancel is not None:
                cancel.attach(None)
            connection.close()
        if response.status in _UNAVAILABLE_STATUS or response.status >= 500:
            raise ServerUnavailable(_failure_text(self.url + path, response.status, text))
        if response.status != 200:
            failure = _failure_text(self.url + path, response.status, text)
            raise ServerRefusal(failure, response.status)
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text


def _failure_text(address: str, status: int, text: str) -> str:
    """Return the address, the status and the message of an error response, in one line."""
    try:
        body = json.loads(text)
        body = body.get("error", body)
        text = str(body.get("message", body))
    except (ValueError, AttributeError):
        pass
    message = " ".join(text.split())[:300]
    return f"{address}: status {status}" + (f", {message}" if message else "")
