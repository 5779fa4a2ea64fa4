"""Policies that reply with text: a function of the user, or a model on a server."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import time
import urllib.error
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from rlhf.common.chat_api import chat_completion_function, result_within
from rlhf.common.files import is_utf8_encodable
from rlhf.common.foreign import describe_exception, limit_side_effects
from rlhf.common.imports import import_object
from rlhf.common.text import mask_secrets
from rlhf.common.user_code import (
    add_location_to_errors,
    check_accepts_arguments,
    definition_location_text,
    warn_if_slow,
)
from rlhf.config.evaluate import ApiSpec, PolicySpec
from rlhf.config.rollout import RolloutSpec
from rlhf.errors import UserError, first_line
from rlhf.reward_models.chat_template import tools_of
from rlhf.rollout.batch import Rollout
from rlhf.rollout.environments.calls import EnvironmentCaller, reset_environment
from rlhf.rollout.episode import EpisodeSeed
from rlhf.rollout.turns import StepResult, opening_messages, step_with_reply

log = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
"""Messages of an episode, each with a role, a content and, if it has them, tool calls and the keys
of a tool result. The first message has the tools, if there are any."""
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "tools")
POLICY_STREAM = 12
"""First element of the seed of the random generator that a function receives."""
ATTEMPTS = 3
"""Maximum number of times that a request is sent before the evaluation ends with an error."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; the wait doubles with each attempt."""
_TEMPORARY = frozenset({408, 409, 425, 429})
"""HTTP status codes of client errors after which a request is repeated, as after every server
error."""


@dataclass(frozen=True)
class Reply:
    """Reply of a policy in one turn."""

    text: str
    tokens: int | None = None
    """Number of tokens; None if it is unknown."""
    length_limited: bool = False
    """Whether the token limit ended the reply."""


class TextPolicy(Protocol):
    """A policy that replies to conversations."""

    parallel: int
    """Maximum number of episodes that are played at the same time."""

    def reply(
        self, conversations: Sequence[Messages], generators: Sequence[np.random.Generator]
    ) -> list[Reply]:
        """Return a reply to each conversation.

        Args:
            conversations: Messages of each episode, which end with an observation.
            generators: Random generator of each episode.

        Raises:
            UserError: The policy failed.
        """
        ...


class FunctionPolicy:
    """Policy that calls a function ``policy(messages)``, or ``policy(messages, rng)``.

    A class is instantiated without arguments, and the object is called.

    Args:
        name: Name of the policy, for messages.
        path: The function or class, as ``file.py:name`` or ``module:name``.

    Raises:
        UserError: The function or class cannot be imported or called.
    """

    parallel = 1

    def __init__(self, name: str, path: str) -> None:
        self.what = f"policies: {name}"
        function = import_object(path, what=f"{self.what}: path")
        if isinstance(function, type):
            function = self._call_user_function(function)
        if not callable(function):
            raise UserError(f"{self.what}: {path} is not a function or a class of callable objects")
        self.function = function
        self.takes_rng = _has_parameter(function, "rng")
        keys = {"rng": None} if self.takes_rng else {}
        form = "policy(messages) or policy(messages, rng)"
        check_accepts_arguments(function, (None,), what=self.what, required_signature=form, **keys)

    def reply(
        self, conversations: Sequence[Messages], generators: Sequence[np.random.Generator]
    ) -> list[Reply]:
        """Return a reply to each conversation; see `TextPolicy.reply`."""
        replies = []
        for messages, rng in zip(conversations, generators, strict=True):
            options = {"rng": rng} if self.takes_rng else {}
            text = self._call_user_function(self.function, copy.deepcopy(messages), **options)
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(
                    f"{self.what}: returned a value of type {kind}, expected a text"
                    f"{definition_location_text(self.function)}"
                )
            if not is_utf8_encodable(text):
                raise UserError(
                    f"{self.what}: returned a text with half of a surrogate pair"
                    f"{definition_location_text(self.function)}"
                )
            replies.append(Reply(text))
        return replies

    def _call_user_function(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return the result of a call, with a warning if it is slow.

        Raises:
            UserError: The function raised an exception.
        """
        try:
            with (
                add_location_to_errors(function),
                warn_if_slow(self.what, "evaluate fewer episodes, or make it faster"),
                limit_side_effects(),
            ):
                return function(*args, **options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.what} failed: {describe_exception(error)}") from error


class ApiPolicy:
    """Policy that is a model on an OpenAI-compatible server.

    Args:
        name: Name of the policy, for messages.
        spec: The server and the model.
        rollout: Sampling settings: temperature, top_p and the token limit of a turn.
        decoding: "greedy" or "sampled".

    Raises:
        UserError: The address contains credentials, the API key cannot be sent, or a sampling
            setting is not part of the protocol.
    """

    def __init__(self, name: str, spec: ApiSpec, rollout: RolloutSpec, decoding: str) -> None:
        self.what, self.spec, self.parallel = f"policies: {name}", spec, spec.parallel
        for key in ("top_k", "min_p"):
            if key in rollout.active_sampling_filters:
                raise UserError(
                    f"{self.what}: rollout.{key} is not part of the protocol of servers"
                )
        self.complete = chat_completion_function(
            spec.url, timeout=spec.timeout, what=f"{self.what}: api"
        )
        self.query = {
            "model": spec.model,
            "temperature": 0.0 if decoding == "greedy" else rollout.temperature,
            "max_tokens": rollout.max_new_tokens,
        }
        if rollout.top_p != 1.0:
            self.query["top_p"] = rollout.top_p

    def reply(
        self, conversations: Sequence[Messages], generators: Sequence[np.random.Generator]
    ) -> list[Reply]:
        """Return a reply to each conversation; see `TextPolicy.reply`."""
        del generators  # the server samples
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._reply_with_retries, conversations))

    def _reply_with_retries(self, messages: Messages) -> Reply:
        """Return the reply to one conversation; repeat a request that failed temporarily.

        Raises:
            UserError: `ATTEMPTS` requests failed, or a request failed permanently.
        """
        result: Reply | Exception = TimeoutError("no request was sent")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            result = result_within(self.spec.timeout, lambda: self._request_reply(messages))
            if isinstance(result, Reply):
                return result
            if not _is_temporary(result):
                break
            log.warning("%s: %s", self.what, _error_text(result))
        raise UserError(
            f"{self.what}: {self.spec.model} on {self.spec.url} gave no reply: "
            f"{_error_text(result)}; the results of finished policies are kept: continue with "
            "--resume"
        ) from result

    def _request_reply(self, messages: Messages) -> Reply | Exception:
        """Return the reply of the server, or the exception of the request."""
        try:
            response = self.complete({**self.query, **_request_messages_and_tools(messages)})
        except Exception as error:
            return error
        try:
            choice = response["choices"][0]
            text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
        except (AttributeError, LookupError, TypeError):
            return ValueError("the answer is not a chat completion")
        length_limited = finish_reason == "length"
        if text is None and length_limited:  # the token limit ended the reasoning of the model
            text = ""
        if not isinstance(text, str) or not is_utf8_encodable(text):
            return ValueError("the reply is not a text")
        return Reply(text, self._token_count(response, text), length_limited)

    def _token_count(self, response: Mapping[str, Any], text: str) -> int | None:
        """Return the number of tokens that a server reports; None if it is missing or impossible.

        A reply has no more tokens than bytes, except for those of the model's reasoning, which the
        token limit includes.
        """
        usage = response.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        most = len(text.encode()) + self.query["max_tokens"]
        return tokens if type(tokens) is int and 0 < tokens <= most else None


def _request_messages_and_tools(messages: Messages) -> dict[str, Any]:
    """Return the entries of a request for a conversation and its tools.

    In the protocol of servers, the arguments of tool calls are JSON texts, and tools are not part
    of a message.
    """
    tools = tools_of(messages)
    sent = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key != "tools"}
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [_tool_call_with_arguments_as_text(call) for call in calls]
        sent.append(turn)
    return {"messages": sent, **({"tools": tools} if tools else {})}


def _tool_call_with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return dict(call)
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def make_text_policy(spec: PolicySpec, rollout: RolloutSpec, decoding: str) -> TextPolicy | None:
    """Return the policy of a configuration; None if it is not a function or a server."""
    if spec.path is not None:
        return FunctionPolicy(spec.name, spec.path)
    if spec.api is not None:
        return ApiPolicy(spec.name, spec.api, rollout, decoding)
    return None


@dataclass
class _Episode:
    """An episode in progress."""

    index: int
    env: gym.Env
    rollout: Rollout
    rng: np.random.Generator
    tokens_known: bool = True

    def messages_for_policy(self) -> Messages:
        """Return the conversation without keys such as a reference answer."""
        return [
            {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
            for message in self.rollout.conversation
        ]


class TextEpisodePlayer:
    """Plays episodes of an environment with a policy that replies with text.

    Args:
        policy: The policy.
        make_env: Function that makes one environment.
        spec: Sampling settings of the evaluation.
        examples: Few-shot messages.
        calls: Calls the environments, and counts failures.
    """

    def __init__(
        self,
        policy: TextPolicy,
        make_env: Callable[[], gym.Env],
        spec: RolloutSpec,
        *,
        examples: Sequence[dict[str, Any]] = (),
        calls: EnvironmentCaller,
    ) -> None:
        self.policy, self.make_env, self.spec = policy, make_env, spec
        self.examples, self.calls = examples, calls
        self.finished: dict[int, Rollout] = {}
        self.tokens_known = True

    def play(self, starts: Sequence[EpisodeSeed]) -> list[Rollout]:
        """Return one episode for each start, except those whose environment failed.

        Raises:
            UserError: The policy failed, an environment failed and failures are not counted, or
                every episode failed.
        """
        waiting = deque(enumerate(starts))
        free = [self.make_env() for _ in range(min(self.policy.parallel, len(starts)))]
        active: list[_Episode] = []
        try:
            while waiting or active:
                while waiting and free:
                    episode = self._start_episode(*waiting.popleft(), free.pop())
                    if isinstance(episode, _Episode):
                        active.append(episode)
                    else:
                        free.append(episode)
                active, released = self._take_turns(active)
                free += released
        finally:
            for env in (*free, *(episode.env for episode in active)):
                self.calls.close(env)
        if not self.finished:
            raise UserError(
                "every episode failed with an environment error; see the warnings above"
            )
        return [self.finished[index] for index in sorted(self.finished)]

    def _start_episode(self, index: int, start: EpisodeSeed, env: gym.Env) -> _Episode | gym.Env:
        """Start an episode; return a new environment if this one failed."""
        opening = self.calls.run(start.seed, lambda: reset_environment(env, start.seed))
        if opening is None:
            return self._replace_failed_env(env)
        observation, info = opening
        start_info = {**info, "observation": observation}
        rollout = Rollout(start.seed, start.group_index, start.sample_index, start_info=start_info)
        rollout.conversation = opening_messages(env, observation, info, self.spec, self.examples)
        rng = np.random.default_rng([POLICY_STREAM, start.seed, start.sample_index])
        return _Episode(index, env, rollout, rng)

    def _take_turns(self, active: Sequence[_Episode]) -> tuple[list[_Episode], list[gym.Env]]:
        """Take one turn of every episode, and add those that end to `finished`.

        Returns:
            The episodes that continue, and the environments of the others. A failed environment is
            replaced by a new one.
        """
        replies = self.policy.reply(
            [e.messages_for_policy() for e in active], [e.rng for e in active]
        )
        continuing, released = [], []
        for episode, reply in zip(active, replies, strict=True):
            env, text, seed = episode.env, reply.text, episode.rollout.seed
            result = self.calls.run(
                seed, lambda env=env, text=text: step_with_reply(env, text, self.spec)
            )
            if result is None:
                released.append(self._replace_failed_env(env))
            elif self._record_turn(episode, reply, result):
                self.finished[episode.index] = episode.rollout
                released.append(env)
            else:
                continuing.append(episode)
        return continuing, released

    def _record_turn(self, episode: _Episode, reply: Reply, result: StepResult) -> bool:
        """Append a reply and the result of its step; return whether the episode is over."""
        rollout = episode.rollout
        count = reply.tokens or 1
        self.tokens_known &= reply.tokens is not None
        rollout.append([0] * count, turn=rollout.num_turns, logprobs=[0.0] * count)
        rollout.num_length_limited += reply.length_limited
        rollout.record_step(reply.text, result)
        _, _, terminated, truncated, _ = result
        return terminated or truncated

    def _replace_failed_env(self, env: gym.Env) -> gym.Env:
        """Return a new environment instead of one that failed."""
        self.calls.close(env)
        return self.make_env()


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _is_temporary(error: Exception) -> bool:
    """Return whether a request that failed with an error may succeed later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in _TEMPORARY
    return isinstance(error, OSError)  # includes timeouts and connections


def _error_text(error: Exception) -> str:
    """Return an error in one line, with the start of the answer of a server."""
    if not isinstance(error, urllib.error.HTTPError):
        return f"{type(error).__name__}: {first_line(error)}"
    try:
        body = error.read(500).decode("utf-8", "replace")
    except OSError:
        body = ""
    return mask_secrets(" ".join(f"HTTP {error.code} {error.reason} {body}".split()))
