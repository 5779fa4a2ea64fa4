"""Factors of an experiment as wrappers: memory, invalid actions, examples, noise, rewards, budgets.

Each wraps any environment with text observations and text actions, ours or a stranger's.
`rlhf.envs.parsing` has the one that takes actions out of longer replies.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from rlhf.envs.core import Conversation, FreeText, check_choice, check_range
from rlhf.envs.items import is_separable
from rlhf.errors import UserError

RewardFunction = Callable[[list[Conversation]], Sequence[float | None]]
Wrapper = gym.Wrapper[str, str, str, str]
MAX_TURNS_LEFT_OUT = 1000


def system_prompt_of(env: gym.Env[Any, Any]) -> str | None:
    """The environment's system prompt; None for environments that know of none."""
    return getattr(env.unwrapped, "system_prompt", None)


class History(RecordConstructorArgs, Wrapper):
    """Observations repeat what was said before: the whole episode, or its last turns.

    For agents that see one observation at a time. A rollout that keeps the conversation itself
    needs no `History`; there, a memory window is the rollout's setting.

    Args:
        env: The environment.
        turns: How many past turns (an observation and its reply) to show; None shows all. With 0
            the agent is memoryless.
    """

    def __init__(self, env: gym.Env[str, str], turns: int | None = None) -> None:
        if turns is not None and turns < 0:
            raise UserError(f"turns must be None or at least 0, got {turns}")
        RecordConstructorArgs.__init__(self, turns=turns)
        gym.Wrapper.__init__(self, env)
        self.observation_space = FreeText()
        self._past: deque[str] = deque(maxlen=turns)
        self._latest = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self._latest, info = self.env.reset(seed=seed, options=options)
        self._past.clear()
        return self._latest, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        self._past.append(f"{self._latest}\n> {action}")
        self._latest, reward, terminated, truncated, info = self.env.step(action)
        return "\n".join([*self._past, self._latest]), reward, terminated, truncated, info


class InvalidActions(RecordConstructorArgs, Wrapper):
    """What an action that the environment could not understand leads to.

    The environment itself lets it cost a turn and says so in `info["valid"]`; this adds to that.

    Args:
        env: The environment.
        penalty: Taken from the reward of each invalid action.
        end: Whether the first invalid action ends the episode (terminated). Leaving early must not
            pay: what the same action would have cost in the turns that were left is taken from the
            reward too, as far as the environment charges for it.
        substitute: "random" puts a legal action in the place of an unlisted one before the
            environment sees it (`info["substituted"]` says so); None leaves it.
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
            raise UserError(f"penalty is taken from the reward, so it must be >= 0, got {penalty}")
        if substitute is not None and (end or penalty):
            raise UserError("substitute leaves no invalid action to punish: drop end and penalty")
        RecordConstructorArgs.__init__(self, penalty=penalty, end=end, substitute=substitute)
        gym.Wrapper.__init__(self, env)
        self._penalty, self._end, self._substitute = penalty, end, substitute
        self._rng = np.random.default_rng(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        if seed is not None:
            # A generator of its own: substitution must not change the episode's other draws.
            self._rng = np.random.default_rng([seed, 2])
        return self.env.reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        replaced = False
        if self._substitute is not None:
            base: Any = self.env.unwrapped
            if action not in base.legal_actions():
                action, replaced = base.sample_action(self._rng), True
        text, reward, terminated, truncated, info = self.env.step(action)
        if self._substitute is not None:
            info = {**info, "substituted": replaced}
        if not info.get("valid", True):
            reward = float(reward) - self._penalty
            if self._end and not (terminated or truncated):
                reward, terminated = reward + min(0.0, self._left_out(action)), True
        return text, reward, terminated, truncated, info

    def _left_out(self, action: str) -> float:
        """What the environment pays for the same action until it ends the episode itself."""
        total = 0.0
        for _ in range(MAX_TURNS_LEFT_OUT):
            _, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return total


class FewShot(RecordConstructorArgs, Wrapper):
    """The first observation opens with solved examples.

    Args:
        env: The environment.
        count: How many episodes to show, played by the environment's expert.
        seed: Of the first of them; the examples are the same in every episode, so keep their seeds
            out of training and evaluation. Where the environment keeps items of training and
            evaluation apart, the examples are of training.
    """

    def __init__(self, env: gym.Env[str, str], count: int = 2, *, seed: int = 2**31) -> None:
        check_range("count", count, 1, 100)
        RecordConstructorArgs.__init__(self, count=count, seed=seed)
        gym.Wrapper.__init__(self, env)
        self.observation_space = FreeText()
        source = _training_twin(env)
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

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        return f"Examples:\n{self.examples}\n\nNow you:\n{text}", info


def _training_twin(env: gym.Env[str, str]) -> gym.Env[str, str]:
    """The environment itself, or one that deals the items of training where those are apart."""
    spec = env.unwrapped.spec
    if spec is None or not is_separable(spec.id) or spec.kwargs.get("split") == "train":
        return env
    return gym.make(spec.id, **{**spec.kwargs, "split": "train"})


class ObservationNoise(RecordConstructorArgs, Wrapper):
    """Each word of an observation is lost with some probability.

    Args:
        env: The environment.
        drop: That probability.
    """

    def __init__(self, env: gym.Env[str, str], drop: float = 0.1) -> None:
        check_range("drop", drop, 0.0, 1.0)
        RecordConstructorArgs.__init__(self, drop=drop)
        gym.Wrapper.__init__(self, env)
        self.observation_space = FreeText()
        self._drop = drop
        self._rng = np.random.default_rng(0)

    def _blur(self, text: str) -> str:
        # Words and the blanks between them, so that the layout of what is kept survives.
        parts = re.split(r"(\s+)", text)
        kept = self._rng.random(len(parts)) >= self._drop
        return "".join(
            part if keep or not part.strip() else "_"
            for part, keep in zip(parts, kept, strict=True)
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            # A generator of its own: noise must not change the episode underneath.
            self._rng = np.random.default_rng([seed, 1])
        return self._blur(text), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        text, reward, terminated, truncated, info = self.env.step(action)
        return self._blur(text), reward, terminated, truncated, info


class RewardCallable(RecordConstructorArgs, Wrapper):
    """A function of the conversation pays, at the end of the episode: a reward model, for instance.

    The environment's own reward stays in `info["env_reward"]`, per turn. `info["scored"]` is False
    while the episode runs and where the function gave None (could not be scored; the reward is then
    0.0).

    Args:
        env: The environment.
        reward: Scores a batch of conversations; here the batch has one row.
        mix: "replace" pays only the function's reward, "add" adds it to the environment's.
    """

    def __init__(
        self, env: gym.Env[str, str], reward: RewardFunction, *, mix: str = "replace"
    ) -> None:
        check_choice("mix", mix, ("replace", "add"))
        RecordConstructorArgs.__init__(self, reward=reward, mix=mix)
        gym.Wrapper.__init__(self, env)
        self._reward, self._mix = reward, mix
        self._conversation: Conversation = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        system, earlier = system_prompt_of(self.env), info.get("messages", [])
        start = [{"role": "system", "content": system}] if system else []
        self._conversation = [*start, *earlier, {"role": "user", "content": text}]
        return text, {**info, "env_reward": 0.0, "scored": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._conversation.append({"role": "assistant", "content": action})
        text, own, terminated, truncated, info = self.env.step(action)
        own = float(own)
        paid, scored = (own if self._mix == "add" else 0.0), False
        if terminated or truncated:
            conversation = [dict(message) for message in self._conversation]
            (score,) = self._reward([conversation])
            scored = score is not None
            paid += float(score) if score is not None else 0.0
        self._conversation.append({"role": "user", "content": text})
        info = {**info, "env_reward": own, "scored": scored}
        return text, paid, terminated, truncated, info


class CostBudget(RecordConstructorArgs, Wrapper):
    """End the episode (terminated) once its costs exceed a budget.

    Costs are the environment's `info["cost"]`; `info["spent"]` is their sum so far.

    Args:
        env: The environment.
        budget: What may be spent.
        penalty: Taken from the reward of the action that exceeds it.
    """

    def __init__(self, env: gym.Env[str, str], budget: float, *, penalty: float = 0.0) -> None:
        check_range("budget", budget, 0.0, float("inf"))
        RecordConstructorArgs.__init__(self, budget=budget, penalty=penalty)
        gym.Wrapper.__init__(self, env)
        self._budget, self._penalty, self._spent = budget, penalty, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        self._spent = 0.0
        return text, {**info, "spent": 0.0}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        text, reward, terminated, truncated, info = self.env.step(action)
        self._spent += info.get("cost", 0.0)
        if self._spent > self._budget:
            reward, terminated = float(reward) - self._penalty, True
        return text, reward, terminated, truncated, {**info, "spent": self._spent}
