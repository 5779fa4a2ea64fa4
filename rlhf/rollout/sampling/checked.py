"""`CheckedEngine`, which names the mistakes of a rollout engine outside the toolkit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from rlhf.common import user_code
from rlhf.common.foreign import describe_exception
from rlhf.common.guards import is_mapping
from rlhf.common.numbers import is_number
from rlhf.common.user_code import check_accepts_arguments, definition_location_text, guarded_call
from rlhf.errors import UserError
from rlhf.rollout.sampling.base import Completion, EngineBase, FinishReason, Request

log = logging.getLogger(__name__)

_ADVICE = "submit returns immediately, and poll returns the completions that are ready"
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "update_policy": ("version",),
    "submit": ("requests",),
    "poll": (),
    "release": ("episode_id",),
    "reset": (),
    "metrics": (),
    "close": (),
}
"""Method of an engine -> its arguments."""
_EMPTY_POLL_SECONDS = 0.001
"""Pause after a poll without a completion, because the collector polls again at once."""


class CheckedEngine(EngineBase):
    """Calls an engine outside the toolkit, and checks what it returns.

    Args:
        engine: The engine.
        what: What the engine is, for messages.
        vocabulary: Number of token ids of the model.
        max_staleness: ``rollout.max_staleness``, the largest difference between the version of
            `update_policy` and that of a completion.

    Raises:
        UserError: A method of the engine has other arguments.
    """

    def __init__(self, engine: Any, *, what: str, vocabulary: int, max_staleness: int = 0) -> None:
        self.engine, self.what, self.vocabulary = engine, what, vocabulary
        self.max_staleness = max_staleness
        self._version = 0
        """Version of the last `update_policy`."""
        self._last_completion = math.inf
        """Time of the last completion or request."""
        self._requested: set[int] = set()
        """Ids of the requests without a completion."""
        for name, arguments in _ARGUMENTS.items():
            check_accepts_arguments(
                getattr(engine, name),
                arguments,
                what=f"{what}: {name}",
                required_signature=f"{name}({', '.join(('self', *arguments))})",
            )

    @property
    def policy_version(self) -> int:  # type: ignore[override]
        """Version of the weights that the engine uses."""
        return self.engine.policy_version

    def update_policy(self, version: int) -> None:
        """Use the current weights of the policy from now on."""
        self._call("update_policy", version)
        self._version = version

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self._last_completion = time.monotonic()
        self._requested |= {request.request_id for request in requests}
        self._call("submit", list(requests))

    def poll(self) -> list[Completion]:
        """Return the completions that are ready, after checks.

        If there were none for a long time, a warning is logged once.

        Raises:
            UserError: The engine returned something else, or a completion is not valid.
        """
        completions = self._call("poll")
        if not isinstance(completions, list | tuple):
            type_name = type(completions).__name__
            raise self._error("poll", f"returned a {type_name}: return a list of Completion")
        now = time.monotonic()
        if completions:
            self._last_completion = now
        elif now - self._last_completion > user_code.SLOW_SECONDS:
            problem = f"has returned no completion for {user_code.SLOW_SECONDS:g} s: {_ADVICE}"
            user_code.warn_once(str(self._error("poll", problem)))
        if not completions:
            time.sleep(_EMPTY_POLL_SECONDS)
        for completion in completions:
            if problem := self._problem_of(completion):
                raise self._error("poll", problem)
            self._requested.discard(completion.request.request_id)
        return list(completions)

    def release(self, episode_id: int) -> None:
        """Free the memory of an episode."""
        self._call("release", episode_id)

    def reset(self) -> None:
        """Release all episodes."""
        self._requested.clear()
        self._call("reset")

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step to log.

        Raises:
            UserError: The engine returned something else than numbers by name.
        """
        metrics = self._call("metrics")
        if not is_mapping(metrics) or not all(map(is_number, metrics.values())):
            raise self._error("metrics", "must return a dictionary of numbers")
        return dict(metrics)

    def close(self) -> None:
        """Release the resources of the engine. A failure is only logged as a warning."""
        try:
            self._call("close")
        except Exception as error:
            log.warning("%s: close failed (%s)", self.what, describe_exception(error))

    def _call(self, name: str, *arguments: Any) -> Any:
        method = getattr(self.engine, name)
        with guarded_call(method, what=f"{self.what}: {name}", advice=_ADVICE):
            return method(*arguments)

    def _error(self, name: str, problem: str) -> UserError:
        location = definition_location_text(getattr(self.engine, name))
        return UserError(f"{self.what}: {name}{location} {problem}")

    def _problem_of(self, completion: Any) -> str | None:
        """Return what is wrong with a completion; None if nothing is."""
        if not isinstance(completion, Completion):
            type_name = type(completion).__name__
            return f"returned a list with a {type_name}: return a list of Completion"
        if (
            not isinstance(completion.request, Request)
            or completion.request.request_id not in self._requested
        ):
            return "returned a completion that was not requested, or a second one for its request"
        version, latest = completion.policy_version, self._version
        oldest = max(0, latest - self.max_staleness)
        if type(version) is not int or not oldest <= version <= latest:
            versions = f"{oldest} to {latest}" if oldest < latest else str(latest)
            return (
                f"returned a completion with policy_version {version}: return the version of the "
                f"weights that sampled it, {versions} with rollout.max_staleness "
                f"{self.max_staleness}"
            )
        tokens, logprobs = completion.tokens, completion.logprobs
        maximum = completion.request.max_new_tokens
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            return "returned a completion whose tokens are not a list of int"
        if not 1 <= len(tokens) <= maximum:
            return f"returned {len(tokens)} tokens: return 1 to {maximum}, see max_new_tokens"
        if not all(0 <= token < self.vocabulary for token in tokens):
            return f"returned a token that is not one of the {self.vocabulary} ids of the model"
        if not isinstance(logprobs, list) or not all(isinstance(x, float) for x in logprobs):
            return "returned a completion whose logprobs are not a list of float"
        if len(logprobs) != len(tokens) or not all(map(math.isfinite, logprobs)):
            return (
                f"returned {len(tokens)} tokens with {len(logprobs)} log-probabilities: return a "
                "finite one for each token"
            )
        if max(logprobs) > 1e-3:
            return f"returned the log-probability {max(logprobs):g}, which is above 0"
        if not isinstance(completion.finish_reason, FinishReason):
            return "returned a completion whose finish_reason is not a FinishReason"
        return None
