"""Run an ASGI application on a local address until a signal stops the process."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlencode

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from rlhf.errors import UserError
from rlhf.runs.interrupt import Interrupted, StopSignalRecorder

LOOPBACK_HOST = "127.0.0.1"
"""Address of this machine that no other machine can reach."""
GRACEFUL_SECONDS = 10.0
"""Default time limit of running requests after a signal, in seconds."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Listener:
    """A socket that listens on an address.

    Connections wait in the queue of the socket until the application is served, so the URL is valid
    at once.
    """

    socket: socket.socket
    host: str
    """The address as the user wrote it, such as ``127.0.0.1``, ``localhost`` or ``::1``."""
    port: int

    @property
    def authority(self) -> str:
        """Host and port as they are written in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, path: str = "/", *, token: str = "") -> str:
        """Return the URL of a path, with the token as a query parameter if one is given."""
        query = f"?{urlencode({'token': token})}" if token else ""
        return f"http://{self.authority}{path}{query}"


def is_loopback(host: str) -> bool:
    """Return whether a host is ``localhost`` or a loopback address; names are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_listener(host: str = LOOPBACK_HOST, port: int = 0) -> Listener:
    """Listen on an address.

    Args:
        host: Host name or address of a network interface of this machine. The caller decides
            whether other machines may reach the address (`is_loopback`).
        port: Number of the port; 0 chooses a free one.

    Raises:
        UserError: The address cannot be used, for example because the port is in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        is_port_refused = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        hint = "; --port 0 chooses a free port" if is_port_refused else ""
        raise UserError(f"cannot listen on {host}, port {port}: {reason}{hint}") from error
    return Listener(listening, host, listening.getsockname()[1])


def serve(
    app: ASGIApp,
    listener: Listener,
    *,
    stop_message_suffix: str = "",
    graceful_seconds: float = GRACEFUL_SECONDS,
    unread_seconds: float | None = None,
) -> None:
    """Serve an application until a signal (Ctrl-C, SIGTERM) ends it.

    After the first signal, no connection is accepted, and running requests are ended after
    ``graceful_seconds``. A second signal ends them at once.

    Args:
        app: The application, usually the result of `rlhf.web.security.secured`.
        listener: The socket, which is closed at the end.
        stop_message_suffix: Text that is added to the message after a signal, such as the path of
            the results.
        graceful_seconds: Time limit of running requests after a signal, in seconds; it is rounded
            to whole seconds, at least 1.
        unread_seconds: If a client does not read the sent data for this number of seconds, its
            connection is closed; None means no limit.

    Raises:
        Interrupted: A signal stopped the server. The message begins with ``stopped by`` and the
            name of the signal; `rlhf` ends with the exit code 128 plus the number of the signal.
    """
    server = _new_server(app, graceful_seconds, unread_seconds)
    with StopSignalRecorder() as recorder:
        # uvicorn installs its own handlers for SIGINT and SIGTERM. After its shutdown, it raises
        # the signal again, and the recorder records it.
        asyncio.run(_serve_until_stopped(server, listener, recorder))
    if recorder.number is not None:
        name = signal.Signals(recorder.number).name
        message = f"stopped by {name}" + (f"; {stop_message_suffix}" if stop_message_suffix else "")
        raise Interrupted(message, recorder.number)


async def _serve_until_stopped(
    server: uvicorn.Server, listener: Listener, recorder: StopSignalRecorder
) -> None:
    async def watch() -> None:
        while not recorder.requested:
            await asyncio.sleep(_POLL_SECONDS)
        server.should_exit = True

    watcher = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[listener.socket])
    finally:
        watcher.cancel()
        listener.socket.close()


def _protocol_with_unread_time_limit(unread_seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a time limit for clients that do not read.

    The connection of such a client is aborted, because closing it would wait for ever for the
    unsent data.
    """
    base: Any = AutoHTTPProtocol

    class LimitedProtocol(base):
        _timer: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(unread_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_timer()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_timer()
            super().connection_lost(exc)

        def _cancel_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

    return LimitedProtocol


class _Server(uvicorn.Server):
    """A server that does not wait for running requests after a second signal of any kind.

    By default, uvicorn does so only after a second SIGINT, and raises each signal again after the
    shutdown, so that the second one would end the process without a message.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            super().handle_exit(sig, frame)


def _new_server(
    app: ASGIApp, graceful_seconds: float, unread_seconds: float | None
) -> uvicorn.Server:
    """Return a server without an access log, because URLs can contain the token."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could forge its address with these headers
        ws="none",
        http="auto" if unread_seconds is None else _protocol_with_unread_time_limit(unread_seconds),
        timeout_graceful_shutdown=max(1, round(graceful_seconds)),
    )
    return _Server(config)
