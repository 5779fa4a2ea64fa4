"""Compare the throughput of `rlhf serve` with that of its engine.

    python -m benchmarks.serving [--model smollm2-135m-instruct] [--requests 64] [--tokens 128]

The engine samples the completions of all requests in this process. A server in another process then
answers the same requests, which a client sends at the same time over as many connections: once as
whole responses, and once as streams. This is repeated. The processor time per token of the process
that samples is printed too, because other programs disturb it less than the rate. The number of
cores that other processes, such as the client, used meanwhile is also printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.system_load import machine_busy_seconds
from benchmarks.texts import random_words
from rlhf.config.model import ModelSpec

PROMPT_WORDS = 32


def prompts_of(count: int) -> list[str]:
    """Return different prompts of about the same number of tokens."""
    return [random_words(PROMPT_WORDS, random.Random(seed)) for seed in range(count)]


def engine_run(model_path: str, prompts: Sequence[str], tokens: int) -> Callable[[], int]:
    """Return a function that samples all completions with the engine and returns their tokens."""
    from rlhf.models.loading import load_model
    from rlhf.rollout.sampling.base import Request, SamplingParams
    from rlhf.rollout.sampling.continuous import ContinuousEngine

    model, tokenizer = load_model(ModelSpec(path=model_path, dtype="float32"), seed=0)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]

    def run() -> int:
        engine = ContinuousEngine(model, max_rows=len(ids))
        engine.submit(
            [Request(i, row, tokens, (i,), SamplingParams()) for i, row in enumerate(ids)]
        )
        done = sampled = 0
        while done < len(ids):
            for completion in engine.poll():
                done += 1
                sampled += len(completion.tokens)
        return sampled

    return run


async def completion_tokens(url: str, body: dict[str, Any]) -> int:
    """Send one request; return the number of completion tokens in the response."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    content = json.dumps(body).encode()
    head = f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    response = await reader.read()
    writer.close()
    if not response.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(response[:500].decode(errors="replace"))
    return int(re.findall(rb'"completion_tokens": ?(\d+)', response)[-1])


def server_run(
    url: str, name: str, prompts: Sequence[str], tokens: int, *, stream: bool
) -> Callable[[], int]:
    """Return a function that sends all requests at once and returns the number of tokens."""
    body: dict[str, Any] = {"model": name, "max_tokens": tokens, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}

    async def send_all() -> int:
        requests = [
            completion_tokens(url, {**body, "prompt": prompt, "seed": seed})
            for seed, prompt in enumerate(prompts)
        ]
        return sum(await asyncio.gather(*requests))

    return lambda: asyncio.run(send_all())


@contextlib.contextmanager
def server(model_path: str, name: str, parallel: int) -> Iterator[tuple[str, int]]:
    """Start a server; yield its address and its process id."""
    command = [sys.executable, "-m", "rlhf", "serve", "--port", "0", "--name", name]
    command += ["--model.path", model_path, "--model.dtype", "float32"]
    command += ["--rollout.parallel", str(parallel)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], process.pid
        finally:
            process.terminate()


def processor_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(run: Callable[[], int], pid: int) -> dict[str, float]:
    """Return the rate of a run, its processor time per token, and the load of the machine.

    Args:
        run: Samples completions and returns the number of their tokens.
        pid: The process that samples.
    """
    before, busy, began = processor_seconds(pid), machine_busy_seconds() or 0.0, time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - began
    own = processor_seconds(pid) - before
    others = (machine_busy_seconds() or 0.0) - busy - own
    return {
        "tokens/s": tokens / seconds,
        "ms of processor time per token": 1000 * own / tokens,
        "cores of other processes": others / seconds,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    prompts, name = prompts_of(options.requests), "served"
    runs = {"engine": engine_run(options.model, prompts, options.tokens)}
    with server(options.model, name, options.requests) as (url, pid):
        for stream in (False, True):
            run = server_run(url, name, prompts, options.tokens, stream=stream)
            runs["server, streamed" if stream else "server"] = run
        rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in runs}
        for _ in range(options.repeats):
            for kind, run in runs.items():
                row = measure(run, os.getpid() if kind == "engine" else pid)
                rows[kind].append(row)
                numbers = ", ".join(f"{value:.2f} {name}" for name, value in row.items())
                print(f"{kind}: {numbers}", flush=True)

    def median(kind: str, name: str) -> float:
        return statistics.median(row[name] for row in rows[kind])

    rate, cost = "tokens/s", "ms of processor time per token"
    for kind in rows:
        print(
            f"{kind}: {median(kind, rate) / median('engine', rate):.3f} of the engine's rate, "
            f"{median('engine', cost) / median(kind, cost):.3f} by processor time"
        )


if __name__ == "__main__":
    main()
