"""Protect a local server: host and origin checks, a token, size limits and security headers.

A page of another site can send requests to a server on this machine. If the host name of the site
resolves to this machine (DNS rebinding), the scripts of the page can also read the responses. The
checks of the ``Host`` and ``Origin`` headers and of the token refuse such requests.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Collection, Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine in the ``Host`` header of a request to a loopback address."""
MAX_BODY_BYTES = 4 * 2**20
"""Default size limit of the body of a request."""
MAX_BODY_SECONDS = 30.0
"""Time in which a client has to send the body of a request, in seconds."""

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Default headers of every response. A page can load scripts and styles only from the server. A
page sends data with `fetch`, because with this referrer policy a browser sends a form with origin
null."""

BuildRefusal = Callable[[int, str], Response]
"""Function that builds the response of a refused request from its status and its reason."""


def new_token() -> str:
    """Return a random token of 256 bits that can be part of a URL."""
    return secrets.token_urlsafe(32)


def plain_refusal(status: int, reason: str) -> Response:
    """Return a refusal as plain text."""
    return PlainTextResponse(reason + "\n", status)


def secured(
    app: ASGIApp,
    *,
    token: str = "",
    allowed_hosts: Collection[str] | None = LOOPBACK_NAMES,
    open_paths: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    headers: Mapping[str, str] = PAGE_HEADERS,
    refusal: BuildRefusal = plain_refusal,
) -> ASGIApp:
    """Return an application that checks each request before ``app`` is called.

    Requests from other sites, requests without the token, and requests whose body is too large or
    takes too long are refused.

    Args:
        app: The application.
        token: Secret of this server, see `new_token`. A request contains it in the query parameter
            ``token`` of a GET request, in the cookie that this parameter sets, or in the header
            ``Authorization: Bearer TOKEN``. If it is "", requests need no token.
        allowed_hosts: Names, without the port, that the ``Host`` header may have. None allows all
            names, for a server with a token that other machines can reach.
        open_paths: Paths that need no token, such as ``/health``.
        max_body_bytes: Maximum size of the body of a request, in bytes.
        headers: Headers that are added to every response.
        refusal: Builds the response of a refused request.
    """
    app = _BodyLimit(app, max_body_bytes, refusal)
    if token:
        app = _TokenCheck(app, token, frozenset(open_paths), refusal)
    return _AddHeaders(_OriginCheck(app, allowed_hosts, refusal), headers)


class _AddHeaders:
    """Adds headers to every response; refuses WebSocket connections."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app, self._headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send_with_headers)


class _OriginCheck:
    """Refuses requests to other host names, and requests from pages of other origins."""

    def __init__(
        self, app: ASGIApp, allowed_hosts: Collection[str] | None, refusal: BuildRefusal
    ) -> None:
        self._app, self._allowed, self._refusal = app, allowed_hosts, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._refusal_reason(Headers(scope=scope))):
            await self._refusal(403, reason)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal_reason(self, headers: Headers) -> str:
        """Return why a request is refused, or "" if it is allowed."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return "unknown host"
        if self._allowed is not None and _host_name(hosts[0]) not in self._allowed:
            return "unknown host"
        if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
            return "foreign origin"
        # Browsers send no Origin header with many GET requests, but they send Sec-Fetch-Site.
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "foreign origin"
        return ""


class _TokenCheck:
    """Refuses requests without the token; moves the token from a URL to a cookie."""

    def __init__(
        self, app: ASGIApp, token: str, open_paths: frozenset[str], refusal: BuildRefusal
    ) -> None:
        self._app, self._token = app, token.encode()
        self._open_paths, self._refusal = open_paths, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if tokens and scope["method"] == "GET" and self._is_token(tokens[-1]):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            await self._response_with_cookie(scope, rest)(scope, receive, send)
        elif self._is_authorized(scope):
            await self._app(scope, receive, send)
        else:
            await self._refusal(401, "missing or wrong token")(scope, receive, send)

    def _is_token(self, value: str) -> bool:
        return hmac.compare_digest(value.encode(errors="replace"), self._token)

    def _is_authorized(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(value.strip()):
            return True
        cookies = cookie_parser(headers.get("cookie", ""))
        return self._is_token(cookies.get(_cookie_name(scope), ""))

    def _response_with_cookie(self, scope: Scope, query: str) -> Response:
        """Return a redirect to the same page without the token, and set the token as a cookie.

        The browser then neither shows nor stores the token in the address of the page.
        """
        # A location that starts with two slashes would redirect to another host.
        path = "/" + scope["path"].lstrip("/")
        response = RedirectResponse(path + (f"?{query}" if query else ""), 303)
        response.set_cookie(
            _cookie_name(scope), self._token.decode(), httponly=True, samesite="strict"
        )
        return response


class _BodyLimit:
    """Refuses requests whose body exceeds the size limit or the time limit.

    The limits also apply without a ``Content-Length`` header. The body is read before the
    application is called, so that the application cannot have started a response.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, refusal: BuildRefusal) -> None:
        self._app, self._max_bytes, self._refusal = app, max_bytes, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not _is_content_length_at_most(length, self._max_bytes):
            await self._refuse_too_large_body(scope, receive, send)
            return
        try:
            async with asyncio.timeout(MAX_BODY_SECONDS):
                body = await self._read_body(receive)
        except TimeoutError:
            reason = f"the body was not complete after {MAX_BODY_SECONDS:.0f} seconds"
            await self._refusal(408, reason)(scope, receive, send)
            return
        except asyncio.CancelledError:  # the time limit of the shutdown has passed
            await self._refusal(503, "the server stops")(scope, receive, send)
            return
        if body is None:  # the client has closed the connection
            return
        if len(body) > self._max_bytes:
            await self._refuse_too_large_body(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        await self._app(scope, receive_whole, send)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body, or its start if it is too large; None if the client disconnects."""
        body = bytearray()
        more = True
        while more and len(body) <= self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)

    async def _refuse_too_large_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = f"the request is larger than {self._max_bytes} bytes"
        await self._refusal(413, reason)(scope, receive, send)


def _is_content_length_at_most(content_length: str, max_bytes: int) -> bool:
    """Return whether the value of a ``Content-Length`` header is at most ``max_bytes``."""
    return (
        content_length.isdecimal()
        and len(content_length) <= 18
        and int(content_length) <= max_bytes
    )


def _host_name(host_header: str) -> str:
    """Return the host name in a ``Host`` header, or "" if the header is malformed."""
    try:
        parts = urlsplit(f"//{host_header}")
        return (
            (parts.hostname or "") if parts.netloc == host_header and "@" not in host_header else ""
        )
    except ValueError:
        return ""


def _cookie_name(scope: Scope) -> str:
    """Return a cookie name with the port, because all ports of a host share their cookies."""
    return f"rlhf-token-{(scope.get('server') or ('', 0))[1]}"
