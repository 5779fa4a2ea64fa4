"""A server that answers the requests of `huggingface_hub` for checks and uploads."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class HubState:
    """What the server has received."""

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""
    tokens: set[str | None] = field(default_factory=set)
    """Authorization headers of the requests, except those that check a card."""
    checked: list[dict[str, str]] = field(default_factory=list)
    """Bodies of the requests that check a card."""
    created: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests that create a repository."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content of the committed small files."""
    large: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content of the uploaded large files."""
    large_paths: dict[str, str] = field(default_factory=dict)
    """Path -> SHA-256 of the committed large files."""
    reject: str = ""
    """Reason with which cards are rejected; "" to accept them."""
    status: int = 200
    """Status of the answer to the creation of a repository."""


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.state.requests.append(("GET", self.path))
        self._send(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        state: HubState = self.server.state
        state.requests.append(("PUT", self.path))
        state.large[self.path.rpartition("/")[2]] = self._body()
        self._send(200, {})

    def do_POST(self) -> None:
        state: HubState = self.server.state
        body = self._body()
        path = self.path.partition("?")[0]
        state.requests.append(("POST", path))
        if path == "/api/validate-yaml":
            state.checked.append(json.loads(body))
            if state.reject:
                self._send(400, state.reject)
            else:
                self._send(200, {"errors": [], "warnings": []})
            return
        state.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            state.created.append(json.loads(body))
            created = {"url": f"{state.url}/owner/model"}
            self._send(state.status, created if state.status == 200 else {"error": "refused"})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{state.url}/upload/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif re.search("/commit/", path):
            self._commit(body)
            commit = {"commitUrl": f"{state.url}/owner/model/commit/abc", "commitOid": "abc"}
            self._send(200, commit)
        else:
            self._send(404, {"error": "not found"})

    def _commit(self, body: bytes) -> None:
        state: HubState = self.server.state
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                state.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                state.large_paths[value["path"]] = value["oid"]


@contextlib.contextmanager
def hub_server() -> Iterator[HubState]:
    """Run the server on a free port of this machine."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.state = HubState(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
