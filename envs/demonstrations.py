"""Training data from an environment that knows its optimum: demonstrations and preference pairs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.envs.core import Conversation, TextEnv, check_choice, check_range
from rlhf.envs.items import split_kwargs
from rlhf.errors import UserError

Row = dict[str, Any]
KINDS = ("sft", "preference")
FORMATS = ("messages", "prompt_completion")
MARGIN = 1e-9
"""Values closer than this are equal: no preference."""


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
    """Write `count` rows of JSON lines, and return a summary.

    - kind "sft", form "messages": `{"messages": [...], "return": x, "seed": s}`, an episode a row;
    - kind "sft", form "prompt_completion": `{"prompt": [...], "completion": [...]}`, a turn a row;
    - kind "preference": `{"prompt": [...], "chosen": [...], "rejected": [...], "margin": m}`, a
    turn a
      row: two legal actions, the better one by optimal action value chosen. `quality` is how well
          the
      episodes are played between which turns are drawn, not how often labels are right.

    Where the environment keeps items of training and evaluation apart, rows are of the training
    split unless `split` is given.

    Args:
        env_id: A registered environment that knows its expert (for preferences: its action values).
        path: The file; its folder is created, and a file there is replaced.
        count: Rows.
        quality: 1.0 is the expert; below, each action (in the preference bandit each slot) is
            random with probability `1 - quality`.
        seed: Episodes use the seeds from here on.
        kind: "sft" or "preference".
        form: Of sft rows.
        system_prompt: Whether conversations open with the environment's system prompt.

    Raises:
        UserError: an unknown kind or form, or an environment that cannot show what is asked of it.
    """
    check_choice("kind", kind, KINDS)
    check_choice("form", form, FORMATS)
    check_range("quality", quality, 0.0, 1.0)
    check_range("count", count, 1, 10**9)
    env = gym.make(env_id, **split_kwargs(env_id, env_kwargs, "train")).unwrapped
    if not isinstance(env, TextEnv):
        raise UserError(f"{env_id} is not one of our text environments and has no expert to ask")
    player = _Player(env, quality, seed, system_prompt)
    rows = {
        ("sft", "messages"): player.episodes,
        ("sft", "prompt_completion"): player.turns,
        ("preference", form): player.pairs,
    }[kind, form]
    try:
        written = list(itertools.islice(rows(), count))
    except NotImplementedError as error:
        raise UserError(f"{env_id} cannot write {kind} rows: {error}") from error
    _write(Path(path), written)
    return {
        "path": str(path),
        "env": env_id,
        "kind": kind,
        "rows": len(written),
        "episodes": len(player.returns),
        "quality": quality,
        "mean_return": float(np.mean(player.returns)) if player.returns else None,
        "first_seed": seed,
        "last_seed": player.seed - 1,
    }


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _Player:
    """Plays episodes and yields rows; keeps the returns that it saw."""

    def __init__(self, env: TextEnv, quality: float, seed: int, system_prompt: bool) -> None:
        self.env, self.quality, self.seed, self.returns = env, quality, seed, []
        self._system = env.system_prompt if system_prompt else None
        self._rng = np.random.default_rng([seed, 0])

    def _play(self) -> Iterator[tuple[Conversation, str]]:
        """One episode: before each action, the conversation so far and the action to be taken."""
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

    def episodes(self) -> Iterator[Row]:
        """Whole conversations."""
        while True:
            seed = self.seed
            for prompt, action in self._play():
                last = [*prompt, {"role": "assistant", "content": action}]
            yield {"messages": last, "return": self.returns[-1], "seed": seed}

    def turns(self) -> Iterator[Row]:
        """Single turns."""
        while True:
            for prompt, action in self._play():
                yield {"prompt": prompt, "completion": _reply(action)}

    def pairs(self) -> Iterator[Row]:
        """Two legal actions of different value, in states that the player visits.

        Raises:
            UserError: a hundred episodes in a row have no state in which actions differ in value.
        """
        fruitless = 0
        while fruitless < 100:
            fruitless += 1
            for prompt, _ in self._play():
                values = self.env.action_values()
                pair = self._two(values)
                if pair is not None:
                    fruitless = 0
                    better, worse = pair
                    margin = values[better] - values[worse]
                    yield {
                        "prompt": prompt,
                        "chosen": _reply(better),
                        "rejected": _reply(worse),
                        "margin": margin,
                    }
        raise UserError("no preference to write: all actions have equal value in every state seen")

    def _two(self, values: dict[str, float]) -> tuple[str, str] | None:
        """Two uniformly drawn actions of different value, the better one first."""
        actions = list(values)
        first = actions[int(self._rng.integers(len(actions)))]
        others = [a for a in actions if abs(values[a] - values[first]) > MARGIN]
        if not others:
            return None
        second = others[int(self._rng.integers(len(others)))]
        return (first, second) if values[first] > values[second] else (second, first)


def _reply(action: str) -> Conversation:
    return [{"role": "assistant", "content": action}]
