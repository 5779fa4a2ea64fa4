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
    """Vector environment in which each row can be skipped in a step.

    A row is one environment of the vector. gymnasium's vector environments either reset a finished
    row at once (which wastes a generated reply or replaces the last observation), or forbid any
    step while a row is finished. In this class, the action `None` skips a row, so that the
    other rows can continue. `reset` takes one seed per row; seeds may be equal. With
    `options={"reset_mask": mask}`, `reset` resets only the rows whose mask is set.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[str, str]]]) -> None:
        """Create the environments.

        Args:
            env_fns: For each row, a function that creates the environment.
        """
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        # gymnasium's batch_space would copy the space of the first row. The samples of this space
        # are legal actions only in the first row.
        self.action_space = gym.spaces.Tuple([env.action_space for env in self.envs])

    def step(
        self, actions: Sequence[str | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row whose action is not None.

        A skipped row has the observation "" and reward 0, and keeps its terminated and truncated
        flags. It has no info: in gymnasium's info format, each mask `_key` is False for this row.

        Raises:
            UserError: The number of actions differs from the number of rows, or a finished row has
                an action.
        """
        if len(actions) != self.num_envs:
            raise UserError(
                f"{self.num_envs} environments need {self.num_envs} actions, got {len(actions)}"
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
                    f"row {row} is finished: pass None to skip the row, or reset it with "
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
    """Merge the info dictionaries of B rows into one dictionary of arrays [B].

    For each key, `_key` is a mask [B] of the rows that have the key. In the array of the key, the
    other rows contain zero, or None if the values are not numbers. The format is gymnasium's,
    except that an array has a type that can represent the values of all rows. gymnasium uses the
    type of the first row, which turns 0.5 into 0 if the first row contains the int 1. Values that
    are dictionaries are merged recursively.
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
    """Create a `TextVectorEnv` with `num_envs` rows of a registered environment.

    `kwargs` and `max_episode_steps` are passed to `gym.make`.
    """
    make = partial(gym.make, env_id, max_episode_steps=max_episode_steps, **kwargs)
    return TextVectorEnv([make] * num_envs)


def __getattr__(name: str) -> Callable[..., TextVectorEnv]:
    """Return the factory for the environment id `name`.

    `"rlhf.envs.vector:namespace/Name-v0"` is therefore a valid vector entry point. Each id
    needs its own entry point, because gymnasium does not pass the id to the entry point, and
    because an entry point must be a string so that the spec can be serialized as JSON.
    """
    if "-v" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(make_text_vector, name)
