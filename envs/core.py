"""The base of every text environment: a text space and `TextEnv`.

An observation is only the *new* text of this turn, an action is a reply. Everything random comes
from `np_random`, so one seed is one episode. Beside the gymnasium interface an environment knows
its own ground truth: `optimal_value()`, `random_value()`, `action_values()`, `expert()`,
`legal_actions()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from rlhf.errors import UserError

Conversation = list[dict[str, str]]
Step = tuple[str, float, bool, bool, dict[str, Any]]

MAX_LENGTH = 1_000_000
"""Characters that a text may have at most."""


class FreeText(gym.Space[str]):
    """Every unicode string of `min_length` to `max_length` characters.

    `gymnasium.spaces.Text` lists its alphabet, which makes a full unicode space take seconds to
    build and to compare. It is also misread by `AsyncVectorEnv` with its default shared memory
    (constant observations, silently). This space is no `Text`, so that `AsyncVectorEnv` refuses it
    with an error that names the remedy, `shared_memory=False`.
    """

    def __init__(
        self,
        max_length: int = MAX_LENGTH,
        *,
        min_length: int = 0,
        sampler: Callable[[np.random.Generator], str] | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        """`sampler` draws what `sample()` returns; by default a few printable characters."""
        if not 0 <= min_length <= max_length:
            raise UserError(
                f"FreeText needs 0 <= min_length <= max_length, got {min_length} and {max_length}"
            )
        super().__init__(shape=None, dtype=None, seed=seed)
        self.min_length = min_length
        self.max_length = max_length
        self._sampler = sampler

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed-size array form."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Draw a text: a legal action where the environment gave a sampler."""
        if mask is not None or probability is not None:
            raise UserError(
                "FreeText.sample takes no mask and no probability: the alphabet is open"
            )
        if self._sampler is not None:
            return self._sampler(self.np_random)
        length = int(self.np_random.integers(self.min_length, min(self.max_length, 32) + 1))
        return "".join(chr(code) for code in self.np_random.integers(32, 127, size=length))

    def contains(self, x: Any) -> bool:
        """True for a string of allowed length, whatever its characters."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        """Two text spaces are equal when they admit the same lengths."""
        return (
            isinstance(other, FreeText)
            and self.min_length == other.min_length
            and self.max_length == other.max_length
        )

    def __repr__(self) -> str:
        """`FreeText(min_length, max_length)`."""
        return f"FreeText({self.min_length}, {self.max_length})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FreeText:
        """Copy the bounds and share the sampler: a deep copy of it would copy the environment."""
        return FreeText(self.max_length, min_length=self.min_length, sampler=self._sampler)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the sampler out of a pickle, for the same reason."""
        return {**self.__dict__, "_sampler": None}

    def __setstate__(self, state: Any) -> None:
        """Restore what `__getstate__` gave."""
        self.__dict__.update(state)


class TextEnv(gym.Env[str, str]):
    """A gymnasium environment that speaks.

    Subclasses write `reset` and `step` as usual, build each step's result with `turn`, and answer
    the questions about ground truth that they can answer. A rule of the task that ends the episode
    (a turn budget included) is `terminated`; `truncated` is left to wrappers and harnesses.

    Every info dictionary carries, with fixed types: `is_success` (bool, absent where the task knows
    no success), `valid` (bool, the action was understood), `cost` (float, for constrained tasks)
    and `reason` (str, "" or why the action was invalid or the episode ended).
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 (gymnasium's own type)
    system_prompt: str | None = None
    """What the agent is told before the first observation; instructions that hold for all
    episodes.
    """
    max_turns: int = 1
    """The longest possible episode, in actions."""
    separable: ClassVar[bool] = False
    """Whether the keyword argument `split` ("all", "train", "test") keeps items of training and
    evaluation apart by content.
    """
    items: ClassVar[str] = "unknown"
    """What differs between episodes, and hence what an evaluation shares with training."""

    def __init__(self, *, render_mode: str | None = None) -> None:
        if render_mode not in (None, "ansi"):
            raise UserError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.render_mode = render_mode
        self.observation_space = FreeText()
        self.action_space = FreeText(sampler=self.sample_action)
        self._last_text = ""

    def legal_actions(self) -> list[str]:
        """Actions that are meaningful in the present state; the uniform policy over them is
        `random`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not list its legal actions")

    def sample_action(self, rng: np.random.Generator) -> str:
        """Draw a legal action uniformly."""
        actions = self.legal_actions()
        return actions[int(rng.integers(len(actions)))]

    def action_values(self) -> dict[str, float]:
        """Value of each legal action here when the optimal policy follows, given what the agent
        saw.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know its action values")

    def best_action(self) -> str:
        """An optimal action given what the agent saw (the first one where several tie)."""
        values = self.action_values()
        return max(values, key=values.__getitem__)

    def expert(self, rng: np.random.Generator | None = None, *, quality: float = 1.0) -> str:
        """The best action with probability `quality`, else a uniformly random legal one.

        The draw comes from `rng`, never from the environment's own generator, so that watching an
        expert does not change the episode.
        """
        if not 0.0 <= quality <= 1.0:
            raise UserError(f"quality is a probability between 0 and 1, got {quality}")
        if quality < 1.0:
            if rng is None:
                raise UserError(
                    "an expert with quality below 1 needs a generator: expert(rng, ...)"
                )
            if rng.random() >= quality:
                return self.sample_action(rng)
        return self.best_action()

    def optimal_value(self) -> float:
        """Expected return of the best policy that sees what the agent sees, computed, not typed
        in.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know its optimal value")

    def random_value(self) -> float:
        """Expected return of the uniform policy over `legal_actions()`."""
        raise NotImplementedError(f"{type(self).__name__} does not know its random value")

    def cost_price(self) -> float:
        """What a unit of `info["cost"]` is worth in reward at the optimum of a constrained task.

        No policy's return less this price times its cost beyond `cost_limit` is above
        `optimal_value()`. 0.0 where costs do not count.
        """
        return 0.0

    def reference_values(self) -> dict[str, float]:
        """Exact expected returns of further named policies that teach something, if any."""
        return {}

    def opening(self, text: str, **info: Any) -> tuple[str, dict[str, Any]]:
        """What `reset` returns: the first observation and an info dictionary."""
        self._last_text = text
        return text, {"valid": True, "cost": 0.0, "reason": "", **info}

    def turn(
        self,
        text: str,
        reward: float,
        done: bool,
        *,
        success: bool | None = False,
        valid: bool = True,
        cost: float = 0.0,
        reason: str = "",
        **info: Any,
    ) -> Step:
        """What `step` returns; further keyword arguments join the info dictionary."""
        self._last_text = text
        info.update(valid=valid, cost=cost, reason=reason)
        if success is not None:
            info["is_success"] = success
        return text, reward, done, False, info

    def render(self) -> str | None:  # type: ignore[override]
        """The latest observation, in render mode `ansi`."""
        return self._last_text if self.render_mode == "ansi" else None


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise one readable UserError when `value` is none of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise one readable UserError when `value` lies outside `[low, high]`."""
    if not low <= value <= high:
        raise UserError(f"{name} must lie between {low} and {high}, got {value}")


def turns_left(count: int) -> str:
    """The turns that remain, as a sentence."""
    return f"{count} turn left." if count == 1 else f"{count} turns left."


def plain(action: str) -> str:
    """An action in lower case, blanks squeezed, without quotes, stops or marks around it."""
    return " ".join(action.lower().split()).strip(" \"'`.!")
