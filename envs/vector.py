"""A vector environment of text environments, and a vector entry point for every registered id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlhf.errors import UserError


class TextVectorEnv(SyncVectorEnv[tuple[str, ...], Sequence[str | None]]):
    """Vector environment in which single rows can be paused.

    gymnasium's vector environments either reset a finished row at once (which wastes a generated
    reply or replaces its last observation) or forbid any step while one row is finished. A group of
    rollouts from one prompt needs a third mode: the action `None` skips its row, so that the other
    rows can continue. `reset` takes one seed per row, which may be equal; with
    `options={"reset_mask": mask}` it resets only some rows.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[str, str]]]) -> None:
        """Create the environments.

        Args:
            env_fns: One function per row that creates its environment.
        """
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        # batch_space would copy the first row's space, whose samples are legal in that row only.
        self.action_space = gym.spaces.Tuple([env.action_space for env in self.envs])

    def step(
        self, actions: Sequence[str | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row whose action is not None.

        A skipped row gets the observation "" and reward 0, keeps its terminated and truncated
        flags, and has no info (see gymnasium's `_key` masks).

        Raises:
            UserError: The number of actions differs from the number of rows, or a finished row has
                an action.
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
                    f"row {row} is finished: pass None to skip it, or reset it with "
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
    """Merge the info dictionaries of rows into arrays [rows], each with a mask `_key` [rows].

    The format is gymnasium's, but the type of an array holds the values of all rows. gymnasium uses
    the type of the first row, which turns 0.5 into 0 if the first row has the int 1. Rows without
    the key hold zero, or None if the values are not numbers.
    """
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        has = [key in info for info in infos]
        values = [info[key] for info in infos if key in info]
        types = {type(value) for value in values}
        if types == {dict}:
            batch[key] = batch_infos([info.get(key, {}) for info in infos])
        else:
            column = np.full(len(infos), None)
            if types <= {bool, int, float}:
                column = np.zeros(len(infos), np.result_type(*types))
            for row, info in enumerate(infos):
                if has[row]:
                    column[row] = info[key]
            batch[key] = column
        batch[f"_{key}"] = np.array(has)
    return batch


def make_text_vector(
    env_id: str, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any
) -> TextVectorEnv:
    """Create a `TextVectorEnv` of `num_envs` copies of a registered environment."""
    make = partial(gym.make, env_id, max_episode_steps=max_episode_steps, **kwargs)
    return TextVectorEnv([make] * num_envs)


def __getattr__(name: str) -> Callable[..., TextVectorEnv]:
    """Make `"rlhf.envs.vector:namespace/Name-v0"` a vector entry point.

    Entry points are strings, so that specs can be written as JSON, and gymnasium does not pass the
    environment id to them. The id is therefore the attribute name.
    """
    if "-v" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(make_text_vector, name)
