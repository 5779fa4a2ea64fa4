"""HTTP requests with a time limit for the whole response and a size limit for its body."""

from __future__ import annotations

import functools
import http.client
import io
import os
import socket
import ssl
import time
import urllib.request
from typing import Any

from rlhf.errors import UserError


class ResponseTooLarge(ValueError):
    """The body of a response exceeds the limit of its size."""


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline.

    The timeout of a socket limits only the wait for the next bytes, so a server that sends single
    bytes could keep the connection open without end.
    """

    def __init__(self, reader: io.RawIOBase, connection: socket.socket, deadline: float) -> None:
        self._reader, self._connection, self._deadline = reader, connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(max(self._deadline - time.monotonic(), 1e-6))
        return self._reader.readinto(buffer)

    def close(self) -> None:
        self._reader.close()
        super().close()


class _DeadlineResponse(http.client.HTTPResponse):
    """Response whose headers and body are read until a deadline."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock, deadline))


def connection_with_deadline(
    connection_class: type[http.client.HTTPConnection], host: str, **options: Any
) -> http.client.HTTPConnection:
    """Return a connection whose ``timeout`` limits the time from now to the end of the response.

    Args:
        connection_class: `HTTPConnection` or `HTTPSConnection`.
        host: Name of the server, optionally with a port.
        options: Options of the class; ``timeout``, in seconds, is required.
    """
    connection = connection_class(host, **options)
    deadline = time.monotonic() + options["timeout"]
    limited = functools.partial(_DeadlineResponse, deadline=deadline)
    connection.response_class = limited  # type: ignore[assignment]
    return connection


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: the request to the new address would contain the API key."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _DeadlineHTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        opening = functools.partial(connection_with_deadline, http.client.HTTPConnection)
        return self.do_open(opening, req)  # type: ignore[arg-type]


class _DeadlineHTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self.context = ssl.create_default_context()
        super().__init__(context=self.context)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        opening = functools.partial(connection_with_deadline, http.client.HTTPSConnection)
        return self.do_open(opening, req, context=self.context)  # type: ignore[arg-type]


def deadline_opener_without_redirects() -> urllib.request.OpenerDirector:
    """Return an opener that follows no redirects.

    It uses the proxies of the environment. The timeout of a request limits the time until the end
    of the response.
    """
    return urllib.request.build_opener(_NoRedirects, _DeadlineHTTPHandler, _DeadlineHTTPSHandler)


def read_body(response: Any, *, max_bytes: int) -> bytes:
    """Return the body of an HTTP response.

    Raises:
        ResponseTooLarge: The body is larger than ``max_bytes``.
        TimeoutError: The time limit of the connection is reached.
    """
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise ResponseTooLarge(f"the response is larger than {max_bytes} bytes")
    return bytes(body)


def json_headers(api_key_variable: str) -> dict[str, str]:
    """Return the headers of a JSON request.

    If the environment variable ``api_key_variable`` is set, they contain its value as API key.

    Raises:
        UserError: The key contains a character that is not allowed in an HTTP header.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(api_key_variable, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"{api_key_variable} contains a character that is not allowed in an HTTP header"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers
