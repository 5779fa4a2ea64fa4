"""Wrappers for experiments: memory, invalid actions, examples, noise, rewards, budgets.

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
from rlhf.envs.items import is_separable
from rlhf.errors import UserError

Info = dict[str, Any]
MAX_SKIPPED_TURNS = 1000


class TextWrapper(RecordConstructorArgs, gym.Wrapper[str, str, str, str]):
    """Base class of the wrappers; subclasses define `start`, `step` or both.

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
        return self.start(text, info, seed)

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        """Return the observation and info of `reset`, given those of the wrapped environment."""
        return text, info


class History(TextWrapper):
    """Prepend the past turns of the episode to each observation.

    Use it for agents that see only the current observation. Rollouts keep the conversation
    themselves, so they do not need this wrapper; their memory window is a rollout setting.

    Args:
        env: The environment.
        turns: Number of past turns (an observation and its reply) to show; None shows all. With 0
            the agent has no memory.
    """

    def __init__(self, env: gym.Env[str, str], turns: int | None = None) -> None:
        if turns is not None and turns < 0:
            raise UserError(f"turns must be None or at least 0, got {turns}")
        super().__init__(env, turns=turns)
        self.observation_space = FreeText()
        self._past: deque[str] = deque(maxlen=turns)
        self._latest = ""

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
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
        penalty: Subtracted from the reward of each invalid action.
        end: Whether the first invalid action ends the episode (terminated). The cost that the same
            action would have had in the remaining turns is then subtracted from the reward, so that
            ending early is never an advantage.
        substitute: "random" replaces an invalid action by a random legal one
            (`info["substituted"]` is then True); None passes it on.
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
                f"penalty is subtracted from the reward, so it must be >= 0, got {penalty}"
            )
        if substitute is not None and (end or penalty):
            raise UserError("substitute replaces every invalid action: drop end and penalty")
        super().__init__(env, penalty=penalty, end=end, substitute=substitute)
        self._penalty, self._end, self._substitute = penalty, end, substitute
        self._rng = np.random.default_rng(0)

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        if seed is not None:
            # A separate generator, so that substitution does not change the episode's other draws.
            self._rng = np.random.default_rng([seed, 2])
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        replaced = False
        if self._substitute is not None:
            base: Any = self.env.unwrapped
            if action not in base.legal_actions() and not self._is_valid(action):
                action, replaced = base.sample_action(self._rng), True
        text, reward, terminated, truncated, info = self.env.step(action)
        if self._substitute is not None:
            info = {**info, "substituted": replaced}
        if not info.get("valid", True):
            reward = float(reward) - self._penalty
            if self._end and not (terminated or truncated):
                reward, terminated = reward + min(0.0, self._skipped_reward(action)), True
        return text, reward, terminated, truncated, info

    def _is_valid(self, action: str) -> bool:
        """Return whether a copy of the environment accepts an action that is not listed.

        An action can be written in several ways, such as `arm 2` and `2`.
        """
        try:
            trial = copy.deepcopy(self.env)
        except Exception:  # third-party objects may raise anything; then only listed ones are valid
            return False
        return bool(trial.step(action)[4].get("valid", False))

    def _skipped_reward(self, action: str) -> float:
        """Return the sum of rewards if the action is repeated until the episode ends."""
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
        count: Number of episodes to show, played by the environment's expert.
        seed: Seed of the first example. The examples are the same in every episode, so their seeds
            should not be used in training and evaluation. If the environment has separate items for
            training and evaluation, the examples use those of training.
    """

    def __init__(self, env: gym.Env[str, str], count: int = 2, *, seed: int = 2**31) -> None:
        check_range("count", count, 1, 100)
        super().__init__(env, count=count, seed=seed)
        self.observation_space = FreeText()
        source = _training_env(env)
        self.examples = "\n\n".join(self._example(source, seed + i) for i in range(count))

    def _example(self, env: gym.Env[str, str], seed: int) -> str:
        base: Any = env.unwrapped
        text, _ = env.reset(seed=seed)
        lines, done = [text], False
        while not done:
            action = base.expert()
            text, _, terminated, truncated, _ = env.step(action)
            lines += [f"> {action}", text]
            done = terminated or truncated
        return "\n".join(line for line in lines if line)

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        return f"Examples:\n{self.examples}\n\nNow you:\n{text}", info


def _training_env(env: gym.Env[str, str]) -> gym.Env[str, str]:
    """Return the environment, or a copy with the training items if these are separate."""
    spec = env.unwrapped.spec
    if spec is None or not is_separable(spec.id) or spec.kwargs.get("split") == "train":
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

    def _blur(self, text: str) -> str:
        # Split into words and white space so that the layout is preserved.
        pieces = re.split(r"(\s+)", text)
        keeps = self._rng.random(len(pieces)) >= self._drop
        return "".join(
            piece if keep or not piece.strip() else "_"
            for piece, keep in zip(pieces, keeps, strict=True)
        )

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        if seed is not None:
            # A separate generator, so that the noise does not change the episode.
            self._rng = np.random.default_rng([seed, 1])
        return self._blur(text), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        text, reward, terminated, truncated, info = self.env.step(action)
        return self._blur(text), reward, terminated, truncated, info


class RewardCallable(TextWrapper):
    """Reward the whole conversation at the end of the episode, for example with a reward model.

    The environment's own reward of each turn is in `info["env_reward"]`. `info["scored"]` is False
    before the end of the episode, and if the function returns None; the function then adds 0.0.

    Args:
        env: The environment.
        reward: Scores a batch of conversations; called with a batch of one.
        mix: "replace" uses only the function's reward, "add" adds it to the environment's.
    """

    def __init__(
        self, env: gym.Env[str, str], reward: RewardFunction, *, mix: str = "replace"
    ) -> None:
        check_choice("mix", mix, ("replace", "add"))
        super().__init__(env, reward=reward, mix=mix)
        self._reward, self._mix = reward, mix
        self._conversation: Conversation = []

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
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

    Costs are the environment's `info["cost"]`; `info["spent"]` is their sum so far.

    Args:
        env: The environment.
        budget: Largest sum of costs.
        penalty: Subtracted from the reward of the action that exceeds the budget.
    """

    def __init__(self, env: gym.Env[str, str], budget: float, *, penalty: float = 0.0) -> None:
        check_range("budget", budget, 0.0, float("inf"))
        super().__init__(env, budget=budget, penalty=penalty)
        self._budget, self._penalty, self._spent = budget, penalty, 0.0

    def start(self, text: str, info: Info, seed: int | None) -> tuple[str, Info]:
        self._spent = 0.0
        return text, {**info, "spent": 0.0}

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        text, reward, terminated, truncated, info = self.env.step(action)
        self._spent += info.get("cost", 0.0)
        if self._spent > self._budget:
            reward, terminated = float(reward) - self._penalty, True
        return text, reward, terminated, truncated, {**info, "spent": self._spent}
