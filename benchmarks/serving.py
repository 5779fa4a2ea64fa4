"""Compare the throughput of `rlhf serve` with that of its engine.

    python -m benchmarks.serving [--model smollm2-135m-instruct] [--requests 64] [--tokens 128]

The engine samples the completions of all requests in this process. A server in another process then
answers the same requests, which a client sends at the same time over as many connections: once as
whole responses, and once as streams. This is repeated. Each rate is printed with the
number of cores that all programs of the machine used meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
def server(model_path: str, name: str, parallel: int) -> Iterator[str]:
    """Start a server; yield its address."""
    command = [sys.executable, "-m", "rlhf", "serve", "--port", "0", "--name", name]
    command += ["--model.path", model_path, "--model.dtype", "float32"]
    command += ["--rollout.parallel", str(parallel)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """Return the tokens per second of a run, and the number of cores that all programs used."""
    busy, began = machine_busy_seconds() or 0.0, time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - began
    return tokens / seconds, ((machine_busy_seconds() or 0.0) - busy) / seconds


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
    with server(options.model, name, options.requests) as url:
        for stream in (False, True):
            run = server_run(url, name, prompts, options.tokens, stream=stream)
            runs["server, streamed" if stream else "server"] = run
        rates: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(options.repeats):
            for kind, run in runs.items():
                rate, busy = timed(run)
                rates[kind].append(rate)
                print(f"{kind}: {rate:.0f} tokens/s ({busy:.2f} cores busy)", flush=True)
    engine = statistics.median(rates["engine"])
    for kind, values in rates.items():
        median = statistics.median(values)
        print(f"{kind}: median {median:.0f} tokens/s, {median / engine:.3f} of the engine")


if __name__ == "__main__":
    main()
