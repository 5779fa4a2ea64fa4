"""A server that sends single bytes of a response without end."""

import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

DRIPS = {
    "status line": (b"", b"H"),
    "one header": (OK, b"a"),
    "short headers": (OK, b"A: b\r\n"),
    "body": (OK + b"\r\n", b" "),
    "size of a chunk": (OK + CHUNKED, b"0"),
    "chunks": (OK + CHUNKED, b"1\r\n \r\n"),
    "trailer": (OK + CHUNKED + b"0\r\n", b"A: b\r\n"),
}
"""Part of a response -> the bytes before it, and the bytes that are repeated."""


@contextlib.contextmanager
def dripping_server(part: str) -> Iterator[tuple[str, list[threading.Event]]]:
    """Run a server that sends a part of a response byte by byte, every 20 ms.

    Yields:
        The address, and one event for each connection, which is set when the client closes it.
    """
    start, drip = DRIPS[part]
    connections: list[threading.Event] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            closed = threading.Event()
            connections.append(closed)
            with contextlib.suppress(OSError):
                self.wfile.write(start)
                while True:
                    self.wfile.write(drip)
                    time.sleep(0.02)
            closed.set()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as instance:
        instance.daemon_threads = True
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_address[1]}", connections
        instance.shutdown()
