"""Collect rollouts: play episodes of environments with completions from a rollout engine."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym

from rlhf.common.foreign import limit_side_effects
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.errors import UserError
from rlhf.models.architecture import (
    configured_context_length,
    context_length_of,
    text_config,
    unwrap_peft,
)
from rlhf.rollout.batch import Rollout
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.environments.calls import (
    EnvironmentCaller,
    make_env_factory,
    reset_environment,
    turn_limit,
)
from rlhf.rollout.environments.workers import (
    EnvironmentCall,
    EnvironmentWorkers,
    LockstepWorkers,
    workers_for,
)
from rlhf.rollout.episode import Episode, EpisodeSeed, EpisodeSettings, start_episode
from rlhf.rollout.sampling.base import Completion, RolloutEngine, SamplingParams
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.sampling.verification import check_sampler_or_disable_cache
from rlhf.rollout.turns import StepResult, step_with_reply, with_system_and_examples
from rlhf.runs.profiling import Stopwatch

log = logging.getLogger(__name__)


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
        workers: Runs environment code; by default, calls run one after another, a failure raises
            UserError, and there is no time limit.
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
        workers: EnvironmentWorkers | None = None,
        watch: Stopwatch | None = None,
        examples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.engine, self.make_env, self.chat_format = engine, make_env, chat_format
        self.settings = EpisodeSettings(
            spec, chat_format, context, long_context or context, list(examples)
        )
        self.workers = workers or LockstepWorkers(EnvironmentCaller())
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
            UserError: The model is not supported, the environment cannot be made, or the chat
                template cannot be used or cannot render a prompt or the system message.
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
        collector = cls(
            engine or open_local_engine(model, rollout),
            make_env_factory(env, prompts, split=split),
            chat_format,
            rollout,
            context=context,
            long_context=long_context,
            workers=workers_for(env),
            watch=watch,
            examples=examples,
        )
        collector.check_prompts_are_renderable(prompts)
        return collector

    def check_prompts_are_renderable(self, prompts: Sequence[Any]) -> None:
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
                self.chat_format.check_system_message_is_renderable(
                    [{"role": "system", "content": system}]
                )
        for index, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                self.chat_format.render_prompt(
                    with_system_and_examples(
                        messages, self.spec, system=None, examples=self.settings.examples
                    )
                )
            except UserError as error:
                raise UserError(f"prompt {index + 1} of env.prompts: {error}") from error

    @property
    def spec(self) -> RolloutSpec:
        """Limits and sampling parameters."""
        return self.settings.spec

    @property
    def turn_limit(self) -> int | None:
        """Maximum number of turns of an episode, or None if there is no limit."""
        return turn_limit(self._get_or_make_environments(1)[0])

    def max_sampled_tokens_per_episode(self) -> int:
        """Return the largest expected number of sampled tokens in an episode.

        If the environment has a turn limit, the number is this limit times
        ``rollout.max_new_tokens``. Without a turn limit, it is ``rollout.max_tokens``. If this key
        is not set either, it is the limit of one turn, which an episode of several turns can
        exceed. In each case, it is at most ``rollout.max_tokens`` and the context length.
        """
        turns, context = self.turn_limit, self.settings.long_context
        budget = min(context, self.spec.max_tokens or context)
        if turns:
            return min(budget, turns * self.spec.max_new_tokens)
        return budget if self.spec.max_tokens else min(budget, self.spec.max_new_tokens)

    def _get_or_make_environments(self, number: int) -> list[gym.Env]:
        """Return the first ``number`` environments, and make those that do not exist yet."""
        while len(self.envs) < number:
            self.envs.append(self.workers.make(self.make_env))
        return self.envs[:number]

    def close(self) -> None:
        """Close the environments. A failure is only logged as a warning."""
        for env in self.envs:
            self.workers.close(env)
        self.envs = []

    def collect(
        self,
        seeds: Sequence[EpisodeSeed],
        *,
        temperature: float | None = None,
        allow_empty: bool = False,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Play one episode per seed with the engine's current policy.

        Args:
            seeds: One entry per episode.
            temperature: Sampling temperature; 0 means greedy decoding. By default, it is the
                temperature of the spec.
            allow_empty: Whether to return an empty list if every episode failed.
            on_finish: Function that is called with each returned episode as soon as it has ended.

        Returns:
            The episodes whose environment did not fail, in the order of ``seeds``.

        Raises:
            UserError: A prompt exceeds the token limit of an episode, the chat template cannot
                render a prompt or an observation, or the engine returned an invalid completion. Or
                an environment failed and ``EnvironmentCaller.errors`` is "raise", or every episode
                failed and ``allow_empty`` is False.
        """
        sampling = self.sampling_params(temperature)
        envs = self._get_or_make_environments(min(self.spec.parallel, len(seeds)))
        try:
            with self.workers.limit_side_effects_of_calls():
                rollouts = _Collection(self, seeds, envs, sampling, on_finish).play()
        finally:
            abandoned = {id(env) for env in self.workers.discard_running_calls()}
            self.envs = [env for env in self.envs if id(env) not in abandoned]
            self.engine.reset()
        if not rollouts and not allow_empty:
            raise UserError(
                "the environment failed in every episode, so there are no rollouts; the warnings "
                "above contain the reasons"
            )
        return [rollouts[index] for index in sorted(rollouts)]

    def sampling_params(self, temperature: float | None = None) -> SamplingParams:
        """Return the distribution of the sampled tokens, and the stop tokens.

        Args:
            temperature: Sampling temperature; by default that of the spec.
        """
        return SamplingParams(
            temperature=self.spec.temperature if temperature is None else temperature,
            top_k=self.spec.top_k,
            top_p=self.spec.top_p,
            min_p=self.spec.min_p,
            stop_ids=frozenset(self.chat_format.stop_ids),
        )

    def replace_environment(self, env: gym.Env) -> gym.Env:
        """Replace a failed environment, whose state is undefined, by a new one, and return that."""
        index = self.envs.index(env)
        self.workers.close(env)
        self.envs[index] = self.workers.make(self.make_env)
        return self.envs[index]


def open_local_engine(model: Any, rollout: RolloutSpec) -> ContinuousEngine:
    """Return an engine that samples in this process, after a check of its log-probabilities.

    Raises:
        UserError: The model is not supported.
    """
    check_sampler_or_disable_cache(model)
    return ContinuousEngine(model, max_rows=rollout.parallel)


class _Collection:
    """The episodes of one call of `Collector.collect`.

    Args:
        collector: The collector.
        seeds: One entry per episode.
        envs: Environments; an episode starts as soon as one is free.
        sampling: Sampling parameters of all requests.
        on_finish: Function that is called with each finished episode.
    """

    def __init__(
        self,
        collector: Collector,
        seeds: Sequence[EpisodeSeed],
        envs: Sequence[gym.Env],
        sampling: SamplingParams,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> None:
        self.collector, self.sampling, self.on_finish = collector, sampling, on_finish
        self.engine, self.workers = collector.engine, collector.workers
        self.waiting = deque(enumerate(seeds))
        self.free = list(reversed(envs))
        self.active: dict[int, Episode] = {}  # request id -> episode
        self.finished: dict[int, Rollout] = {}  # index in the seeds -> rollout

    def play(self) -> dict[int, Rollout]:
        """Play all episodes.

        Returns:
            Index in the seeds -> finished episode.
        """
        watch = self.collector.watch
        while self.waiting or self.active or self.workers.num_undelivered_calls:
            while self.free and self.waiting:
                self._submit_reset(self.free.pop(), *self.waiting.popleft())
            with watch("environments"):
                self.workers.deliver(wait=not self.active)
            if not self.active or (self.free and self.waiting):
                continue
            with watch("generation"), limit_side_effects():
                completions = self.engine.poll()
            for completion in completions:
                _check_completion(completion, self.active)
                self._submit_step(self.active.pop(completion.request.request_id), completion)
        return self.finished

    def _submit_reset(self, env: gym.Env, index: int, seed: EpisodeSeed) -> None:
        """Reset an environment, and start an episode with the result.

        If the reset fails, there is no episode, and the environment is replaced.
        """

        def receive(start: tuple[str, dict[str, Any]] | None) -> None:
            if start is None:
                self.free.append(self.collector.replace_environment(env))
                return
            settings, version = self.collector.settings, self.engine.policy_version
            self._request_reply(
                start_episode(settings, env, seed, *start, index=index, policy_version=version)
            )

        self._submit(env, seed.seed, lambda: reset_environment(env, seed.seed), receive)

    def _submit_step(self, episode: Episode, completion: Completion) -> None:
        """Step an episode's environment with a reply, and continue or end the episode.

        If the step fails, the episode is dropped, and the environment is replaced.
        """
        env, spec = episode.env, self.collector.spec
        text = self.collector.chat_format.decode_reply(completion.tokens)

        def receive(result: StepResult | None) -> None:
            over = result is None or episode.record_turn(completion, text, result)
            if not over:
                self._request_reply(episode)
                return
            self.engine.release(episode.id)
            if result is None:
                self.free.append(self.collector.replace_environment(env))
            else:
                self.free.append(env)
                self.finished[episode.index] = episode.rollout
                if self.on_finish is not None:
                    self.on_finish(episode.rollout)

        self._submit(env, episode.rollout.seed, lambda: step_with_reply(env, text, spec), receive)

    def _submit(
        self,
        env: gym.Env,
        seed: int,
        run: Callable[[], Any],
        receive: Callable[[Any], None],
    ) -> None:
        with self.collector.watch("environments"):
            self.workers.submit(EnvironmentCall(env, seed, run, receive))

    def _request_reply(self, episode: Episode) -> None:
        request = episode.make_request(self.sampling)
        self.active[request.request_id] = episode
        self.engine.submit([request])


def _check_completion(completion: Completion, active: Mapping[int, Episode]) -> None:
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
