"""Try to beat a stated optimum by silence, junk, stalling and whatever else a policy can say.

An optimum has to be one over all texts. Adversaries are screened on a few episodes, those that look
best are tried on fresh ones, each paired with the expert's episode of the same seed, and a win has
to be confirmed on further ones; the level holds for all adversaries of an environment together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

Env = gym.Env[Any, Any]
Policy = Callable[[Env, int, np.random.Generator], Any]
"""(environment, turn from 0, generator) -> action."""
LEVEL = 0.01
"""Chance that an environment whose optimum holds is said to be beaten."""
SCREENED, TRIED, CONFIRMED = 12, 200, 800
"""Episodes of an adversary in each of the three rounds."""
FINALISTS = 6
MAX_STEPS = 1000
FIRST_SEED = 3 * 2**29
"""Seeds lie apart from those that tests and examples are likely to use."""
SILENCE = ""
JUNK = ("?!", "I do not know.", "a" * 200)
MAX_CONSTANTS, MAX_WORDS = 24, 40


@dataclass(frozen=True)
class Adversary:
    """A way to play that is not meant to earn anything beyond the optimum."""

    name: str
    policy: Policy


@dataclass(frozen=True)
class Beaten:
    """An adversary that earned more than the stated optimum (or than the expert)."""

    name: str
    mean: float
    baseline: float
    """What was stated, or what the expert or the best legal play earned."""
    stated: bool
    """Whether the baseline is a stated optimum."""

    def __str__(self) -> str:
        """One line for a list of findings."""
        than = "optimal_value() says" if self.stated else "meant play earns"
        return (
            f"adversary: {self.name} earns {self.mean:.4f} per episode, {than} {self.baseline:.4f}"
        )


def beaten(env: Env, *, level: float = LEVEL) -> list[Beaten]:
    """The adversaries that beat what an environment states, at a familywise level.

    Where an optimum is stated, that is the bar; without one it is the expert, and without an expert
    the best of random play and each single action said throughout, so that only silence and junk
    are tried against it. Costs count at the environment's own `cost_price()`, if it has one.

    Args:
        env: With its wrappers, as an agent sees it; its `unwrapped` states values and actions.
        level: Chance of any finding where there is nothing to find.
    """
    found = []
    game = _Game(env)
    adversaries, bar = list(game.adversaries()), game.bar()
    screened = [(game.mean_gain(a.policy, bar, 0, SCREENED), i) for i, a in enumerate(adversaries)]
    best = sorted(screened, key=lambda pair: (-pair[0], pair[1]))[:FINALISTS]
    for _, index in best:
        adversary = adversaries[index]
        share = level / len(best)
        if game.wins(adversary.policy, bar, SCREENED, TRIED, share) and game.wins(
            adversary.policy, bar, SCREENED + TRIED, CONFIRMED, share
        ):
            returns = game.returns(adversary.policy, SCREENED + TRIED, CONFIRMED)
            found.append(Beaten(adversary.name, float(returns.mean()), bar.value, bar.stated))
    return found


@dataclass(frozen=True)
class _Bar:
    value: float
    stated: bool
    partner: Policy | None
    """Whose episodes are paired with an adversary's; None: the value itself."""


class _Game:
    """An environment with what can be said in it."""

    def __init__(self, env: Env) -> None:
        self.env, self.base = env, env.unwrapped
        task: Any = self.base
        self.is_discrete = isinstance(env.action_space, gym.spaces.Discrete)
        text, _ = env.reset(seed=FIRST_SEED - 1)
        actions = self._actions()
        self.actions = actions[:: max(1, -(-len(actions) // MAX_CONSTANTS))]
        self.words = _words([*actions, str(text)])
        self.optimum = _called(task, "optimal_value")
        self.has_expert = self._expert_answers()
        self.price = _called(task, "cost_price") or 0.0
        self.limit = float(getattr(task, "cost_limit", 0.0) or 0.0) if self.price else 0.0
        self.played: dict[tuple[Any, int, int], np.ndarray] = {}

    def _actions(self) -> list[Any]:
        """Legal actions at the start, or a sample where the environment does not list them."""
        task: Any = self.base
        space: Any = self.env.action_space
        if self.is_discrete:
            return [int(space.start + i) for i in range(int(space.n))]
        try:
            return list(task.legal_actions())
        except (AttributeError, NotImplementedError):
            space.seed(0)
            return list(dict.fromkeys(space.sample() for _ in range(MAX_CONSTANTS)))

    def _expert_answers(self) -> bool:
        task: Any = self.base
        try:
            task.expert()
        except (AttributeError, NotImplementedError, TypeError):
            return False
        return True

    def bar(self) -> _Bar:
        """What must not be beaten."""
        if self.optimum is not None:
            partner = self._expert if self.has_expert and self._expert_agrees() else None
            return _Bar(self.optimum, True, partner)
        rivals = [self._expert] if self.has_expert else [self._random, *map(_say, self.actions)]
        means = [self.returns(rival, 0, SCREENED).mean() for rival in rivals]
        best = rivals[int(np.argmax(means))]
        value = float(self.returns(best, SCREENED, TRIED).mean())
        return _Bar(value, False, best)

    def _expert_agrees(self) -> bool:
        """Whether the expert earns what is stated; else its episodes are no partner."""
        from scipy import stats

        gains = self.returns(self._expert, SCREENED, TRIED) - self.optimum
        if np.ptp(gains) < 1e-12:
            return abs(float(gains[0])) < 1e-9
        test: Any = stats.ttest_1samp(gains, 0.0)
        return float(test.pvalue) > LEVEL

    def gains(self, policy: Policy, bar: _Bar, first: int, count: int) -> np.ndarray:
        """[episodes] what a policy earns beyond the bar, paired by seed with a partner."""
        mine = self.returns(policy, first, count)
        return mine - (
            bar.value if bar.partner is None else self.returns(bar.partner, first, count)
        )

    def mean_gain(self, policy: Policy, bar: _Bar, first: int, count: int) -> float:
        """Mean of `gains`."""
        return float(self.gains(policy, bar, first, count).mean())

    def wins(self, policy: Policy, bar: _Bar, first: int, count: int, level: float) -> bool:
        """Whether the mean gain is above 0 by a one-sided t test at this level."""
        from scipy import stats

        gains = self.gains(policy, bar, first, count)
        if np.ptp(gains) < 1e-12:
            return float(gains[0]) > 1e-9
        test: Any = stats.ttest_1samp(gains, 0.0, alternative="greater")
        return float(test.pvalue) < level

    def returns(self, policy: Policy, first: int, count: int) -> np.ndarray:
        """[episodes] returns over consecutive seeds, costs priced."""
        key = (policy, first, count)
        if key not in self.played:
            seeds = range(FIRST_SEED + first, FIRST_SEED + first + count)
            self.played[key] = np.array([self._episode(policy, seed) for seed in seeds])
        return self.played[key]

    def _episode(self, policy: Policy, seed: int) -> float:
        rng = np.random.default_rng([seed, 5])
        self.env.reset(seed=seed)
        total = self.price * self.limit
        for turn in range(MAX_STEPS):
            action = policy(self.env, turn, rng)
            if self.is_discrete and not self.env.action_space.contains(action):
                break  # a rollout ends the episode there, by default without reward
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward) - self.price * float(info.get("cost", 0.0))
            if terminated or truncated:
                break
        return total

    def _expert(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        task: Any = self.base
        return task.expert(rng)

    def _random(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        task: Any = self.base
        if hasattr(task, "sample_action"):
            return task.sample_action(rng)
        return self.actions[int(rng.integers(len(self.actions)))]

    def adversaries(self) -> Iterator[Adversary]:
        """Everything that is tried."""
        if self.is_discrete:
            yield Adversary("a reply that is no number (rollout.invalid_reward: 0)", _say(None))
        else:
            yield Adversary("silence", _say(SILENCE))
            for junk in JUNK:
                yield Adversary(f"the junk {junk[:20]!r}", _say(junk))
        if self.optimum is None and not self.has_expert:
            return
        yield Adversary("random play", self._random)
        for action in self.actions:
            yield Adversary(f"{action!r} in every turn", _say(action))
        meant, whose = (self._expert, "expert") if self.has_expert else (self._random, "random")
        yield from self._timed(meant, whose)
        if not self.is_discrete:
            yield from self._wordy(meant, whose)

    def _timed(self, meant: Policy, whose: str) -> Iterator[Adversary]:
        """Late starts and early ends."""
        nothing = None if self.is_discrete else SILENCE
        half = max(1, int(getattr(self.base, "max_turns", 4)) // 2)
        for turns in sorted({1, 2, half}):
            yield Adversary(
                f"silence for {turns} turns, then {whose} play",
                lambda e, t, r, n=turns: nothing if t < n else meant(e, t, r),
            )
            yield Adversary(
                f"{whose} play for {turns} turns, then silence",
                lambda e, t, r, n=turns: meant(e, t, r) if t < n else nothing,
            )
        yield Adversary(
            f"silence every other turn of {whose} play",
            lambda e, t, r: nothing if t % 2 else meant(e, t, r),
        )
        if _values_of(self.base):
            yield Adversary("silence where nothing is to be gained", self._unless_worthless)
            yield Adversary("the action of the greatest stated value", self._greedy)

    def _unless_worthless(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        values = _values_of(self.base)
        worthless = not values or max(values.values()) <= 0
        return SILENCE if worthless else self._greedy(env, turn, rng)

    def _greedy(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        values = _values_of(self.base)
        return max(values, key=values.__getitem__) if values else self._random(env, turn, rng)

    def _wordy(self, meant: Policy, whose: str) -> Iterator[Adversary]:
        """Text before and after an action, and several actions in one reply."""
        frames = {
            "text before the action": "I think: {}",
            "text after the action": "{} because it is best",
            "the action twice": "{0} {0}",
            "the action on two lines": "{0}\n{0}",
            "the action in brackets": "[{}]",
        }
        for name, frame in frames.items():
            yield Adversary(
                f"{name} ({whose} play)",
                lambda e, t, r, f=frame: f.format(meant(e, t, r)),
            )
        several = [a for a in self.actions if isinstance(a, str)]
        for joint in (" ", "\n", ", "):
            yield Adversary(f"all actions joined by {joint!r}", _say(joint.join(several)))
            yield Adversary(
                f"two actions joined by {joint!r} ({whose} play)",
                lambda e, t, r, j=joint: f"{meant(e, t, r)}{j}{self._random(e, t, r)}",
            )
        for word, times in itertools.product(self.words, (1, 8)):
            yield Adversary(
                f"{whose} play with {times} times {word!r} after it",
                lambda e, t, r, w=word, n=times: " ".join([str(meant(e, t, r)), *[w] * n]),
            )


def _say(action: Any) -> Policy:
    """The same in every turn."""
    return lambda env, turn, rng: action


def _words(texts: Sequence[Any]) -> list[str]:
    """Words of actions and observations, evenly chosen where they are many."""
    found = list(dict.fromkeys(w for text in texts for w in re.findall(r"\w+", str(text).lower())))
    stride = max(1, -(-len(found) // MAX_WORDS))
    return found[::stride]


def _values_of(task: Any) -> dict[Any, float]:
    """The stated values of the actions here; empty where there are none."""
    try:
        return dict(task.action_values())
    except (AttributeError, NotImplementedError, ValueError, ZeroDivisionError):
        return {}


def _called(task: Any, name: str) -> float | None:
    """A stated value, or None."""
    try:
        return float(getattr(task, name)())
    except (AttributeError, NotImplementedError, ValueError):
        return None
