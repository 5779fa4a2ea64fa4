"""Base classes of the text environments: a text space and `TextEnv`.

An observation contains only the *new* text of a turn; an action is a reply. All randomness comes
from `np_random`, so the seed and the actions determine the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from rlhf.errors import UserError

Step = tuple[str, float, bool, bool, dict[str, Any]]
"""Observation, reward, terminated, truncated, info."""

MAX_LENGTH = 1_000_000
"""Default maximum length of texts in a `FreeText` space, in characters."""


class FreeText(gym.Space[str]):
    """Every unicode string of at most `max_length` characters.

    `gymnasium.spaces.Text` stores its alphabet, so creating or comparing a space of all unicode
    strings takes seconds. `AsyncVectorEnv` with its default shared memory also reads `Text` spaces
    incorrectly: it returns constant observations without an error. `FreeText` does not inherit from
    `Text`, so `AsyncVectorEnv` raises an error that suggests `shared_memory=False`.
    """

    def __init__(
        self,
        max_length: int = MAX_LENGTH,
        *,
        sampler: Callable[[np.random.Generator], str] | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        """Create a space of texts.

        Args:
            max_length: Maximum length of a text, in characters.
            sampler: Function that draws the result of `sample()`. By default, `sample()` draws at
                most 32 printable ASCII characters.
            seed: Seed or generator of `sample()`.
        """
        if max_length < 0:
            raise UserError(f"max_length must be at least 0, got {max_length}")
        super().__init__(shape=None, dtype=None, seed=seed)
        self.max_length = max_length
        self._sampler = sampler

    @property
    def is_np_flattenable(self) -> bool:
        """Whether the space has an array form of fixed size; False for text."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Draw a text with the sampler.

        The sampler of an environment's action space draws legal actions.

        Raises:
            UserError: `mask` or `probability` is not None.
        """
        if mask is not None or probability is not None:
            raise UserError(
                "FreeText.sample takes no mask and no probability: every text is allowed"
            )
        if self._sampler is not None:
            return self._sampler(self.np_random)
        length = int(self.np_random.integers(0, min(self.max_length, 32) + 1))
        return "".join(chr(code) for code in self.np_random.integers(32, 127, size=length))

    def contains(self, x: Any) -> bool:
        """Return whether `x` is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        """Return whether `other` is a `FreeText` space with the same `max_length`."""
        return isinstance(other, FreeText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        """Return `FreeText(max_length)`."""
        return f"FreeText({self.max_length})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FreeText:
        """Copy the space without its random state. The sampler is shared, not copied.

        A copy of the sampler would contain the whole environment.
        """
        return FreeText(self.max_length, sampler=self._sampler)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the sampler, which would pickle the whole environment."""
        return {**self.__dict__, "_sampler": None}


class TextEnv(gym.Env[str, str]):
    """A gymnasium environment with text observations and text actions.

    Subclasses define `start` and `step`, and those of `legal_actions`, `action_values`,
    `optimal_value` and `random_value` that they can compute. `step` builds its result with `turn`,
    and subtracts 1 from `turns_left` if there are several turns. An environment whose `reset` needs
    the seed, or adds keys to the info dictionary, overrides `reset` and builds the result with
    `opening`. An episode that ends by a rule of the task, including a turn limit,
    is `terminated`. Only wrappers and the code that runs the environment set `truncated`.

    The info dictionaries of `reset` and `step` have these keys with fixed types: `valid` (bool:
    whether the action is a legal action of the task), `cost` (float: cost of the action, 0.0 in
    tasks without a cost constraint) and `reason` (str: why the action was invalid or why the
    episode ended; "" if there is no such reason). The info dictionary of `step` also has
    `is_success` (bool), except in tasks without a notion of success.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 (gymnasium's own type)
    system_prompt: str | None = None
    """Instructions that hold for all episodes, shown before the first observation."""
    max_turns: int = 1
    """Maximum number of actions in an episode."""
    separable: ClassVar[bool] = False
    """Whether the environment has a keyword argument `split`, whose values "train" and "test" give
    training and evaluation different items."""
    items: ClassVar[str] = "unknown"
    """Description of the content that differs between episodes, such as the prompt or the start
    state, and of whether evaluation uses the same content as training."""

    def __init__(self, *, max_turns: int | None = None, render_mode: str | None = None) -> None:
        """Create the environment.

        Args:
            max_turns: Maximum number of actions in an episode. By default, the class attribute
                `max_turns` is used.
            render_mode: With "ansi", `render()` returns the latest observation. With None,
                `render()` returns None.
        """
        if render_mode not in (None, "ansi"):
            raise UserError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.render_mode = render_mode
        if max_turns is not None:
            self.max_turns = max_turns
        self.turns_left = self.max_turns
        self.observation_space = FreeText()
        self.action_space = FreeText(sampler=self.sample_action)
        self._last_text = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Reset the number of remaining turns and start an episode with `start`."""
        super().reset(seed=seed)
        self.turns_left = self.max_turns
        return self.opening(self.start())

    def start(self) -> str:
        """Draw the content of an episode from `np_random` and return the first observation."""
        return ""

    def legal_actions(self) -> list[str]:
        """List the actions that are meaningful in the current state.

        The random policy draws uniformly from this list.
        """
        raise NotImplementedError(f"{type(self).__name__} does not list its legal actions")

    def sample_action(self, rng: np.random.Generator) -> str:
        """Draw a legal action uniformly."""
        actions = self.legal_actions()
        return actions[int(rng.integers(len(actions)))]

    def action_values(self) -> dict[str, float]:
        """Return the action value Q* of each legal action.

        A value is the expected sum of future rewards if the action is followed by optimal actions,
        given the observations so far.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute its action values")

    def best_action(self) -> str:
        """Return an optimal action given the observations so far.

        If several actions are optimal, the first one in `action_values()` is returned.
        """
        values = self.action_values()
        return max(values, key=values.__getitem__)

    def expert(self, rng: np.random.Generator | None = None, *, quality: float = 1.0) -> str:
        """Return the best action with probability `quality`, else a uniformly random legal action.

        The random numbers come from `rng` and not from the environment's generator, so that calling
        this method does not change the episode.

        Args:
            rng: Generator of the draw; required if `quality` is below 1.
            quality: Probability of the best action.
        """
        check_range("quality", quality, 0.0, 1.0)
        if quality == 1.0:
            return self.best_action()
        if rng is None:
            raise UserError("an expert with quality below 1 needs a generator: expert(rng, ...)")
        return self.imperfect_action(rng, quality)

    def imperfect_action(self, rng: np.random.Generator, quality: float) -> str:
        """Draw the action of an expert whose quality is below 1; see `expert`."""
        return self.sample_action(rng) if rng.random() >= quality else self.best_action()

    def optimal_value(self) -> float:
        """Return the highest expected return of any policy that sees only the observations.

        Implementations compute the value from the settings of the environment.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute its optimal value")

    def random_value(self) -> float:
        """Return the expected return of the uniform policy over `legal_actions()`."""
        raise NotImplementedError(f"{type(self).__name__} does not compute its random value")

    def cost_price(self) -> float:
        """Return the reward that equals one unit of `info["cost"]` at a constrained optimum.

        The price is the optimal Lagrange multiplier: for every policy, `expected return - price *
        (expected cost - cost_limit)` is at most `optimal_value()`. The price is 0.0 in tasks
        without a cost constraint.
        """
        return 0.0

    def reference_values(self) -> dict[str, float]:
        """Return name -> exact expected return of policies besides the optimal and random ones."""
        return {}

    def opening(self, text: str, **info: Any) -> tuple[str, dict[str, Any]]:
        """Build the result of `reset`: the first observation and an info dictionary."""
        self._last_text = text
        return text, {"valid": True, "cost": 0.0, "reason": "", **info}

    def turn(
        self,
        text: str,
        reward: float,
        done: bool = False,
        *,
        success: bool | None = False,
        valid: bool = True,
        cost: float = 0.0,
        reason: str = "",
        **info: Any,
    ) -> Step:
        """Build the result of `step`.

        Args:
            text: Observation.
            reward: Reward of the action.
            done: Whether the episode terminates. It also terminates if no turns are left.
            success: `info["is_success"]`; None in tasks without a notion of success, whose info
                dictionary does not have the key.
            valid: `info["valid"]`.
            cost: `info["cost"]`.
            reason: `info["reason"]`.
            **info: Further keys of the info dictionary.
        """
        self._last_text = text
        info.update(valid=valid, cost=cost, reason=reason)
        if success is not None:
            info["is_success"] = success
        return text, reward, done or self.turns_left <= 0, False, info

    def turns_left_text(self) -> str:
        """Return the sentence that states the number of remaining turns."""
        return f"{self.turns_left} turn{'' if self.turns_left == 1 else 's'} left."

    def render(self) -> str | None:  # type: ignore[override]
        """Return the latest observation in render mode `ansi`, otherwise None."""
        return self._last_text if self.render_mode == "ansi" else None


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a UserError if `value` is not one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a UserError if `value` is outside `[low, high]`."""
    if not low <= value <= high:
        raise UserError(f"{name} must lie between {low} and {high}, got {value}")


def normalized(action: str) -> str:
    """Convert an action to lower case with single spaces.

    Quotes, periods and exclamation marks at both ends are removed.
    """
    return " ".join(action.lower().split()).strip(" \"'`.!")
