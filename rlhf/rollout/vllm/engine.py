"""``RolloutEngine`` that samples on one or more vLLM servers.

Each request is one HTTP request in a thread. If a server does not answer, or restarted, its reply
is discarded, and the request is repeated on the next server. A server that restarted loads the
current weights first. A request has therefore exactly one completion, which was sampled by the
current weights.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.engine import EngineSpec
from rlhf.errors import UserError
from rlhf.rollout.sampling.base import Completion, EngineStopped, FinishReason, Request
from rlhf.rollout.vllm.client import Cancellation, Client, ServerRefusal, ServerUnavailable
from rlhf.rollout.vllm.weights import (
    ServedPolicy,
    WeightPublisher,
    completion_request_body,
    read_completion,
)

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""Maximum time of a `poll` in which no completion ends."""
_RETRY_INTERVAL = 1.0
"""Time between two attempts of a request, in seconds."""


class VLLMEngine:
    """``RolloutEngine`` that samples on vLLM servers.

    Args:
        model: The policy's model.
        spec: Settings of the engine.
        folder: Folder for the published weights.
        context: Context length of the model, in tokens.
        temperature: Sampling temperature of the rollouts.
        max_requests: Maximum number of concurrent requests.
    """

    def __init__(
        self,
        model: Any,
        spec: EngineSpec,
        *,
        folder: Path,
        context: int,
        temperature: float,
        max_requests: int,
    ) -> None:
        self.spec, self.policy_version = spec, 0
        self.publisher = WeightPublisher(
            model, folder, context_length=context, temperature=temperature
        )
        clients = [Client(url, timeout=spec.request_timeout) for url in spec.urls]
        self.servers = [
            ServedPolicy(client, self.publisher, tolerance=spec.tolerance) for client in clients
        ]
        self._lost: set[int] = set()
        """Indices of the servers without which the run continues, because they do not answer."""
        self._slow: set[int] = set()
        """Indices of the servers that have exceeded ``request_timeout`` since the last update."""
        self._repeated = 0
        self._locks = [threading.Lock() for _ in clients]
        self._pool = ThreadPoolExecutor(max_requests, thread_name_prefix="vllm")
        self._results: queue.SimpleQueue[tuple[Request, Completion | Exception]] = (
            queue.SimpleQueue()
        )
        self._pending: dict[int, tuple[Request, Cancellation]] = {}  # by request id
        self._failure: Exception | None = None
        self._running = 0
        self._idle = threading.Condition()

    @property
    def max_mean_logprob_difference(self) -> float:
        """Largest mean log-probability gap of the used servers in their last check, in nats."""
        used = (server for index, server in enumerate(self.servers) if index not in self._lost)
        return max(server.logprob_gap for server in used)

    def pop_failed_attempt_count(self) -> int:
        """Return the number of failed attempts since the last call."""
        with self._idle:
            count, self._repeated = self._repeated, 0
        return count

    def update_policy(self, version: int) -> None:
        """Publish the policy's current weights, load them into all servers and check them.

        If the engine has the weights of this version already, only servers that do not use them,
        for example after a restart, load them. At the first call, every server must answer, because
        an address can be wrong. Later, the run continues without a server that does not answer for
        ``retry_seconds``, and uses it again after the first update at which it answers.

        Args:
            version: Number of completed training steps, after which the policy has these weights.

        Raises:
            RuntimeError: ``reset`` was not called. Requests of the old weights could be running.
            EngineStopped: No server answers or, at the first call, one of them does not.
            UserError: A server does not serve the new weights.
        """
        if self._pending:
            raise RuntimeError("reset the engine before the policy is updated")
        previous = self.publisher.current
        if previous is None or version != self.policy_version:
            self.publisher.publish()
            self.policy_version = version
        self._slow.clear()
        try:
            self._retry_while_unavailable(self._load_into_all_servers, Cancellation())
        except EngineStopped:
            answering = {i for i, server in enumerate(self.servers) if server.is_current}
            if previous is None or not answering:
                raise
            self._lost = set(range(len(self.servers))) - answering
            log.warning(
                "%s: no answer within %g s; the run continues with the other servers",
                ", ".join(self.servers[index].client.url for index in sorted(self._lost)),
                self.spec.retry_seconds,
            )
        finally:
            if previous is not None and previous is not self.publisher.current:
                self.publisher.remove(previous)

    def _load_into_all_servers(self) -> None:
        """Load the current weights into every server that does not use them yet.

        Raises:
            ServerUnavailable: A server that is not lost already does not answer. The other servers
                have the weights.
        """
        failure = None
        for index, server in enumerate(self.servers):
            # Without this test, a machine that is switched off would cost the time limit of a
            # request in every step.
            if index in self._lost and not server.client.answers():
                continue
            try:
                self._ensure_current_weights(index)
                self._lost.discard(index)
            except ServerUnavailable as error:
                if index not in self._lost:
                    failure = failure or error
        if failure is not None:
            raise failure

    def submit(self, requests: Sequence[Request]) -> None:
        """Start requests.

        Raises:
            RuntimeError: ``update_policy`` was not called.
        """
        if self.publisher.current is None:
            raise RuntimeError("update_policy must be called before the first request")
        for request in requests:
            cancel = Cancellation()
            self._pending[request.request_id] = (request, cancel)
            with self._idle:
                self._running += 1
            self._pool.submit(self._sample_and_queue_result, request, cancel)

    def poll(self) -> list[Completion]:
        """Wait for a short time until a completion ends; return the completions that ended.

        Raises:
            EngineStopped: The servers did not answer for ``retry_seconds``.
            UserError: A server refused a request, or its response is invalid.
        """
        self._raise_pending_failure()
        if not self._pending:
            return []
        results = []
        try:
            results.append(self._results.get(timeout=_POLL_SECONDS))
            while True:
                results.append(self._results.get_nowait())
        except queue.Empty:
            pass
        completions = []
        for request, result in results:
            if self._pending.pop(request.request_id, None) is None:
                continue  # canceled
            if not isinstance(result, Exception):
                completions.append(result)
            elif self._failure is None:
                self._failure = result
        if not completions:  # otherwise, the next call raises the failure, so that none is lost
            self._raise_pending_failure()
        return completions

    def _raise_pending_failure(self) -> None:
        """Raise the first error of a request that was not raised yet."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def release(self, episode_id: int) -> None:
        """Cancel the unfinished request of an episode, if there is one."""
        for request, cancel in list(self._pending.values()):
            if request.episode_id == episode_id:
                cancel.cancel()
                del self._pending[request.request_id]

    def reset(self) -> None:
        """Cancel all requests, and wait until their threads have ended."""
        for _, cancel in self._pending.values():
            cancel.cancel()
        self._pending.clear()
        self._failure = None
        with self._idle:
            self._idle.wait_for(lambda: not self._running)
        while not self._results.empty():
            self._results.get_nowait()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step."""
        return {
            "engine/logprob_gap": self.max_mean_logprob_difference,
            "engine/repeated": float(self.pop_failed_attempt_count()),
        }

    def close(self) -> None:
        """Cancel all requests, unload adapters, close connections, delete the published weights."""
        self.reset()
        self._pool.shutdown()
        for server in self.servers:
            server.unload()
            server.client.close()
        if self.publisher.current is not None:
            self.publisher.remove(self.publisher.current)

    def _sample_and_queue_result(self, request: Request, cancel: Cancellation) -> None:
        """Sample a completion, in a thread, and queue it, or the exception of the request."""
        count, episode = len(self.servers), request.episode_id
        # An episode stays with its server's cache. A lost or slow server is tried last.
        last = self._lost | self._slow
        order = sorted(range(count), key=lambda i: (i in last, (i - episode) % count))
        servers = itertools.cycle(order)
        result: Completion | Exception
        try:
            result = self._retry_while_unavailable(
                lambda: self._sample(request, next(servers), cancel), cancel
            )
        except Exception as error:
            result = error
        self._results.put((request, result))
        with self._idle:
            self._running -= 1
            self._idle.notify_all()

    def _retry_while_unavailable(self, attempt: Any, cancel: Cancellation) -> Any:
        """Call ``attempt`` until it does not raise `ServerUnavailable`, and return its result.

        Raises:
            EngineStopped: It raised `ServerUnavailable` for ``retry_seconds``.
            ServerUnavailable: The request was canceled.
        """
        first_failure = None
        while True:
            try:
                return attempt()
            except ServerUnavailable as error:
                now = time.monotonic()
                if cancel.canceled:
                    raise
                if first_failure is None:
                    log.warning("%s; repeating the request", error)
                    first_failure = now
                if now - first_failure >= self.spec.retry_seconds:
                    raise EngineStopped(
                        f"{error}; no answer within {self.spec.retry_seconds:g} s "
                        "(rollout.engine.retry_seconds); restart the server, then continue the "
                        "run with --resume"
                    ) from error
                with self._idle:
                    self._repeated += 1
                time.sleep(min(_RETRY_INTERVAL, self.spec.retry_seconds / 4))

    def _ensure_current_weights(self, server_index: int) -> tuple[int, str]:
        """Load the current weights into a server, unless it uses them already.

        Returns:
            The ``process_count`` of the server's client, and the name of the policy in requests.
        """
        server = self.servers[server_index]
        with self._locks[server_index]:
            if not server.is_current:
                server.load()
            return server.client.process_count, server.model_name

    def _sample(self, request: Request, server_index: int, cancel: Cancellation) -> Completion:
        """Sample a completion on a server.

        Raises:
            ServerUnavailable: The server does not answer, or it restarted, so its weights may be
                the initial ones.
            UserError: The server refused the request, or its response is invalid.
        """
        server, version = self.servers[server_index], self.policy_version
        if cancel.canceled:
            raise ServerUnavailable("the request was canceled")
        process, name = self._ensure_current_weights(server_index)
        sampling = request.sampling
        body = completion_request_body(
            name,
            list(request.prompt_ids),
            max_tokens=request.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_ids=sampling.stop_ids,
            seed=request_seed(request.seed),
        )
        start = time.monotonic()
        try:
            answer = server.client.post("/v1/completions", body, cancel=cancel)
        except ServerUnavailable:
            if time.monotonic() - start >= server.client.timeout:
                self._slow.add(server_index)
            raise
        except ServerRefusal as error:
            if error.status == 404 or server.client.restarted():  # the adapter was lost
                with self._locks[server_index]:
                    server.mark_not_loaded()
                raise ServerUnavailable(str(error)) from error
            raise
        if server.client.restarted() or server.client.process_count != process:
            raise ServerUnavailable(f"{server.client.url}: the server restarted")
        tokens, logprobs = read_completion(
            answer,
            server.client.url,
            list(request.prompt_ids),
            request.max_new_tokens,
            self.publisher.vocab_size,
        )
        stopped = tokens[-1] in sampling.stop_ids
        inner = any(token in sampling.stop_ids for token in tokens[:-1])
        full = len(tokens) == request.max_new_tokens
        if inner or not (stopped or full):
            raise UserError(
                f"{server.client.url} returned a completion that does not end at its first stop "
                f"token or at {request.max_new_tokens} tokens"
            )
        finish = FinishReason.STOP if stopped else FinishReason.LENGTH
        return Completion(request, tokens, logprobs, finish, version)


def request_seed(seed: tuple[int, ...]) -> int:
    """Return the seed of a request in [0, 2**63), derived from the seed of the completion."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
