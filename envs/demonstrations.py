"""Demonstrations and preference pairs from environments with known optimal actions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.common.conversation import Conversation
from rlhf.common.files import write_jsonl
from rlhf.envs.catalog import find, make
from rlhf.envs.core import TextEnv, check_choice, check_range
from rlhf.envs.items import kwargs_for_split
from rlhf.errors import UserError

Row = dict[str, Any]
DEMONSTRATION_KINDS = ("sft", "preference")
FORMATS = ("messages", "prompt_completion")
EQUAL_VALUE_TOLERANCE = 1e-9
"""Action values whose difference is at most this value are treated as equal."""


def write_demonstrations(
    env_id: str,
    path: str | Path,
    *,
    count: int,
    quality: float = 1.0,
    seed: int = 0,
    kind: str = "sft",
    form: str = "messages",
    system_prompt: bool = True,
    **env_kwargs: Any,
) -> Row:
    """Write `count` rows as a JSON Lines file.

    The rows use the training split of the environment, unless `env_kwargs` contains `split`.

    Args:
        env_id: Environment id, as for `rlhf.envs.catalog.find`.
        path: Output file; its folder is created, and an existing file is replaced.
        count: Number of rows.
        quality: Probability of the expert's action; otherwise the action is random. In the
            preference bandit, this applies to each slot of the menu. Preference labels are always
            correct.
        seed: Seed of the first episode; further episodes use the next seeds.
        kind: "sft" or "preference". A preference row
            `{"prompt": [...], "chosen": [...], "rejected": [...], "margin": m}` contains two legal
            actions of one turn. The margin is the difference of their optimal action values.
        form: Format of "sft" rows: "messages", `{"messages": [...], "return": x, "seed": s}` per
            episode, or "prompt_completion", `{"prompt": [...], "completion": [...]}` per turn.
        system_prompt: Whether conversations begin with the environment's system prompt.
        **env_kwargs: Keyword arguments of the environment.

    Returns:
        A summary with the keys `path`, `env`, `kind`, `rows`, `quality`, `first_seed`, `last_seed`,
        `episodes` (number of finished episodes) and `mean_return` (None if no episode is finished).

    Raises:
        UserError: An argument is invalid, the environment has no expert or no action values, or no
            preference rows can be drawn.
    """
    check_choice("kind", kind, DEMONSTRATION_KINDS)
    check_choice("form", form, FORMATS)
    check_range("quality", quality, 0.0, 1.0)
    check_range("count", count, 1, 10**9)
    player = _DemonstrationPlayer(_training_env(env_id, env_kwargs), quality, seed, system_prompt)
    try:
        rows = list(itertools.islice(player.rows(kind, form), count))
    except NotImplementedError as error:
        raise UserError(f"{env_id} cannot write {kind} rows: {error}") from error
    write_jsonl(path, rows)
    return {
        "path": str(path),
        "env": env_id,
        "kind": kind,
        "rows": len(rows),
        "quality": quality,
        "first_seed": seed,
        **player.summary(),
    }


def _training_env(env_id: str, env_kwargs: dict[str, Any]) -> TextEnv:
    """Create an environment with its training split, unless the arguments name another split.

    Raises:
        UserError: The environment cannot be created, or is not a `TextEnv`.
    """
    env = make(env_id, **kwargs_for_split(find(env_id).id, env_kwargs, "train")).unwrapped
    if not isinstance(env, TextEnv):
        raise UserError(f"{env_id} is not a TextEnv, so it has no expert")
    return env


class _DemonstrationPlayer:
    """Play episodes and yield an endless sequence of rows.

    `returns` contains the returns of the finished episodes. `seed` is the seed of the next episode.
    """

    def __init__(self, env: TextEnv, quality: float, seed: int, system_prompt: bool) -> None:
        self.env, self.quality, self.seed = env, quality, seed
        self.returns: list[float] = []
        self._system = env.system_prompt if system_prompt else None
        self._rng = np.random.default_rng([seed, 0])

    def summary(self) -> Row:
        """Return the number and the mean return of the finished episodes, and the last seed."""
        mean = float(np.mean(self.returns)) if self.returns else None
        return {"episodes": len(self.returns), "mean_return": mean, "last_seed": self.seed - 1}

    def rows(self, kind: str, form: str) -> Iterator[Row]:
        """Yield rows of the kind and the form that `write_demonstrations` describes."""
        if kind == "preference":
            return self.preference_rows()
        return self.episode_rows() if form == "messages" else self.turn_rows()

    def _play_episode(self) -> Iterator[tuple[Conversation, str]]:
        """Play one episode; before each step, yield the conversation so far and the next action.

        The first step of the iterator increments `seed`. At the end, the return is appended to
        `returns`.
        """
        text, info = self.env.reset(seed=self.seed)
        self.seed += 1
        start = [{"role": "system", "content": self._system}] if self._system else []
        messages: Conversation = [*start, *info.get("messages", [])]
        total, done = 0.0, False
        while not done:
            messages.append({"role": "user", "content": text})
            action = self.env.expert(self._rng, quality=self.quality)
            yield [dict(message) for message in messages], action
            messages.append({"role": "assistant", "content": action})
            text, reward, terminated, truncated, _ = self.env.step(action)
            total, done = total + float(reward), terminated or truncated
        self.returns.append(total)

    def episode_rows(self) -> Iterator[Row]:
        """Yield one "messages" row per episode."""
        while True:
            seed = self.seed
            *_, (prompt, action) = self._play_episode()
            messages = [*prompt, *_reply(action)]
            yield {"messages": messages, "return": self.returns[-1], "seed": seed}

    def turn_rows(self) -> Iterator[Row]:
        """Yield one "prompt_completion" row per turn."""
        while True:
            for prompt, action in self._play_episode():
                yield {"prompt": prompt, "completion": _reply(action)}

    def preference_rows(self) -> Iterator[Row]:
        """Yield preference rows: two legal actions with different values in a visited state.

        Raises:
            UserError: No pair was found in 100 consecutive episodes.
        """
        episodes_without_pair = 0
        while episodes_without_pair < 100:
            episodes_without_pair += 1
            for prompt, _ in self._play_episode():
                values = self.env.action_values()
                pair = self._draw_better_and_worse_action(values)
                if pair is not None:
                    episodes_without_pair = 0
                    better, worse = pair
                    yield {
                        "prompt": prompt,
                        "chosen": _reply(better),
                        "rejected": _reply(worse),
                        "margin": values[better] - values[worse],
                    }
        raise UserError(
            "no preference rows: in 100 episodes, no two actions with different values were drawn "
            "in any state"
        )

    def _draw_better_and_worse_action(self, values: dict[str, float]) -> tuple[str, str] | None:
        """Draw two actions with different values and return (better action, worse action).

        The first action is drawn uniformly. The second one is drawn uniformly from the actions
        whose value differs. The result is None if there is no such action.
        """
        actions = list(values)
        first = actions[int(self._rng.integers(len(actions)))]
        others = [a for a in actions if abs(values[a] - values[first]) > EQUAL_VALUE_TOLERANCE]
        if not others:
            return None
        second = others[int(self._rng.integers(len(others)))]
        return (first, second) if values[first] > values[second] else (second, first)


def _reply(action: str) -> Conversation:
    return [{"role": "assistant", "content": action}]
