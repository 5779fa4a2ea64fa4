"""Wrappers for experiments: history, invalid actions, examples, noise, rewards, cost budgets.

Each wrapper accepts any environment with text observations and text actions. The wrapper that
extracts actions from longer replies is in `rlhf.envs.parsing`.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from rlhf.common.conversation import Conversation, RewardFunction
from rlhf.envs.core import FreeText, check_choice, check_range
from rlhf.envs.items import has_separate_splits
from rlhf.errors import UserError

Info = dict[str, Any]
MAX_SKIPPED_TURNS = 1000


class TextWrapper(RecordConstructorArgs, gym.Wrapper[str, str, str, str]):
    """Base class of the wrappers; subclasses define `after_reset`, `step` or both.

    Args:
        env: The environment.
        **arguments: The arguments of the wrapper, recorded so that `env.spec` can create it again.
    """

    def __init__(self, env: gym.Env[str, str], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, **arguments)
        gym.Wrapper.__init__(self, env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        return self.after_reset(text, info, seed)

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        """Return the observation and info of `reset`.

        Args:
            text: First observation of the wrapped environment.
            info: Info dictionary of the wrapped environment.
            seed: The argument `seed` of `reset`.
        """
        return text, info


class History(TextWrapper):
    """Prepend the past turns of the episode to each observation.

    This wrapper is for agents that see only the current observation. Rollouts contain the whole
    conversation, so they do not need this wrapper.

    Args:
        env: The environment.
        turns: Number of past turns (an observation and its reply) to prepend. By default, all past
            turns are prepended.
    """

    def __init__(self, env: gym.Env[str, str], turns: int | None = None) -> None:
        if turns is not None and turns < 0:
            raise UserError(f"turns must be None or at least 0, got {turns}")
        super().__init__(env, turns=turns)
        self.observation_space = FreeText()
        self._past: deque[str] = deque(maxlen=turns)
        self._latest = ""

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        self._latest = text
        self._past.clear()
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        self._past.append(f"{self._latest}\n> {action}")
        self._latest, reward, terminated, truncated, info = self.env.step(action)
        return "\n".join([*self._past, self._latest]), reward, terminated, truncated, info


class InvalidActions(TextWrapper):
    """Penalize invalid actions, end the episode after one, or replace them by random actions.

    Without this wrapper, an invalid action uses up a turn and sets `info["valid"]` to False.

    Args:
        env: The environment.
        penalty: Amount that is subtracted from the reward of each invalid action.
        end: Whether the first invalid action ends the episode (terminated). To compute the return
            of the remaining turns, the wrapper repeats the action in them. If this return is
            negative, it is added to the reward of the action, so that ending early is never an
            advantage.
        substitute: "random" replaces an invalid action by a random legal action;
            `info["substituted"]` then states whether the action was replaced. By default, invalid
            actions are passed to the environment.
    """

    def __init__(
        self,
        env: gym.Env[str, str],
        *,
        penalty: float = 0.0,
        end: bool = False,
        substitute: str | None = None,
    ) -> None:
        check_choice("substitute", substitute, (None, "random"))
        if penalty < 0:
            raise UserError(
                f"penalty is subtracted from the reward, so it must be at least 0, got {penalty}"
            )
        if substitute is not None and (end or penalty):
            raise UserError(
                "substitute replaces every invalid action, so end and penalty have no effect: "
                "remove end and penalty, or substitute"
            )
        super().__init__(env, penalty=penalty, end=end, substitute=substitute)
        self._penalty, self._end, self._substitute = penalty, end, substitute
        self._rng = np.random.default_rng(0)

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        if seed is not None:
            # Use a separate generator, so that substitution does not change the episode's draws.
            self._rng = np.random.default_rng([seed, 2])
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        replaced = False
        if self._substitute is not None:
            base: Any = self.env.unwrapped
            if action not in base.legal_actions() and not self._is_accepted_on_copy(action):
                action, replaced = base.sample_action(self._rng), True
        text, reward, terminated, truncated, info = self.env.step(action)
        if self._substitute is not None:
            info = {**info, "substituted": replaced}
        if not info.get("valid", True):
            reward = float(reward) - self._penalty
            if self._end and not (terminated or truncated):
                reward, terminated = reward + min(0.0, self._repeat_until_end(action)), True
        return text, reward, terminated, truncated, info

    def _is_accepted_on_copy(self, action: str) -> bool:
        """Return whether the environment accepts an action that `legal_actions` does not list.

        An action can have several spellings, such as `arm 2` and `2`. The action is tried on a copy
        of the environment. If the environment cannot be copied, the result is False.
        """
        try:
            trial = copy.deepcopy(self.env)
        except Exception:  # third-party objects may raise anything
            return False
        return bool(trial.step(action)[4].get("valid", False))

    def _repeat_until_end(self, action: str) -> float:
        """Repeat the action until the episode ends, at most `MAX_SKIPPED_TURNS` times.

        Returns:
            The sum of the rewards of the repetitions.
        """
        total = 0.0
        for _ in range(MAX_SKIPPED_TURNS):
            _, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return total


class FewShot(TextWrapper):
    """Prepend solved examples to the first observation.

    Args:
        env: The environment.
        count: Number of example episodes, played by the environment's expert.
        seed: Seed of the first example; further examples use the next seeds. The examples are the
            same in every episode, so their seeds should not be used in training and evaluation. If
            the environment has separate items for training and evaluation, the examples use the
            training items.
    """

    def __init__(self, env: gym.Env[str, str], count: int = 2, *, seed: int = 2**31) -> None:
        check_range("count", count, 1, 100)
        super().__init__(env, count=count, seed=seed)
        self.observation_space = FreeText()
        source = _training_env(env)
        self.examples = "\n\n".join(self._play_example(source, seed + i) for i in range(count))

    def _play_example(self, env: gym.Env[str, str], seed: int) -> str:
        """Play an episode with the expert; return its observations and actions as one text."""
        base: Any = env.unwrapped
        text, _ = env.reset(seed=seed)
        lines, done = [text], False
        while not done:
            action = base.expert()
            text, _, terminated, truncated, _ = env.step(action)
            lines += [f"> {action}", text]
            done = terminated or truncated
        return "\n".join(line for line in lines if line)

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        return f"Examples:\n{self.examples}\n\nNow you:\n{text}", info


def _training_env(env: gym.Env[str, str]) -> gym.Env[str, str]:
    """Return an environment that draws training items.

    If `env` has separate items for training and evaluation, and its `split` is not "train", the
    result is a new environment with `split="train"`. Otherwise, the result is `env`.
    """
    spec = env.unwrapped.spec
    if spec is None or not has_separate_splits(spec.id) or spec.kwargs.get("split") == "train":
        return env
    return gym.make(spec.id, **{**spec.kwargs, "split": "train"})


class ObservationNoise(TextWrapper):
    """Replace each word of an observation by `_` with some probability.

    Args:
        env: The environment.
        drop: Probability that a word is replaced.
    """

    def __init__(self, env: gym.Env[str, str], drop: float = 0.1) -> None:
        check_range("drop", drop, 0.0, 1.0)
        super().__init__(env, drop=drop)
        self.observation_space = FreeText()
        self._drop = drop
        self._rng = np.random.default_rng(0)

    def _with_noise(self, text: str) -> str:
        """Replace each word by `_` with probability `drop`."""
        # The white space between words is preserved.
        pieces = re.split(r"(\s+)", text)
        keeps = self._rng.random(len(pieces)) >= self._drop
        return "".join(
            piece if keep or not piece.strip() else "_"
            for piece, keep in zip(pieces, keeps, strict=True)
        )

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        if seed is not None:
            # Use a separate generator, so that the noise does not change the episode.
            self._rng = np.random.default_rng([seed, 1])
        return self._with_noise(text), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        text, reward, terminated, truncated, info = self.env.step(action)
        return self._with_noise(text), reward, terminated, truncated, info


class RewardCallable(TextWrapper):
    """Reward the whole conversation at the end of the episode, for example with a reward model.

    `info["env_reward"]` is the reward of the environment for each turn. `info["scored"]` is True
    if the function has returned a score. Before the end of the episode, or if the function returns
    None, `info["scored"]` is False and the reward of the function is 0.0.

    Args:
        env: The environment.
        reward: Function that scores a batch of conversations; it is called with a batch of one.
        mix: "replace" uses only the reward of the function. "add" uses the sum of this reward and
            the reward of the environment.
    """

    def __init__(
        self, env: gym.Env[str, str], reward: RewardFunction, *, mix: str = "replace"
    ) -> None:
        check_choice("mix", mix, ("replace", "add"))
        super().__init__(env, reward=reward, mix=mix)
        self._reward, self._mix = reward, mix
        self._conversation: Conversation = []

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        system = getattr(self.unwrapped, "system_prompt", None)
        start = [{"role": "system", "content": system}] if system else []
        self._conversation = [*start, *info.get("messages", []), {"role": "user", "content": text}]
        return text, {**info, "env_reward": 0.0, "scored": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        self._conversation.append({"role": "assistant", "content": action})
        text, env_reward, terminated, truncated, info = self.env.step(action)
        env_reward = float(env_reward)
        reward, scored = (env_reward if self._mix == "add" else 0.0), False
        if terminated or truncated:
            conversation = [dict(message) for message in self._conversation]
            (score,) = self._reward([conversation])
            scored = score is not None
            reward += float(score) if score is not None else 0.0
        self._conversation.append({"role": "user", "content": text})
        info = {**info, "env_reward": env_reward, "scored": scored}
        return text, reward, terminated, truncated, info


class CostBudget(TextWrapper):
    """End the episode (terminated) when its costs exceed a budget.

    The cost of a step is `info["cost"]` of the environment. `info["spent"]` is the sum of the costs
    so far.

    Args:
        env: The environment.
        budget: Largest allowed sum of costs in an episode.
        penalty: Amount that is subtracted from the reward of the action that exceeds the budget.
    """

    def __init__(self, env: gym.Env[str, str], budget: float, *, penalty: float = 0.0) -> None:
        check_range("budget", budget, 0.0, float("inf"))
        super().__init__(env, budget=budget, penalty=penalty)
        self._budget, self._penalty, self._spent = budget, penalty, 0.0

    def after_reset(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        self._spent = 0.0
        return text, {**info, "spent": 0.0}

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        text, reward, terminated, truncated, info = self.env.step(action)
        self._spent += info.get("cost", 0.0)
        if self._spent > self._budget:
            reward, terminated = float(reward) - self._penalty, True
        return text, reward, terminated, truncated, {**info, "spent": self._spent}
