"""Environments x policy -> rollouts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.conversation import after_system
from rlhf.errors import UserError
from rlhf.models.architecture import text_config, whole_context
from rlhf.models.logprobs import bare, context_of
from rlhf.reward_models.chat_template import tools_of, with_tools
from rlhf.rollout.actions import text_to_action
from rlhf.rollout.batch import Rollout
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.load_check import check_sampling
from rlhf.rollout.sampling.continuous import Reply, Sampler
from rlhf.rollout.truncation import truncate
from rlhf.runs.profiling import Stopwatch

log = logging.getLogger(__name__)

# Choice of a token from the policy's distribution needs one uniform number; an episode's numbers
# come from its own generator, so that they depend on nothing else.
NOISE_STREAM = 7


@dataclass(frozen=True)
class EpisodeSeed:
    """An episode to play: equal seeds start equally; ``member`` tells a group's episodes apart."""

    seed: int
    group: int
    member: int


@dataclass
class _Episode:
    env: Any
    rollout: Rollout
    new_ids: list[int]
    budget: int
    """Tokens it may have."""
    limit: int = 0


@dataclass(frozen=True)
class _Outcome:
    """An environment's answer to one reply."""

    observation: str
    reward: float
    cost: float
    valid: bool
    success: bool | None
    terminated: bool
    truncated: bool


def make_env_factory(
    spec: EnvSpec, prompts: Sequence[Any] = (), *, split: str | None = None
) -> Callable[[], gym.Env]:
    """A function that makes one environment.

    Args:
        spec: of the environment.
        prompts: conversations, where the spec names prompt sets.
        split: "train" or "test" where the environment keeps their items apart; None leaves it as
            the spec has it.

    Raises:
        UserError: no environment of that id, or it cannot be made with these arguments.
    """
    from rlhf import envs
    from rlhf.envs.items import split_kwargs
    from rlhf.envs.prompts import PromptEnv

    def make() -> gym.Env:
        if spec.id is None:
            return PromptEnv(prompts)
        try:
            kwargs = split_kwargs(spec.id, spec.kwargs, split) if split else spec.kwargs
            return gym.make(spec.id, disable_env_checker=True, **kwargs)
        except gym.error.Error as error:
            raise UserError(f"env.id {spec.id!r}: {_first_line(error)}") from error
        except (ImportError, TypeError, ValueError) as error:
            raise UserError(f"env.id {spec.id!r} cannot be made: {_first_line(error)}") from error

    assert envs.TASKS  # importing the package registers its ids
    return make


class Collector:
    """Plays episodes with a policy; keeps its environments until ``close``.

    Args:
        make_env: makes one environment.
        chat_format: the policy's.
        spec: limits and sampling.
        context: tokens the policy can read.
        long_context: tokens that an episode may have whose prompt alone is longer than ``context``
            (see ``usable_context``); None: there can be none.
        errors: what an environment's exception does ("raise" or "count").
        watch: counts the seconds of generation and environments.
        examples: messages shown before every episode, after a system message.
    """

    def __init__(
        self,
        make_env: Callable[[], gym.Env],
        chat_format: ChatFormat,
        spec: RolloutSpec,
        *,
        context: int,
        long_context: int | None = None,
        errors: str = "raise",
        watch: Stopwatch | None = None,
        examples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.examples = list(examples)
        self.make_env, self.chat_format = make_env, chat_format
        self.spec, self.errors = spec, errors
        self.context, self.long_context = context, long_context or context
        self.budget = min(spec.max_tokens or context, context)
        self.envs: list[gym.Env] = []
        self.watch = watch or Stopwatch()
        self.prefilled = 0
        self.failed = 0

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
    ) -> Collector:
        """The collector that a configuration describes, for a model and its tokenizer.

        ``split`` is that of ``make_env_factory``.

        Raises:
            UserError: the chat template refuses a prompt, or the system message.
        """
        chat_format = ChatFormat(
            tokenizer,
            chat=rollout.chat,
            separator=rollout.separator,
            stop=rollout.stop,
            stop_ids=generation_stop_ids(model),
        )
        context, whole = context_of(model), whole_context(text_config(bare(model)))
        if context < whole:
            log.info(
                "rows of more than %d tokens are read with other rotary frequencies: an episode "
                "whose prompt is shorter ends there, a longer one at %d",
                context,
                whole,
            )
        check_sampling(model)
        collector = cls(
            make_env_factory(env, prompts, split=split),
            chat_format,
            rollout,
            context=context,
            long_context=whole,
            errors=env.errors,
            watch=watch,
            examples=examples,
        )
        collector.check_template(prompts)
        return collector

    def check_template(self, prompts: Sequence[Any]) -> None:
        """See that the chat template takes what every episode begins with, before one is played.

        Args:
            prompts: of a prompt set; without any, an environment's system message is tried.

        Raises:
            UserError: names the prompt that is refused.
        """
        if not self.chat_format.chat:
            return
        if not prompts and self.spec.system is None:
            if not self.envs:
                self.envs.append(self.make_env())
            if getattr(self.envs[0].unwrapped, "system_prompt", None):
                self.chat_format.check_system([{"role": "system", "content": "?"}])
        elif not prompts:
            self.chat_format.check_system([{"role": "system", "content": self.spec.system}])
        for index, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                self.chat_format.check_prompt(self._opening(messages, system=None))
            except UserError as error:
                raise UserError(f"prompt {index + 1} of env.prompts: {error}") from error

    def episode_tokens(self) -> int:
        """Most tokens that an episode can sample, as far as its turns are known.

        An environment tells by ``max_turns``, or by the step limit of its registration. Without
        either it is ``rollout.max_tokens``, or else the limit of one turn.
        """
        if not self.envs:
            self.envs.append(self.make_env())
        env = self.envs[0]
        limit = getattr(env.spec, "max_episode_steps", None)
        known = [n for n in (getattr(env.unwrapped, "max_turns", None), limit) if n]
        budget = min(self.long_context, self.spec.max_tokens or self.long_context)
        if known:
            return min(budget, min(known) * self.spec.max_new_tokens)
        return self.spec.max_tokens or min(budget, self.spec.max_new_tokens)

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()
        self.envs = []

    def collect(
        self,
        model: Any,
        starts: Sequence[EpisodeSeed],
        *,
        temperature: float | None = None,
        allow_none: bool = False,
    ) -> list[Rollout]:
        """Play one episode per start.

        Args:
            model: the policy's causal model.
            starts: seeds, groups and members.
            temperature: overrides the spec's; 0 is greedy.
            allow_none: whether the result may be empty, where failures are counted.

        Returns:
            The episodes in the order of their starts, without those that failed where failures are
            counted.

        Raises:
            UserError: an environment failed (with the seed that repeats it), every one did, or a
                prompt does not fit the context.
        """
        warmth = self.spec.temperature if temperature is None else temperature
        size = min(self.spec.parallel, len(starts))
        while len(self.envs) < size:
            self.envs.append(self.make_env())
        sampler = Sampler(
            model,
            stop_ids=self.chat_format.stop_ids,
            rows=size,
            temperature=warmth,
            restrict=partial(truncate, spec=self.spec) if self.spec.truncations else None,
        )
        played = self._play(sampler, starts, self.envs[:size])
        self.prefilled += sampler.prefilled
        if not played and not allow_none:
            raise UserError("every environment failed, so there is nothing to learn from")
        return [played[place] for place in sorted(played)]

    def _play(
        self, sampler: Sampler, starts: Sequence[EpisodeSeed], envs: Sequence[gym.Env]
    ) -> dict[int, Rollout]:
        """Finished episodes by their place in ``starts``; a free environment takes the next."""
        waiting = deque(enumerate(starts))
        free = list(reversed(envs))
        playing: dict[int, _Episode] = {}
        played: dict[int, Rollout] = {}
        while True:
            while free and waiting:
                place, start = waiting.popleft()
                env = free[-1]
                shown = self._guarded(start.seed, lambda e=env, s=start: _reset(e, s.seed))
                if shown is None:
                    free[-1] = self._rebuilt(env)
                    continue
                episode = self._begin(env, start, *shown)
                playing[place] = episode
                free.pop()
                sampler.submit(place, episode.new_ids, self._noise(episode))
            if not playing:
                return played
            with self.watch("generation"):
                replies = sampler.step()
            for place, reply in replies.items():
                episode = playing[place]
                text = self.chat_format.decode_reply(reply.tokens)
                outcome = self._guarded(
                    episode.rollout.seed, lambda e=episode, t=text: self._act(e.env, t)
                )
                over = None if outcome is None else self._advance(episode, reply, text, outcome)
                if over is False:
                    sampler.submit(place, episode.new_ids, self._noise(episode))
                    continue
                sampler.release(place)
                del playing[place]
                free.append(episode.env if over else self._rebuilt(episode.env))
                if over:
                    played[place] = episode.rollout

    def _rebuilt(self, env: gym.Env) -> gym.Env:
        """A new environment in place of one that failed, whose state nobody knows."""
        place = self.envs.index(env)
        try:
            env.close()
        except Exception as error:  # it is broken already, and that was counted
            log.warning("a failed environment did not close: %s", _first_line(error))
        self.envs[place] = self.make_env()
        return self.envs[place]

    def _guarded(self, seed: int, act: Callable[[], Any]) -> Any:
        """Run environment code; None when it failed and failures are counted."""
        try:
            with self.watch("environments"):
                return act()
        except UserError:
            raise
        except Exception as error:
            if self.errors == "raise":
                reason = f"{type(error).__name__}: {_first_line(error)}"
                raise UserError(
                    f"the environment failed in the episode of seed {seed}: {reason}"
                ) from error
            self.failed += 1
            log.warning("episode of seed %d dropped: %s", seed, _first_line(error))
            return None

    def _begin(self, env: gym.Env, start: EpisodeSeed, observation: str, info: dict) -> _Episode:
        start_info = {**info, "observation": observation}
        rollout = Rollout(start.seed, start.group, start.member, start_info=start_info)
        # The message's further keys, such as the right answer, are for rewards to read.
        extra = info.get("message")  # of our prompt sets; other environments may use the key
        keys = extra if isinstance(extra, Mapping) else {}
        shown = {"role": "user", **keys, "content": observation}
        system = getattr(env.unwrapped, "system_prompt", None)
        rollout.conversation = self._opening([*info.get("messages", ()), shown], system=system)
        ids = self.chat_format.encode_prompt(rollout.conversation)
        room = self.context if len(ids) <= self.context else self.long_context
        episode = _Episode(env, rollout, ids, min(self.spec.max_tokens or room, room))
        if not self._fits(episode):
            raise UserError(
                f"the prompt of seed {start.seed} has {len(ids)} tokens, which leaves no room in "
                f"the {episode.budget} of rollout.max_tokens or the model's context: shorten the "
                "prompts or raise the limit"
            )
        rollout.append(ids, turn=0, logprobs=None)
        return episode

    def _opening(self, messages: Sequence[Any], *, system: str | None) -> list[dict[str, Any]]:
        """``messages`` with the system message and the examples of this collector.

        ``rollout.system`` replaces the conversation's own, which comes before the environment's.
        """
        tools = tools_of(messages)
        messages = [dict(message) for message in messages]
        if self.spec.system and messages[0]["role"] == "system":
            messages = messages[1:]
        system = self.spec.system or system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return with_tools(after_system(messages, self.examples), tools)

    def _fits(self, episode: _Episode) -> bool:
        """Set the limit of the next reply; False when there is no room for one."""
        room = episode.budget - len(episode.rollout.tokens) - len(episode.new_ids)
        episode.limit = min(self.spec.max_new_tokens, room)
        return room > 0

    def _noise(self, episode: _Episode) -> np.ndarray:
        rollout = episode.rollout
        turn = rollout.turn[-1] if rollout.num_actions == 0 else rollout.turn[-1] + 1
        key = [NOISE_STREAM, rollout.seed, rollout.member, turn]
        return np.random.default_rng(key).random(episode.limit)

    def _act(self, env: Any, text: str) -> _Outcome:
        """What the environment answers to a reply."""
        action = text_to_action(text, env)
        answer = self._refuse(env) if action is None else env.step(action)
        observation, reward, terminated, truncated, info = answer
        success = info.get("is_success")
        return _Outcome(
            observation=str(observation),
            reward=float(reward),
            cost=float(info.get("cost", 0.0)),
            valid=bool(info.get("valid", True)),
            success=None if success is None else bool(success),
            terminated=bool(terminated),
            truncated=bool(truncated),
        )

    def _advance(self, episode: _Episode, reply: Reply, text: str, outcome: _Outcome) -> bool:
        """Note a reply and what the environment answered; True when the episode is over."""
        rollout = episode.rollout
        turn = rollout.turn[-1] if rollout.num_actions == 0 else rollout.turn[-1] + 1
        if rollout.num_actions:
            rollout.append(episode.new_ids, turn=turn, logprobs=None)
        rollout.append(reply.tokens, turn=turn, logprobs=reply.logprobs)
        rollout.finished = reply.stopped
        rollout.cut += not reply.stopped
        rollout.conversation.append({"role": "assistant", "content": text})
        rollout.rewards[-1] += outcome.reward
        rollout.costs[-1] += outcome.cost
        rollout.invalid += not outcome.valid
        rollout.success = outcome.success
        if outcome.terminated:
            rollout.terminated = True
            return True
        rollout.conversation.append({"role": "user", "content": outcome.observation})
        episode.new_ids = self.chat_format.encode_observation(
            outcome.observation,
            reply=reply.tokens,
            system=rollout.conversation[0]["role"] == "system",
        )
        if outcome.truncated or not self._fits(episode):
            # The last observation stays, so that the critic sees the state to bootstrap from.
            room = episode.budget - len(rollout.tokens)
            rollout.append(episode.new_ids[:room], turn=turn + 1, logprobs=None)
            rollout.truncated = True
            return True
        return False

    def _refuse(self, env: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """What a step answers to a reply that names no action; the environment is not asked."""
        first = env.action_space.start
        last = first + env.action_space.n - 1
        hint = f"That is no action. Answer with a number from {first} to {last}."
        return hint, self.spec.invalid_reward, self.spec.invalid == "end", False, {"valid": False}


def _reset(env: gym.Env, seed: int) -> tuple[str, dict[str, Any]]:
    observation, info = env.reset(seed=seed)
    return str(observation), dict(info)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
