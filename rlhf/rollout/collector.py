"""Collect rollouts: play episodes of environments with completions from a rollout engine."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import gymnasium as gym

from rlhf.common.foreign import limit_side_effects
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.conversation import insert_after_system
from rlhf.errors import UserError, first_line
from rlhf.models.architecture import (
    configured_context_length,
    context_length_of,
    text_config,
    unwrap_peft,
)
from rlhf.reward_models.chat_template import tools_of, with_tools
from rlhf.rollout.actions import text_to_action
from rlhf.rollout.batch import Rollout
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.env_calls import EnvironmentCalls, reset_environment, step_environment, turn_limit
from rlhf.rollout.sampling.base import (
    Completion,
    FinishReason,
    Request,
    RolloutEngine,
    SamplingParams,
)
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.sampling.verification import check_sampling
from rlhf.runs.profiling import Stopwatch

log = logging.getLogger(__name__)

# First number of the sampling seeds, which makes them different from other seeds of the run.
SAMPLING_SEED_KEY = 7

_episode_ids = count()


@dataclass(frozen=True)
class EpisodeSeed:
    """The seeds of one episode.

    The environment is reset with ``seed``, which is the same for all episodes of a group.
    ``sample_index`` is their index in the group, so that their sampled tokens differ.
    """

    seed: int
    group_index: int
    sample_index: int


@dataclass
class _Episode:
    """An episode in progress. ``rollout.tokens`` are the prompt of the next reply."""

    id: int
    """Identifier of the episode in requests to the engine."""
    index: int
    """Index of the episode in the ``seeds`` of ``collect``."""
    env: gym.Env
    rollout: Rollout
    budget: int
    """Maximum number of tokens in the whole episode."""
    turn: int = 0
    """Index of the current turn."""

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that can still be appended to the episode."""
        return self.budget - len(self.rollout.tokens)


def make_env_factory(
    spec: EnvSpec, prompts: Sequence[Any] = (), *, split: str | None = None
) -> Callable[[], gym.Env]:
    """Return a function that makes one environment.

    Args:
        spec: Environment id and arguments, or prompt datasets.
        prompts: Conversations, if the spec names prompt datasets.
        split: "train" or "test", for environments with separate training and test data. By default,
            the arguments of the spec determine the split.

    Raises:
        UserError: The id is unknown, or the environment cannot be made with these arguments.
    """
    from rlhf import envs
    from rlhf.envs.items import split_kwargs
    from rlhf.envs.prompts import PromptEnv

    def make() -> gym.Env:
        if spec.id is None:
            return PromptEnv(prompts)
        try:
            kwargs = split_kwargs(spec.id, spec.kwargs, split) if split else spec.kwargs
            with limit_side_effects(spec.timeout):
                return gym.make(spec.id, disable_env_checker=True, **kwargs)
        except gym.error.Error as error:
            raise UserError(f"env.id {spec.id!r}: {first_line(error)}") from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"env.id {spec.id!r} cannot be made: {first_line(error)}") from error

    assert envs.TASKS  # importing the package registers the environments
    return make


class Collector:
    """Plays episodes with a rollout engine. Its environments are kept until ``close``.

    Args:
        engine: Engine that samples the policy's completions.
        make_env: Function that makes one environment.
        chat_format: Chat format of the policy.
        spec: Limits and sampling parameters.
        context: Context length of the policy, in tokens.
        long_context: Token limit of an episode whose prompt alone is longer than ``context`` (see
            ``usable_context_length``). If it is None, such a prompt raises UserError.
        calls: Runs environment code; by default a failure raises UserError, and there is no time
            limit.
        watch: Stopwatch that measures the time of generation and of environments.
        examples: Messages that are inserted in every conversation, after the system message.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        make_env: Callable[[], gym.Env],
        chat_format: ChatFormat,
        spec: RolloutSpec,
        *,
        context: int,
        long_context: int | None = None,
        calls: EnvironmentCalls | None = None,
        watch: Stopwatch | None = None,
        examples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.engine, self.examples = engine, list(examples)
        self.make_env, self.chat_format = make_env, chat_format
        self.spec, self.calls = spec, calls or EnvironmentCalls()
        self.context, self.long_context = context, long_context or context
        self.envs: list[gym.Env] = []
        self.watch = watch or Stopwatch()

    @classmethod
    def open(
        cls,
        model: Any,
        tokenizer: Any,
        env: EnvSpec,
        rollout: RolloutSpec,
        *,
        prompts: Sequence[Any] = (),
        watch: Stopwatch | None = None,
        examples: Sequence[dict[str, Any]] = (),
        split: str | None = None,
        engine: RolloutEngine | None = None,
    ) -> Collector:
        """Make the collector for a configuration.

        ``split`` is passed to ``make_env_factory``. Without ``engine``, the collector has an engine
        that samples in this process.

        Raises:
            UserError: The chat template cannot render a prompt or the system message.
        """
        chat_format = ChatFormat(
            tokenizer,
            chat=rollout.chat,
            separator=rollout.separator,
            stop=rollout.stop,
            stop_ids=generation_stop_ids(model),
        )
        context, long_context = (
            context_length_of(model),
            configured_context_length(text_config(unwrap_peft(model))),
        )
        if context < long_context:
            log.info(
                "rotary frequencies change beyond %d tokens, so episodes with shorter prompts are "
                "truncated at this length, and episodes with longer prompts at %d tokens",
                context,
                long_context,
            )
        if engine is None:
            check_sampling(model)
            engine = ContinuousEngine(model, max_rows=rollout.parallel)
        collector = cls(
            engine,
            make_env_factory(env, prompts, split=split),
            chat_format,
            rollout,
            context=context,
            long_context=long_context,
            calls=EnvironmentCalls.from_spec(env),
            watch=watch,
            examples=examples,
        )
        collector.check_template(prompts)
        return collector

    def check_template(self, prompts: Sequence[Any]) -> None:
        """Check, before the first episode, that the chat template can render the prompts.

        Args:
            prompts: Prompts of the prompt datasets. If it is empty, the system message of the
                configuration or of the environment is checked.

        Raises:
            UserError: The template cannot render a prompt or the system message.
        """
        if not self.chat_format.chat:
            return
        if not prompts:
            env = self._get_or_make_environments(1)[0]
            if system := self.spec.system or getattr(env.unwrapped, "system_prompt", None):
                self.chat_format.check_system_is_renderable([{"role": "system", "content": system}])
        for index, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                self.chat_format.render_prompt(
                    self._with_system_and_examples(messages, system=None)
                )
            except UserError as error:
                raise UserError(f"prompt {index + 1} of env.prompts: {error}") from error

    def max_sampled_tokens_per_episode(self) -> int:
        """Return an upper bound on the number of tokens sampled in an episode.

        If the environment has a turn limit, the bound is this limit times
        ``rollout.max_new_tokens``, but at most the smaller of ``rollout.max_tokens`` and the
        context length. Without a turn limit, the bound is ``rollout.max_tokens``. If this key is
        not set either, the bound is that of one turn.
        """
        turns = turn_limit(self._get_or_make_environments(1)[0])
        budget = min(self.long_context, self.spec.max_tokens or self.long_context)
        if turns:
            return min(budget, turns * self.spec.max_new_tokens)
        return self.spec.max_tokens or min(budget, self.spec.max_new_tokens)

    def _get_or_make_environments(self, number: int) -> list[gym.Env]:
        """Return the first ``number`` environments, and make those that do not exist yet."""
        while len(self.envs) < number:
            self.envs.append(self.make_env())
        return self.envs[:number]

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            self.calls.close(env)
        self.envs = []

    def collect(
        self,
        seeds: Sequence[EpisodeSeed],
        *,
        temperature: float | None = None,
        allow_empty: bool = False,
    ) -> list[Rollout]:
        """Play one episode per seed with the engine's current policy.

        Args:
            seeds: One entry per episode.
            temperature: Sampling temperature; 0 means greedy decoding. By default, it is the
                temperature of the spec.
            allow_empty: Whether to return an empty list if every episode failed.

        Returns:
            The episodes whose environment did not fail, in the order of ``seeds``.

        Raises:
            UserError: A prompt does not fit into the context, or an environment failed and
                ``EnvironmentCalls.errors`` is "raise", or every episode failed and ``allow_empty``
                is False.
        """
        sampling = SamplingParams(
            temperature=self.spec.temperature if temperature is None else temperature,
            top_k=self.spec.top_k,
            top_p=self.spec.top_p,
            min_p=self.spec.min_p,
            stop_ids=frozenset(self.chat_format.stop_ids),
        )
        envs = self._get_or_make_environments(min(self.spec.parallel, len(seeds)))
        try:
            rollouts = self._play(seeds, envs, sampling)
        finally:
            self.engine.reset()
        if not rollouts and not allow_empty:
            raise UserError(
                "the environment failed in every episode, so there are no rollouts; the warnings "
                "above contain the reasons"
            )
        return [rollouts[index] for index in sorted(rollouts)]

    def _play(
        self, seeds: Sequence[EpisodeSeed], envs: Sequence[gym.Env], sampling: SamplingParams
    ) -> dict[int, Rollout]:
        """Play all episodes. An episode starts as soon as an environment is free.

        Returns:
            Index in ``seeds`` -> finished episode.
        """
        waiting = deque(enumerate(seeds))
        free = list(reversed(envs))
        active: dict[int, _Episode] = {}  # request id -> episode
        finished: dict[int, Rollout] = {}

        def submit(episode: _Episode) -> None:
            request = self._make_request(episode, sampling)
            active[request.request_id] = episode
            self.engine.submit([request])

        while True:
            while free and waiting:
                index, seed = waiting.popleft()
                env = free[-1]
                start = self._call_environment(
                    seed.seed, lambda e=env, s=seed: reset_environment(e, s.seed)
                )
                if start is None:
                    free[-1] = self._replace_environment(env)
                    continue
                submit(self._start_episode(env, index, seed, *start))
                free.pop()
            if not active:
                return finished
            with self.watch("generation"), limit_side_effects():
                completions = self.engine.poll()
            for completion in completions:
                _check_completion(completion, active)
                episode = active.pop(completion.request.request_id)
                over = self._play_turn(episode, completion)
                if over is False:
                    submit(episode)
                else:
                    self.engine.release(episode.id)
                    free.append(episode.env if over else self._replace_environment(episode.env))
                if over:
                    finished[episode.index] = episode.rollout

    def _replace_environment(self, env: gym.Env) -> gym.Env:
        """Replace a failed environment by a new one, because its state is undefined."""
        index = self.envs.index(env)
        self.calls.close(env)
        self.envs[index] = self.make_env()
        return self.envs[index]

    def _call_environment(self, seed: int, call: Callable[[], Any]) -> Any:
        """Run environment code; return None if it failed and failures are counted."""
        with self.watch("environments"):
            return self.calls.run(seed, call)

    def _start_episode(
        self, env: gym.Env, index: int, seed: EpisodeSeed, observation: str, info: dict[str, Any]
    ) -> _Episode:
        """Start an episode from the result of ``reset``."""
        start_info = {**info, "observation": observation}
        rollout = Rollout(seed.seed, seed.group_index, seed.sample_index, start_info=start_info)
        # An environment of prompts returns the message of the data row. Its additional keys, such
        # as the reference answer, are used by rewards. Other environments may use the key "message"
        # for a value of any type.
        message = info.get("message")
        keys = message if isinstance(message, Mapping) else {}
        first = {"role": "user", **keys, "content": observation}
        system = getattr(env.unwrapped, "system_prompt", None)
        rollout.conversation = self._with_system_and_examples(
            [*info.get("messages", ()), first], system=system
        )
        ids = self.chat_format.encode_prompt(rollout.conversation)
        context = self.context if len(ids) <= self.context else self.long_context
        budget = min(self.spec.max_tokens or context, context)
        if len(ids) >= budget:
            raise UserError(
                f"the prompt of seed {seed.seed} has {len(ids)} tokens, but an episode is limited "
                f"to {budget} tokens (rollout.max_tokens or the model's context); shorten the "
                "prompts or raise the limit"
            )
        rollout.append(ids, turn=0, logprobs=None, policy_version=self.engine.policy_version)
        return _Episode(next(_episode_ids), index, env, rollout, budget)

    def _with_system_and_examples(
        self, messages: Sequence[Any], *, system: str | None
    ) -> list[dict[str, Any]]:
        """Add the system message and the examples of this collector to ``messages``.

        The system message is ``rollout.system`` if it is set. Otherwise, it is the system message
        in ``messages`` or, if there is none, the argument ``system`` (that of the environment).
        """
        tools = tools_of(messages)
        messages = [dict(message) for message in messages]
        if self.spec.system and messages[0]["role"] == "system":
            messages = messages[1:]
        system = self.spec.system or system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return with_tools(insert_after_system(messages, self.examples), tools)

    def _make_request(self, episode: _Episode, sampling: SamplingParams) -> Request:
        """Return the request for an episode's next reply."""
        rollout = episode.rollout
        return Request(
            episode_id=episode.id,
            prompt_ids=list(rollout.tokens),
            max_new_tokens=min(self.spec.max_new_tokens, episode.remaining_tokens),
            seed=(SAMPLING_SEED_KEY, rollout.seed, rollout.sample_index, episode.turn),
            sampling=sampling,
        )

    def _step_and_record(
        self, episode: _Episode, completion: Completion, text: str
    ) -> tuple[str, bool]:
        """Step the environment with a reply, and record the reply and the result in the rollout.

        Returns:
            The observation, and whether the environment truncated the episode.
        """
        env, rollout = episode.env, episode.rollout
        action = text_to_action(text, env)
        result = (
            self._invalid_action_result(env) if action is None else step_environment(env, action)
        )
        observation, reward, terminated, truncated, info = result
        success = info.get("is_success")
        rollout.append(
            completion.tokens,
            turn=episode.turn,
            logprobs=completion.logprobs,
            policy_version=completion.policy_version,
        )
        rollout.stopped = completion.finish_reason == FinishReason.STOP
        rollout.num_length_limited += not rollout.stopped
        rollout.conversation.append({"role": "assistant", "content": text})
        rollout.env_rewards[-1] += reward
        rollout.costs[-1] += float(info.get("cost", 0.0))
        rollout.invalid += not info.get("valid", True)
        rollout.success = None if success is None else bool(success)
        rollout.terminated = terminated
        return observation, truncated

    def _play_turn(self, episode: _Episode, completion: Completion) -> bool | None:
        """Step the environment with a reply, and append the reply and the observation.

        Returns:
            Whether the episode is over. The result is None if the environment failed and
            ``EnvironmentCalls.errors`` is "count".
        """
        rollout = episode.rollout
        text = self.chat_format.decode_reply(completion.tokens)
        result = self._call_environment(
            rollout.seed, lambda: self._step_and_record(episode, completion, text)
        )
        if result is None:
            return None
        if rollout.terminated:
            return True
        observation, truncated = result
        rollout.conversation.append({"role": "user", "content": observation})
        ids = self.chat_format.encode_observation(
            observation,
            reply=completion.tokens,
            has_system_message=rollout.conversation[0]["role"] == "system",
        )
        rollout.truncated = truncated or len(ids) >= episode.remaining_tokens
        episode.turn += 1
        # The observation after the last turn is appended too, because the critic estimates the
        # value of the last state.
        rollout.append(
            ids[: episode.remaining_tokens],
            turn=episode.turn,
            logprobs=None,
            policy_version=completion.policy_version,
        )
        return rollout.truncated

    def _invalid_action_result(self, env: Any) -> tuple[Any, ...]:
        """Return the result of a step for a reply without a valid action.

        The result is that of ``env.step``, but the environment is not called.
        """
        first = env.action_space.start
        last = first + env.action_space.n - 1
        hint = f"That is no action. Answer with a number from {first} to {last}."
        return hint, self.spec.invalid_reward, self.spec.invalid == "end", False, {"valid": False}


def _check_completion(completion: Completion, active: Mapping[int, _Episode]) -> None:
    """Check the completion that a rollout engine returned.

    Raises:
        UserError: The completion belongs to no active request, or it does not have one finite
            log-probability per token.
    """
    episode = active.get(completion.request.request_id)
    if episode is None:
        raise UserError("the rollout engine returned a completion that was not requested")
    tokens, logprobs = completion.tokens, completion.logprobs
    if len(tokens) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise UserError(
            f"the rollout engine returned {len(tokens)} tokens with {len(logprobs)} "
            f"log-probabilities in the episode of seed {episode.rollout.seed}; every token needs "
            "a finite log-probability"
        )
