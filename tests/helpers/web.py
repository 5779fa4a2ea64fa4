"""A command of the toolkit that serves a page, in a process of its own; a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from starlette.types import ASGIApp

from rlhf.web import server as web_server
from rlhf.web.server import GRACEFUL_SECONDS, Listener, open_listener

ROOT = Path(__file__).resolve().parents[2]


class ServedCommand:
    """A running `rlhf` command; `url` is the address that it printed, with its token.

    Attributes:
        url: First URL in the output.
        process: The process.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        printed = ""
        while not (found := re.search(r"http://\S+", printed)):
            line = self.process.stdout.readline()
            if not line:
                assert self.process.stderr is not None
                raise AssertionError(f"no URL: {printed}{self.process.stderr.read()}")
            printed += line
        watchdog.cancel()
        self.url = found[0]

    @property
    def base(self) -> str:
        """The URL without path and token."""
        return self.url.partition("/?")[0]

    @property
    def token(self) -> str:
        return self.url.partition("token=")[2]

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit code and what is written to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors

    def __enter__(self) -> ServedCommand:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=120)


@contextlib.contextmanager
def serve_in_thread(app: ASGIApp, *, unread_seconds: float | None = None) -> Iterator[Listener]:
    """Serve an application in a thread of this process."""
    listener = open_listener()
    server = web_server._new_server(app, GRACEFUL_SECONDS, unread_seconds)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener.socket])), daemon=True
    )
    thread.start()
    deadline = time.monotonic() + 30
    try:
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.started, "the server did not start"
        yield listener
    finally:
        server.should_exit = True
        thread.join()
        listener.socket.close()
