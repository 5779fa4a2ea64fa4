"""A small server with the routes of vLLM that the engine uses, and with vLLM's traps as options."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

CACHED_TOKENS = 16
"""Number of first tokens that select an entry of the prefix cache."""


@dataclass
class Traps:
    """Behavior of real servers that makes replies wrong."""

    raw_logprobs: bool = False
    """Log-probabilities before the division by the temperature."""
    stale_prefix_cache: bool = False
    """`/reset_prefix_cache` answers but does nothing."""
    busy_prefix_cache: int = 0
    """Number of calls of `/reset_prefix_cache` that fail, because requests use the cache."""
    ignore_reload: bool = False
    """`reload_weights` and `/v1/load_lora_adapter` answer but do nothing."""
    change_answer: Any = None
    """Function that changes the JSON of a completion."""
    statuses: list[int] = field(default_factory=list)
    """Status codes of the next completions, instead of an answer."""
    delay: float = 0.0
    """Seconds before a completion."""


class FakeVLLM:
    """Samples from the model in a folder, without a KV cache.

    The prefix cache is a table: prompts that start with known tokens are answered with the weights
    that were in use when the tokens were first seen under the name of the model.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder, self.port, self.traps = folder, port, Traps()
        self.requests: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.completed: list[Any] = []
        self._lock = threading.Lock()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process of the server: it has its initial weights and no adapters."""
        self.models: dict[str, Any] = {
            "policy": AutoModelForCausalLM.from_pretrained(self.folder).eval()
        }
        self.prefix_cache: dict[Any, Any] = {}
        self.connections: set[socket.socket] = set()
        self.server = _Server(("127.0.0.1", self.port), _handler(self))
        self.server.connections = self.connections
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """End the process: all connections are closed, and new ones are refused."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        self.kill()
        self.start()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of a response."""
        self.calls[path] += 1
        with self._lock:
            if path == "/v1/models":
                rows = [
                    {"id": n} | ({} if n == "policy" else {"parent": "policy"}) for n in self.models
                ]
                return 200, {"data": rows}
            if path == "/v1/load_lora_adapter":
                return self._load_adapter(**body)
            if path == "/v1/unload_lora_adapter":
                known = self.models.pop(body["lora_name"], None)
                return (
                    (200, "Success") if known is not None else (404, {"error": {"message": "no"}})
                )
            if path == "/collective_rpc":
                if not self.traps.ignore_reload:
                    folder = body["kwargs"]["weights_path"]
                    self.models["policy"] = AutoModelForCausalLM.from_pretrained(folder).eval()
                return 200, {"results": [None]}
            if path == "/reset_prefix_cache":
                if self.traps.busy_prefix_cache:
                    self.traps.busy_prefix_cache -= 1
                    return 200, {"success": False}
                if not self.traps.stale_prefix_cache:
                    self.prefix_cache.clear()
                return 200, {"success": True}
        if path == "/v1/completions":
            return self._complete(body)
        return 404, {"error": {"message": f"no route {path}"}}

    def _load_adapter(self, lora_name: str, lora_path: str) -> tuple[int, Any]:
        if lora_name in self.models:
            return 400, {"error": {"message": f"{lora_name} has already been loaded"}}
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        if self.traps.ignore_reload:
            self.models[lora_name] = base.eval()
        else:
            self.models[lora_name] = PeftModel.from_pretrained(base, lora_path).eval()
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(self.traps.delay)
        with self._lock:
            self.requests.append(body)
            if self.traps.statuses:
                status = self.traps.statuses.pop(0)
                return status, {"error": {"message": "failure requested by the test"}}
            model = self.models.get(body["model"])
            if model is None:
                return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
            prompt = body["prompt"]
            choice: dict[str, Any] = {"index": 0, "prompt_token_ids": prompt}
            if "prompt_logprobs" in body:  # as in vLLM, such a request does not use the cache
                choice["prompt_logprobs"] = _prompt_logprobs(model, prompt)
            else:
                key = (body["model"], tuple(prompt[:CACHED_TOKENS]))
                model = self.prefix_cache.setdefault(key, model)
            tokens, logprobs, reason = self._sample(model, body)
            choice |= {"token_ids": tokens, "finish_reason": reason}
            choice["logprobs"] = {"token_logprobs": logprobs}
            if self.traps.change_answer:
                self.traps.change_answer(choice)
            self.completed.append(body)
            return 200, {"choices": [choice]}

    @torch.no_grad()
    def _sample(self, model: Any, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body["seed"])
        tokens: list[int] = []
        logprobs: list[float] = []
        temperature = body["temperature"]
        while len(tokens) < body["max_tokens"]:
            logits = model(input_ids=torch.tensor([body["prompt"] + tokens])).logits[0, -1].double()
            scaled = logits / (temperature or 1.0)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
            shown = logits if self.traps.raw_logprobs else scaled
            tokens.append(token)
            logprobs.append(float(shown.log_softmax(-1)[token]))
            if token in body["stop_token_ids"]:
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"


@torch.no_grad()
def _prompt_logprobs(model: Any, prompt: list[int]) -> list[Any]:
    rows = model(input_ids=torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    known = [{str(t): {"logprob": float(row[t])}} for row, t in zip(rows, prompt[1:], strict=False)]
    return [None, *known]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64
    connections: set[socket.socket]

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A closed connection is no error."""


def _handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(*fake.answer(self.path, None))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._reply(*fake.answer(self.path, json.loads(content) if content else None))

        def _reply(self, status: int, body: Any) -> None:
            content = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    return Handler


def main() -> None:
    """Serve like ``python -m vllm.entrypoints.openai.api_server``; write the arguments as JSON."""
    arguments = sys.argv[1:]
    if arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        arguments = arguments[2:]
    folder = Path(arguments[arguments.index("--model") + 1])
    names = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    environment = {name: os.environ.get(name) for name in names}
    (folder.parent / "call.json").write_text(json.dumps([arguments, environment]))
    if "--fail" in arguments:
        sys.exit("no memory")
    FakeVLLM(folder, port=int(arguments[arguments.index("--port") + 1]))
    threading.Event().wait()


if __name__ == "__main__":
    main()
