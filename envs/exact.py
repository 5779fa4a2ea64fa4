"""Solve a small environment exactly, from outside: every chance, every action, every history.

The environment's own `reset` and `step` are run with a generator whose draws are choice points, so
that all that can happen is enumerated with its probability. What the agent knows is the texts it
has seen; the solver maximises over every policy on them, with invalid actions and silence among the
actions. It shares nothing with the formulas by which an environment states its optimum.
"""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.envs.core import TextEnv

Env = gym.Env[Any, Any]
INVALID: tuple[str, ...] = ("", "?!")
"""Replies that no task understands; they stand for silence, junk and stalling."""
MAX_ACTIONS = 400
MAX_CELLS = 1000
SHARE_OF_STARTS = 0.15
"""Of the calls that may be spent, those that may go into finding the start states."""
IMMUTABLE = (int, float, str, bytes, bool, type(None))
ASIDE = ("_np_random", "_np_random_seed", "_last_text", "render_mode", "spec", "metadata")
"""Attributes that say nothing about what will happen."""


class NotEnumerableError(Exception):
    """The environment cannot be solved this way; the message says why."""


class _Undecided(BaseException):
    """A draw beyond the script. No `Exception`, so that no environment catches it."""

    def __init__(self, live: list[int]) -> None:
        super().__init__()
        self.live = live


class Chances:
    """Stands in for `numpy.random.Generator`: each draw is a choice among weighted outcomes."""

    def __init__(self) -> None:
        self.begin(())

    def begin(self, script: tuple[int, ...]) -> None:
        """Answer the next draws by `script`; one beyond it raises."""
        self._script, self._place, self.weight = script, 0, 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        """The place of an outcome; certain ones need no script."""
        live = [i for i, p in enumerate(probabilities) if p > 0]
        if len(live) == 1:
            return live[0]
        if self._place == len(self._script):
            raise _Undecided(live)
        picked = self._script[self._place]
        self._place += 1
        self.weight *= probabilities[picked]
        return picked

    def integers(
        self,
        low: int,
        high: int | None = None,
        size: int | tuple[int, ...] | None = None,
        dtype: Any = np.int64,
        endpoint: bool = False,
    ) -> Any:
        """As numpy's."""
        low, high = (0, low) if high is None else (low, high)
        count = int(high) - int(low) + endpoint
        if count > MAX_CELLS:
            raise NotEnumerableError(f"it draws among {count} integers")
        return _filled(size, lambda: int(low) + self.choose([1 / count] * count))

    def random(self, size: int | tuple[int, ...] | None = None, dtype: Any = float) -> Any:
        """As numpy's; a number is only decided as far as it is compared."""
        return _filled(size, lambda: _Uniform(self), dtype=object)

    def choice(self, a: Any, size: int | None = None, replace: bool = True, p: Any = None) -> Any:
        """As numpy's, for one axis."""
        items = list(range(a)) if isinstance(a, int | np.integer) else list(a)
        if len(items) > MAX_CELLS:
            raise NotEnumerableError(f"it draws among {len(items)} things")
        weights = [1.0] * len(items) if p is None else [float(x) for x in p]
        drawn = []
        for _ in range(1 if size is None else size):
            total = sum(weights)
            place = self.choose([w / total for w in weights])
            drawn.append(items[place])
            if not replace:
                weights[place] = 0.0
        return drawn[0] if size is None else np.array(drawn)

    def permutation(self, x: Any) -> Any:
        """As numpy's, for one axis."""
        items = list(range(x)) if isinstance(x, int | np.integer) else list(x)
        return self.choice(items, size=len(items), replace=False)

    def shuffle(self, x: Any) -> None:
        """As numpy's, in place."""
        x[:] = self.permutation(list(x)).tolist()

    def __getattr__(self, name: str) -> Any:
        """Other distributions are not enumerated."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotEnumerableError(f"it draws from np_random.{name}")


def _filled(size: int | tuple[int, ...] | None, draw: Callable[[], Any], dtype: Any = None) -> Any:
    if size is None:
        return draw()
    count = int(np.prod(size))
    flat = np.empty(count, dtype=dtype or np.int64)
    for place in range(count):
        flat[place] = draw()
    return flat.reshape(size)


class _Uniform:
    """A number drawn uniformly from [0, 1), of which only the interval is known: a u + b."""

    def __init__(
        self,
        source: Chances,
        bounds: list[float] | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        self.source, self.scale, self.shift = source, scale, shift
        self.bounds = [0.0, 1.0] if bounds is None else bounds  # shared by all that derives of it

    def _below(self, value: Any) -> bool:
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
        return self._below(other)

    def __le__(self, other: Any) -> bool:
        return self._below(other)

    def __gt__(self, other: Any) -> bool:
        return not self._below(other)

    def __ge__(self, other: Any) -> bool:
        return not self._below(other)

    def _affine(self, scale: float, shift: float) -> _Uniform:
        return _Uniform(self.source, self.bounds, self.scale * scale, self.shift * scale + shift)

    def __mul__(self, other: float) -> _Uniform:
        return self._affine(float(other), 0.0)

    def __truediv__(self, other: float) -> _Uniform:
        return self._affine(1.0 / float(other), 0.0)

    def __add__(self, other: float) -> _Uniform:
        return self._affine(1.0, float(other))

    def __sub__(self, other: float) -> _Uniform:
        return self._affine(1.0, -float(other))

    def __rsub__(self, other: float) -> _Uniform:
        return self._affine(-1.0, float(other))

    __rmul__, __radd__ = __mul__, __add__

    def __int__(self) -> int:
        """Decides in which cell between integers the number lies."""
        ends = sorted(self.scale * bound + self.shift for bound in self.bounds)
        first, last = int(np.floor(ends[0])), int(np.ceil(ends[1]))
        if last - first > MAX_CELLS:
            raise NotEnumerableError(f"it draws among {last - first} integers")
        for cell in range(first, last - 1):
            if self._below(cell + 1):
                return cell
        return last - 1

    __floor__ = __int__

    def __float__(self) -> float:
        raise NotEnumerableError("it needs the exact value of a uniform draw")

    def __bool__(self) -> bool:
        raise NotEnumerableError("it needs the exact value of a uniform draw")

    def __repr__(self) -> str:
        """The interval, which is all that can be told apart."""
        return f"U{self.bounds}*{self.scale}+{self.shift}"


Members = list[tuple[float, Any]]  # (weight, environment): the states that look alike


def exact_value(env: Env, *, max_steps: int = 200_000, price: float = 0.0) -> float:
    """Greatest expected return of any policy that acts on what it has seen.

    Args:
        env: An environment; wrappers are passed over.
        max_steps: How many calls of `step` and `reset` may be spent.
        price: Taken from the reward for each unit of `info["cost"]`.

    Raises:
        NotEnumerableError: it is too large, or draws what cannot be enumerated.
    """
    return _Solver(env.unwrapped, max_steps, price).value()


class _Solver:
    def __init__(self, env: Env, max_steps: int, price: float) -> None:
        self.budget, self.price = max_steps, price
        self.root = copy.deepcopy(env)
        self.fixed = self._fixed_attributes(env)
        self.names = [name for name in vars(self.root) if name not in ASIDE]
        self.known: dict[Any, float] = {}

    def value(self) -> float:
        self.root._np_random = Chances()  # type: ignore[assignment]
        groups: dict[str, Members] = {}
        enough = self.budget * (1 - SHARE_OF_STARTS)
        try:
            for weight, twin, (text, _) in self._outcomes(self.root, lambda e: e.reset()):
                groups.setdefault(str(text), []).append((weight, twin))
                if self.budget < enough:
                    raise NotEnumerableError("it has too many start states")
            total = sum(self._best(members) for members in groups.values())
        except RecursionError as error:
            raise NotEnumerableError("its episodes are too long") from error
        for name, before in self.fixed.items():
            if pickle.dumps(vars(self.root)[name]) != before:
                raise NotEnumerableError(f"its copies share {name}, which changes")
        return total

    def _fixed_attributes(self, env: Env) -> dict[str, bytes]:
        """Containers that whole episodes left as they were; copies may share them."""
        trial, rng = copy.deepcopy(env), np.random.default_rng(0)
        fixed = _pickles(trial)
        for seed in range(5):
            trial.reset(seed=seed)
            over, turn = False, 0
            while not over and turn < 50:
                choices = [*_legal(trial), *INVALID]
                over = trial.step(choices[int(rng.integers(len(choices)))])[2]
                turn += 1
                now = _pickles(trial, fixed) if turn < 5 or over else fixed
                fixed = {name: data for name, data in fixed.items() if now.get(name) == data}
        return fixed

    def _copy(self, env: Env) -> Env:
        twin = object.__new__(type(env))
        memo: dict[int, Any] = {}
        for name, value in vars(env).items():
            share = name in self.fixed or isinstance(value, IMMUTABLE)
            twin.__dict__[name] = value if share else _copied(value, memo)
        return twin

    def _outcomes(self, env: Env, act: Callable[[Env], Any]) -> Iterator[tuple[float, Env, Any]]:
        """All that a call can lead to: probability, the environment after it, its result."""
        scripts: list[tuple[int, ...]] = [()]
        while scripts:
            script = scripts.pop()
            self.budget -= 1
            if self.budget < 0:
                raise NotEnumerableError("it has too many states")
            twin = self._copy(env)
            chances: Any = twin._np_random
            chances.begin(script)
            try:
                result = act(twin)
            except _Undecided as undecided:
                scripts += [(*script, pick) for pick in undecided.live]
                continue
            yield chances.weight, twin, result

    def _best(self, members: Members) -> float:
        """Weighted value of the best policy from a set of states that the agent cannot tell
        apart.
        """
        members = self._merged(members)
        weight = sum(w for w, _ in members)
        key = frozenset((self._key(env), round(w / weight, 12)) for w, env in members)
        if key not in self.known:
            actions = dict.fromkeys(
                [action for _, env in members for action in _legal(env)] + list(INVALID)
            )
            self.known[key] = max(self._follow(members, action) for action in actions) / weight
        return self.known[key] * weight

    def _follow(self, members: Members, action: Any) -> float:
        """Weighted value of an action, and of the best policy after it."""
        total, groups = 0.0, dict[str, Members]()
        for weight, env in members:
            for chance, twin, result in self._outcomes(env, lambda e: e.step(action)):
                text, reward, terminated, truncated, info = result
                gain = float(reward) - self.price * float(info.get("cost", 0.0))
                total += weight * chance * gain
                if not (terminated or truncated):
                    groups.setdefault(str(text), []).append((weight * chance, twin))
        return total + sum(self._best(group) for group in groups.values())

    def _merged(self, members: Members) -> Members:
        found: dict[Any, tuple[float, Env]] = {}
        for weight, env in members:
            key = self._key(env)
            found[key] = (weight + found[key][0] if key in found else weight, env)
        return list(found.values())

    def _key(self, env: Env) -> tuple[Any, ...]:
        mine, root = vars(env), vars(self.root)
        # What is still the root's own object tells nothing, and its text may be long.
        values = ((mine.get(name), root[name]) for name in self.names)
        return tuple(
            v if isinstance(v, IMMUTABLE) else "" if v is first else repr(v) for v, first in values
        )


def _legal(env: Env) -> list[Any]:
    """The actions that are meaningful now.

    Raises:
        NotEnumerableError: the environment does not list them, or lists too many.
    """
    base: Any = env.unwrapped
    if isinstance(base, TextEnv) or hasattr(base, "legal_actions"):
        try:
            found = list(base.legal_actions())
        except NotImplementedError as error:
            raise NotEnumerableError("it does not list its legal actions") from error
    else:
        raise NotEnumerableError("it does not list its legal actions")
    if len(found) > MAX_ACTIONS:
        raise NotEnumerableError(f"it has {len(found)} legal actions")
    return found


def _pickles(env: Env, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """The attributes (or those of them) that are containers and can be written down."""
    found = {}
    for name in list(vars(env) if names is None else names):
        value = vars(env).get(name)
        if name not in ASIDE and not isinstance(value, IMMUTABLE):
            try:
                found[name] = pickle.dumps(value)
            except Exception:  # whatever a stranger's object raises: it is copied then
                continue
    return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy; flat containers, the usual case, without the detour of `deepcopy`."""
    if isinstance(value, gym.Space) or callable(value):
        return value
    if type(value) in (list, set, tuple) and all(isinstance(v, IMMUTABLE) for v in value):
        return value if isinstance(value, tuple) else value.copy()
    if type(value) in (dict, deque) and not value:
        return value.copy()
    return copy.deepcopy(value, memo)
