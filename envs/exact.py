"""Solve a small environment exactly by enumerating every random draw, action and history.

The environment's own `reset` and `step` run with a generator whose draws are choice points, so that
every outcome is enumerated with its probability. The solver maximizes over all policies that depend
only on the sequence of observations. The actions of these policies include an empty and a malformed
reply. The result is independent of the formulas by which an environment computes its optimum.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

Env = gym.Env[Any, Any]
INVALID_REPLIES: tuple[str, ...] = ("", "?!")
"""Replies that are invalid in every task: an empty reply and a malformed one."""
MAX_ACTIONS = 400
"""Maximum number of legal actions in a state."""
MAX_OUTCOMES = 1000
"""Maximum number of outcomes of one draw."""
START_BUDGET = 0.15
"""Fraction of the budget of calls that may be used to enumerate the start states."""
IMMUTABLE_TYPES = (int, float, str, bytes, bool, type(None))
NON_STATE_ATTRIBUTES = (
    "_np_random",
    "_np_random_seed",
    "_last_text",
    "render_mode",
    "spec",
    "metadata",
)
"""Attributes that are not compared as state: they have no influence on the rest of an episode, or
are random generators, whose draws are scripted."""
GENERATOR_TYPES = (random.Random, np.random.Generator, np.random.RandomState)
TRIAL_SEEDS = 10
"""Number of seeds with which `reset` is called to detect draws that do not use `np_random`."""


class NotEnumerableError(Exception):
    """Error for an environment that cannot be enumerated; the message gives the reason."""


class _UndecidedDraw(BaseException):
    """Raised by a draw with several outcomes for which the script of the generator has none.

    The class derives from BaseException, so that `except Exception` in an environment does not
    catch it. `outcomes` are the possible outcomes of the draw.
    """

    def __init__(self, outcomes: list[int]) -> None:
        super().__init__()
        self.outcomes = outcomes


class ScriptedGenerator:
    """Replacement for `numpy.random.Generator` whose draws follow a script of outcomes.

    `weight` is the product of the probabilities of the draws since the last call of `begin`.
    """

    def __init__(self) -> None:
        self.begin(())

    def begin(self, script: tuple[int, ...]) -> None:
        """Set the outcomes of the next draws and set `weight` to 1.

        A further draw with several possible outcomes raises _UndecidedDraw.
        """
        self._script, self._position, self.weight = script, 0, 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        """Return the outcome of a draw: the next one of the script, or the only possible one.

        Args:
            probabilities: Probability of each outcome; the sum is 1.

        Raises:
            _UndecidedDraw: The script has ended and several outcomes are possible.
        """
        outcomes = [i for i, p in enumerate(probabilities) if p > 0]
        if len(outcomes) == 1:
            return outcomes[0]
        if self._position == len(self._script):
            raise _UndecidedDraw(outcomes)
        outcome = self._script[self._position]
        self._position += 1
        self.weight *= probabilities[outcome]
        return outcome

    def integers(
        self,
        low: int,
        high: int | None = None,
        size: int | tuple[int, ...] | None = None,
        dtype: Any = np.int64,
        endpoint: bool = False,
    ) -> Any:
        """Draw as `numpy.random.Generator.integers` does."""
        low, high = (0, low) if high is None else (low, high)
        count = int(high) - int(low) + endpoint
        if count > MAX_OUTCOMES:
            raise NotEnumerableError(f"it draws among {count} integers")
        return _draw_array(size, lambda: int(low) + self.choose([1 / count] * count))

    def random(self, size: int | tuple[int, ...] | None = None, dtype: Any = float) -> Any:
        """Return placeholders of uniform draws in [0, 1).

        Each comparison of a placeholder with a number is a choice between two outcomes.
        """
        return _draw_array(size, lambda: _UniformPlaceholder(self), dtype=object)

    def choice(self, a: Any, size: int | None = None, replace: bool = True, p: Any = None) -> Any:
        """Draw as `numpy.random.Generator.choice` does, along the first axis."""
        items = list(range(a)) if isinstance(a, int | np.integer) else list(a)
        if len(items) > MAX_OUTCOMES:
            raise NotEnumerableError(f"it draws among {len(items)} items")
        weights = [1.0] * len(items) if p is None else [float(x) for x in p]
        drawn = []
        for _ in range(1 if size is None else size):
            total = sum(weights)
            index = self.choose([w / total for w in weights])
            drawn.append(items[index])
            if not replace:
                weights[index] = 0.0
        return drawn[0] if size is None else np.array(drawn)

    def permutation(self, x: Any) -> Any:
        """Permute as `numpy.random.Generator.permutation` does, along the first axis."""
        size = int(x) if isinstance(x, int | np.integer) else len(x)
        return self.choice(x, size=size, replace=False)

    def shuffle(self, x: Any) -> None:
        """Shuffle in place as `numpy.random.Generator.shuffle` does."""
        x[:] = self.permutation(list(x)).tolist()

    def __getattr__(self, name: str) -> Any:
        """Raise NotEnumerableError for every other distribution."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotEnumerableError(f"it draws from np_random.{name}")


def _draw_array(
    size: int | tuple[int, ...] | None, draw: Callable[[], Any], dtype: Any = None
) -> Any:
    """Call `draw` once per element; return an array of shape `size`, or one draw if it is None."""
    if size is None:
        return draw()
    return np.array([draw() for _ in range(np.prod(size))], dtype=dtype or np.int64).reshape(size)


class _UniformPlaceholder:
    """Placeholder of the number scale * u + shift, where u is uniform on the interval `bounds`.

    A comparison with a number is a choice between two outcomes. Each outcome has its probability
    under the uniform distribution, and narrows the interval accordingly.
    """

    def __init__(
        self,
        source: ScriptedGenerator,
        bounds: list[float] | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        self.source, self.scale, self.shift = source, scale, shift
        self.bounds = [0.0, 1.0] if bounds is None else bounds  # shared by all placeholders of u

    def _choose_below(self, value: Any) -> bool:
        """Choose whether the number is below `value`."""
        if not isinstance(value, int | float | np.number):
            raise NotEnumerableError("it compares two uniform draws")
        edge = (float(value) - self.shift) / self.scale
        low, high = self.bounds
        share = min(max((edge - low) / (high - low), 0.0), 1.0)
        is_left = self.source.choose([share, 1.0 - share]) == 0
        if 0.0 < share < 1.0:
            self.bounds[:] = [low, edge] if is_left else [edge, high]
        return is_left == (self.scale > 0)

    def __lt__(self, other: Any) -> bool:
        return self._choose_below(other)

    def __gt__(self, other: Any) -> bool:
        return not self._choose_below(other)

    __le__, __ge__ = __lt__, __gt__  # a uniform draw equals a number with probability 0

    def _affine(self, scale: float, shift: float) -> _UniformPlaceholder:
        """Return the placeholder of scale * self + shift; it shares the interval of u."""
        return _UniformPlaceholder(
            self.source, self.bounds, self.scale * scale, self.shift * scale + shift
        )

    def __mul__(self, other: float) -> _UniformPlaceholder:
        return self._affine(float(other), 0.0)

    def __truediv__(self, other: float) -> _UniformPlaceholder:
        return self._affine(1.0 / float(other), 0.0)

    def __add__(self, other: float) -> _UniformPlaceholder:
        return self._affine(1.0, float(other))

    def __sub__(self, other: float) -> _UniformPlaceholder:
        return self._affine(1.0, -float(other))

    def __rsub__(self, other: float) -> _UniformPlaceholder:
        return self._affine(-1.0, float(other))

    __rmul__, __radd__ = __mul__, __add__

    def __int__(self) -> int:
        """Choose the floor of the number and narrow the interval accordingly."""
        ends = sorted(self.scale * bound + self.shift for bound in self.bounds)
        first, last = int(np.floor(ends[0])), int(np.ceil(ends[1]))
        if last - first > MAX_OUTCOMES:
            raise NotEnumerableError(f"it draws among {last - first} integers")
        for cell in range(first, last - 1):
            if self._choose_below(cell + 1):
                return cell
        return last - 1

    __floor__ = __int__

    def __float__(self, *arguments: Any) -> NoReturn:
        raise NotEnumerableError("it needs the exact value of a uniform draw")

    # Formatting the number as text is an error, because the text would show this object instead.
    __bool__ = __repr__ = __str__ = __format__ = __float__

    def distribution_parameters(self) -> tuple[float, ...]:
        """Return (low, high, scale, shift), which determines the distribution of the number."""
        return (*self.bounds, self.scale, self.shift)


WeightedStates = list[tuple[float, Any]]
"""Pairs (weight, environment) of the states that are possible after the same observations. A weight
is the joint probability of the state and the observations."""


def exact_value(env: Env, *, max_steps: int = 200_000, price: float = 0.0) -> float:
    """Return the maximum expected return over all policies that depend only on the observations.

    Args:
        env: An environment; its wrappers are ignored.
        max_steps: Maximum number of calls of `step` and `reset`.
        price: Amount that is subtracted from the reward for each unit of `info["cost"]`.

    Raises:
        NotEnumerableError: The environment needs more than `max_steps` calls, does not list its
            legal actions, or cannot be enumerated for another reason.
    """
    return _Solver(env.unwrapped, max_steps, price).optimal_value()


class _Solver:
    """Exact solver for one environment.

    It caches the value of each belief, which is a distribution over the states.
    """

    def __init__(self, env: Env, max_steps: int, price: float) -> None:
        self.budget, self.price = max_steps, price
        try:
            self.root = copy.deepcopy(env)
        except Exception as error:  # third-party objects may raise anything
            raise NotEnumerableError(f"it cannot be copied: {error}") from error
        self.fixed = self._unchanged_attribute_pickles(env)
        # A memo for deepcopy, which does not copy the objects in its memo.
        self.shared = {
            id(value): value
            for name, value in vars(self.root).items()
            if name in (*self.fixed, *NON_STATE_ATTRIBUTES)
            or isinstance(value, gym.Space)
            or callable(value)
        }
        self.values: dict[Any, float] = {}

    def optimal_value(self) -> float:
        """Return the maximum expected return from `reset`; see `exact_value`."""
        self._require_reset_draws_from_np_random()
        self.root._np_random = ScriptedGenerator()  # type: ignore[assignment]
        groups: dict[str, WeightedStates] = {}
        reserve = self.budget * (1 - START_BUDGET)
        try:
            for weight, successor, (text, _) in self._outcomes_of_call(
                self.root, lambda e: e.reset()
            ):
                groups.setdefault(str(text), []).append((weight, successor))
                if self.budget < reserve:
                    raise NotEnumerableError("it has too many start states")
            total = sum(self._weighted_best_value(members) for members in groups.values())
        except RecursionError as error:
            raise NotEnumerableError("its episodes are too long") from error
        for name, before in self.fixed.items():
            if pickle.dumps(vars(self.root)[name]) != before:
                raise NotEnumerableError(f"its copies share {name}, which changes")
        return total

    def _require_reset_draws_from_np_random(self) -> None:
        """Check that `reset` draws from `np_random` only, because other draws are not enumerated.

        If `np_random` is fixed, the seed must not change the start of an episode.

        Raises:
            NotEnumerableError: Different seeds give different starts.
        """
        starts = set()
        for seed in range(TRIAL_SEEDS):
            trial: Any = copy.deepcopy(self.root, dict(self.shared))
            trial.__class__ = _with_fixed_generator(type(trial))
            text, _ = trial.reset(seed=seed)
            starts.add((str(text), self._state_key(trial)))
        if len(starts) > 1:
            raise NotEnumerableError("its reset uses the seed, or draws without np_random")

    def _unchanged_attribute_pickles(self, env: Env) -> dict[str, bytes]:
        """Find the attributes that did not change in five random episodes.

        Copies of the environment share these attributes.

        Returns:
            Name of the attribute -> its pickle.
        """
        trial, rng = copy.deepcopy(env), np.random.default_rng(0)
        fixed = _pickle_mutable_attributes(trial)
        for seed in range(5):
            trial.reset(seed=seed)
            over, turn = False, 0
            while not over and turn < 50:
                choices = [*_legal_actions(trial), *INVALID_REPLIES]
                over = trial.step(choices[int(rng.integers(len(choices)))])[2]
                turn += 1
                current = _pickle_mutable_attributes(trial, fixed) if turn < 5 or over else fixed
                fixed = {name: data for name, data in fixed.items() if current.get(name) == data}
        return fixed

    def _outcomes_of_call(
        self, env: Env, act: Callable[[Env], Any]
    ) -> Iterator[tuple[float, Env, Any]]:
        """Yield (probability, environment after the call, result) for each outcome of `act(env)`.

        `act` is applied to copies of `env`. Each call is subtracted from the budget.

        Raises:
            NotEnumerableError: The budget is exhausted, or the environment uses a draw in a way
                that cannot be enumerated.
        """
        scripts: list[tuple[int, ...]] = [()]
        while scripts:
            script = scripts.pop()
            self.budget -= 1
            if self.budget < 0:
                raise NotEnumerableError("it has too many states")
            successor = copy.deepcopy(env, dict(self.shared))
            generator: Any = successor._np_random
            generator.begin(script)
            try:
                result = act(successor)
            except _UndecidedDraw as undecided:
                scripts += [(*script, outcome) for outcome in undecided.outcomes]
                continue
            except (TypeError, AttributeError) as error:
                # Placeholders of draws support fewer operations than numbers and arrays.
                raise NotEnumerableError(
                    f"it uses an operation that placeholders of draws do not support: {error}"
                ) from error
            yield generator.weight, successor, result

    def _weighted_best_value(self, members: WeightedStates) -> float:
        """Return the total weight times the value of the best policy from the states `members`.

        The policy cannot distinguish the states, because their past observations are equal.
        """
        members = self._merge_equal_states(members)
        weight = sum(w for w, _ in members)
        key = frozenset((self._state_key(env), round(w / weight, 12)) for w, env in members)
        if key not in self.values:
            actions = dict.fromkeys(
                [action for _, env in members for action in _legal_actions(env)]
                + list(INVALID_REPLIES)
            )
            best = max(self._weighted_action_value(members, action) for action in actions)
            self.values[key] = best / weight
        return self.values[key] * weight

    def _weighted_action_value(self, members: WeightedStates, action: Any) -> float:
        """Return the total weight times the value of `action` with optimal play afterwards."""
        total, groups = 0.0, dict[str, WeightedStates]()
        for weight, env in members:
            for chance, successor, result in self._outcomes_of_call(env, lambda e: e.step(action)):
                text, reward, terminated, truncated, info = result
                gain = float(reward) - self.price * float(info.get("cost", 0.0))
                total += weight * chance * gain
                if not (terminated or truncated):
                    groups.setdefault(str(text), []).append((weight * chance, successor))
        return total + sum(self._weighted_best_value(group) for group in groups.values())

    def _merge_equal_states(self, members: WeightedStates) -> WeightedStates:
        """Merge equal states and add their weights."""
        merged: dict[Any, tuple[float, Env]] = {}
        for weight, env in members:
            key = self._state_key(env)
            merged[key] = (weight + merged[key][0] if key in merged else weight, env)
        return list(merged.values())

    def _state_key(self, env: Env) -> Any:
        """Return a key of the environment's state; different states have different keys.

        The key of a state that cannot be pickled differs from all other keys.

        Raises:
            NotEnumerableError: The state contains a random generator.
        """
        # Objects that all copies share with the root are left out, because they may be large.
        root = vars(self.root)
        state = {
            name: value
            for name, value in sorted(vars(env).items())
            if name not in NON_STATE_ATTRIBUTES
            and (isinstance(value, IMMUTABLE_TYPES) or name not in root or value is not root[name])
        }
        buffer = io.BytesIO()
        try:
            _StatePickler(buffer).dump(state)
        except NotEnumerableError:
            raise
        except Exception:  # third-party objects may raise anything
            return object()
        return buffer.getvalue()


class _StatePickler(pickle.Pickler):
    """Pickle the state of an environment, so that equal states give equal bytes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # disables references, which depend on the identity of equal objects

    def persistent_id(self, obj: Any) -> Any:
        """Return the distribution of a uniform placeholder, which is pickled in its place.

        Raises:
            NotEnumerableError: The state contains a random generator.
        """
        if isinstance(obj, GENERATOR_TYPES):
            raise NotEnumerableError("it has a generator of its own")
        return obj.distribution_parameters() if isinstance(obj, _UniformPlaceholder) else None


def _with_fixed_generator(env_class: type) -> type:
    """Return a subclass whose `np_random` has the same initial state for every seed."""
    generator = np.random.default_rng(0)
    fixed = property(lambda env: generator, lambda env, value: None)
    return type(env_class.__name__, (env_class,), {"_np_random": fixed})


def _legal_actions(env: Env) -> list[Any]:
    """Return the legal actions in the current state.

    Raises:
        NotEnumerableError: The environment does not list its legal actions, or lists more than
            `MAX_ACTIONS`.
    """
    task: Any = env.unwrapped
    try:
        actions = list(task.legal_actions())
    except (AttributeError, NotImplementedError) as error:
        raise NotEnumerableError("it does not list its legal actions") from error
    if len(actions) > MAX_ACTIONS:
        raise NotEnumerableError(f"it has {len(actions)} legal actions")
    return actions


def _pickle_mutable_attributes(env: Env, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """Return attribute name -> pickle for the attributes whose type is not immutable.

    Only the attributes in `names` are considered (by default, all). Attributes that cannot be
    pickled are left out.
    """
    pickles = {}
    for name in list(vars(env) if names is None else names):
        value = vars(env).get(name)
        if name not in NON_STATE_ATTRIBUTES and not isinstance(value, IMMUTABLE_TYPES):
            try:
                pickles[name] = pickle.dumps(value)
            except Exception:  # third-party objects may raise anything
                continue  # an attribute without a pickle is copied, not shared
    return pickles
