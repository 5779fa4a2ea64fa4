"""The text vector environment, and a vector entry point for every registered id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlhf.errors import UserError


class TextVectorEnv(SyncVectorEnv[tuple[str, ...], Sequence[str | None]]):
    """Environments stepped together, where a row may rest.

    gymnasium's vector environments either reset a finished row at once (which wastes a generated
    reply or replaces its last observation) or forbid any step while one row is finished. A group of
    rollouts from one prompt needs a third way: the action `None` leaves its row as it is
    ("parked"), so that the others can go on. Resets take one seed per row, equal ones included;
    with `options={"reset_mask": mask}` only some rows start again.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[str, str]]]) -> None:
        """One function per row, each of which makes an environment."""
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        # batch_space copies the first row's space, whose samples are legal in that row only.
        self.action_space = gym.spaces.Tuple([env.action_space for env in self.envs])

    def step(
        self, actions: Sequence[str | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row whose action is not None.

        A parked row gives "" and reward 0, keeps its terminated and truncated flags, and has no
        info (gymnasium's `_key` masks say so).

        Raises:
            UserError: the number of actions is not the number of rows, or a finished row got an
            action.
        """
        if len(actions) != self.num_envs:
            raise UserError(
                f"{self.num_envs} rows need {self.num_envs} actions, got {len(actions)}"
            )
        finished = self._terminations | self._truncations
        observations: list[str] = [""] * self.num_envs
        infos: list[dict[str, Any]] = [{} for _ in observations]
        self._rewards = np.zeros(self.num_envs)
        for row, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            if action is None:
                continue
            if finished[row]:
                raise UserError(
                    f"row {row} is finished: pass None to park it, or reset it with "
                    "options={'reset_mask': ...}"
                )
            text, reward, terminated, truncated, infos[row] = env.step(action)
            observations[row], self._rewards[row] = text, float(reward)
            self._terminations[row], self._truncations[row] = terminated, truncated
        self._env_obs = observations
        self._observations = tuple(observations)
        return (
            self._observations,
            self._rewards.copy(),
            self._terminations.copy(),
            self._truncations.copy(),
            batch_infos(infos),
        )


def batch_infos(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """Info dictionaries of rows as one of arrays [rows], each with a mask `_key` of rows that had
    it.

    gymnasium's form, but made at once, and with a type that holds every row's value: gymnasium
    takes the first row's, so that 0.5 becomes 0 when another row said 1. Rows without the key hold
    zero, or None where values are not numbers.
    """
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        has = [key in info for info in infos]
        values = [info[key] for info in infos if key in info]
        kinds = {type(value) for value in values}
        if kinds == {dict}:
            batch[key] = batch_infos([info.get(key, {}) for info in infos])
        else:
            numeric = kinds <= {bool, int, float}
            column = np.zeros(len(infos), _widest(kinds)) if numeric else np.full(len(infos), None)
            for row, info in enumerate(infos):
                if has[row]:
                    column[row] = info[key]
            batch[key] = column
        batch[f"_{key}"] = np.array(has)
    return batch


def _widest(kinds: set[type]) -> type:
    """A number type that holds all of these."""
    return float if float in kinds else int if int in kinds else bool


def make_text_vector(
    env_id: str, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any
) -> TextVectorEnv:
    """A `TextVectorEnv` of `num_envs` copies of a registered environment."""
    make = partial(gym.make, env_id, max_episode_steps=max_episode_steps, **kwargs)
    return TextVectorEnv([make] * num_envs)


def __getattr__(name: str) -> Callable[..., TextVectorEnv]:
    """Let `"rlhf.envs.vector:namespace/Name-v0"` be a vector entry point.

    An entry point is a string so that specs can be written as JSON, and gymnasium does not tell it
    which id it serves; so the id is the attribute's name.
    """
    if "-v" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(make_text_vector, name)
