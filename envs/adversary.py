"""Search for policies that beat a stated optimum: empty or malformed replies, stalling, and others.

An optimum must hold over all texts. Adversaries are screened on a few episodes, the best of them
are tested on new ones, paired by seed with episodes of the expert, and a win must be confirmed on
further ones. The level of the test holds for all adversaries of an environment together.
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
Adversary = tuple[str, Policy]
"""Name of a policy that should not earn more than the optimum, and the policy."""
LEVEL = 0.01
"""Familywise probability of a finding if the stated optimum is right."""
SCREENED, TRIED, CONFIRMED = 12, 200, 800
"""Episodes of an adversary in each of the three rounds."""
FINALISTS = 6
"""Adversaries that are tested after the screening."""
MAX_STEPS = 1000
FIRST_SEED = 3 * 2**29
"""First seed of the episodes, far from those that tests and examples use."""
SILENCE = ""
JUNK = ("?!", "I do not know.", "a" * 200)
MAX_CONSTANTS, MAX_WORDS = 24, 40


@dataclass(frozen=True)
class SuccessfulAdversary:
    """An adversary that earned more than the stated optimum (or than the expert)."""

    name: str
    mean: float
    baseline: float
    """The stated optimum, or the mean return of the expert or of the best legal policy."""
    stated: bool
    """Whether the baseline is a stated optimum."""

    def __str__(self) -> str:
        """The finding in one line."""
        source = "optimal_value() says" if self.stated else "intended play earns"
        earns = f"adversary: {self.name} earns {self.mean:.4f} per episode"
        return f"{earns}, {source} {self.baseline:.4f}"


def successful_adversaries(env: Env, *, level: float = LEVEL) -> list[SuccessfulAdversary]:
    """The adversaries that beat the baseline of an environment, at a familywise level.

    The baseline is the stated optimum, else the expert. Without either it is the best of random
    play and of each single action repeated; then only empty and malformed replies and a list of all
    actions are tested against it. Costs are priced with the environment's `cost_price()`, if it has
    one.

    Args:
        env: The environment with its wrappers; its `unwrapped` states values and actions.
        level: Probability of any finding if no adversary is better than the baseline.
    """
    findings = []
    game = _Game(env)
    adversaries, baseline = list(game.adversaries()), game.baseline()
    gains = [game.gains(policy, baseline, 0, SCREENED).mean() for _, policy in adversaries]
    finalists = [adversaries[i] for i in np.argsort(-np.array(gains), kind="stable")[:FINALISTS]]
    rounds = ((SCREENED, TRIED), (SCREENED + TRIED, CONFIRMED))
    for name, policy in finalists:
        p_values = (_p_value(game.gains(policy, baseline, *seeds), "greater") for seeds in rounds)
        if all(p_value < level / len(finalists) for p_value in p_values):
            mean = float(game.returns(policy, *rounds[1]).mean())
            findings.append(SuccessfulAdversary(name, mean, baseline.value, baseline.stated))
    return findings


@dataclass(frozen=True)
class _Baseline:
    """The value that no adversary should beat."""

    value: float
    stated: bool
    partner: Policy | None
    """Policy whose episodes are paired with an adversary's; None compares with `value`."""


class _Game:
    """An environment with its adversaries, its baseline and the episodes played so far."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.base: Any = env.unwrapped
        self.is_discrete = isinstance(env.action_space, gym.spaces.Discrete)
        text, _ = env.reset(seed=FIRST_SEED - 1)
        actions = self._actions()
        self.actions = actions[:: max(1, -(-len(actions) // MAX_CONSTANTS))]
        self.words = _words([*actions, str(text)])
        self.optimum = _result_of(self.base, "optimal_value")
        self.has_expert = _result_of(self.base, "expert") is not None
        self.price = float(_result_of(self.base, "cost_price") or 0.0)
        self.limit = float(getattr(self.base, "cost_limit", 0.0) or 0.0) if self.price else 0.0
        self.played: dict[tuple[Any, int, int], np.ndarray] = {}

    def _actions(self) -> list[Any]:
        """Legal actions at the start, or a sample if the environment does not list them."""
        space: Any = self.env.action_space
        if self.is_discrete:
            return [int(space.start + i) for i in range(int(space.n))]
        actions = _result_of(self.base, "legal_actions")
        if actions is None:
            space.seed(0)
            actions = dict.fromkeys(space.sample() for _ in range(MAX_CONSTANTS))
        return list(actions)

    def baseline(self) -> _Baseline:
        """The stated optimum, or the mean return of the best intended policy."""
        if self.optimum is not None:
            partner = self._expert if self.has_expert and self._expert_agrees() else None
            return _Baseline(float(self.optimum), True, partner)
        policies = (
            [self._expert] if self.has_expert else [self._random, *map(_always, self.actions)]
        )
        means = [self.returns(policy, 0, SCREENED).mean() for policy in policies]
        best = policies[int(np.argmax(means))]
        value = float(self.returns(best, SCREENED, TRIED).mean())
        return _Baseline(value, False, best)

    def _expert_agrees(self) -> bool:
        """Whether the expert earns the stated optimum, so that its episodes can be paired."""
        gains = self.returns(self._expert, SCREENED, TRIED) - self.optimum
        return _p_value(gains, "two-sided") > LEVEL

    def gains(self, policy: Policy, baseline: _Baseline, first: int, count: int) -> np.ndarray:
        """Returns minus the baseline, paired by seed if the baseline has a partner, [episodes]."""
        partner = baseline.partner
        reference = baseline.value if partner is None else self.returns(partner, first, count)
        return self.returns(policy, first, count) - reference

    def returns(self, policy: Policy, first: int, count: int) -> np.ndarray:
        """Returns on consecutive seeds with priced costs, [episodes]."""
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
                break  # as in a rollout, where an unreadable reply ends the episode
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward) - self.price * float(info.get("cost", 0.0))
            if terminated or truncated:
                break
        return total

    def _expert(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        return self.base.expert(rng)

    def _random(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        if hasattr(self.base, "sample_action"):
            return self.base.sample_action(rng)
        return self.actions[int(rng.integers(len(self.actions)))]

    def adversaries(self) -> Iterator[Adversary]:
        """All policies that are tested."""
        if self.is_discrete:
            yield "a reply that is no number (rollout.invalid_reward: 0)", _always(None)
        else:
            yield "silence", _always(SILENCE)
            for junk in JUNK:
                yield f"the junk {junk[:20]!r}", _always(junk)
            several = [action for action in self.actions if isinstance(action, str)]
            for separator in (" ", "\n", ", "):
                yield f"all actions joined by {separator!r}", _always(separator.join(several))
        if self.optimum is None and not self.has_expert:
            return
        yield "random play", self._random
        for action in self.actions:
            yield f"{action!r} in every turn", _always(action)
        base, name = (self._expert, "expert") if self.has_expert else (self._random, "random")
        yield from self._timed(base, name)
        if not self.is_discrete:
            yield from self._wordy(base, name)

    def _timed(self, base: Policy, base_name: str) -> Iterator[Adversary]:
        """Late starts and early ends of a base policy."""
        nothing = None if self.is_discrete else SILENCE
        half = max(1, int(getattr(self.base, "max_turns", 4)) // 2)
        for turns in sorted({1, 2, half}):
            yield (
                f"silence for {turns} turns, then {base_name} play",
                lambda e, t, r, n=turns: nothing if t < n else base(e, t, r),
            )
            yield (
                f"{base_name} play for {turns} turns, then silence",
                lambda e, t, r, n=turns: base(e, t, r) if t < n else nothing,
            )
        yield (
            f"silence every other turn of {base_name} play",
            lambda e, t, r: nothing if t % 2 else base(e, t, r),
        )
        if _result_of(self.base, "action_values"):
            yield "silence if no action has a positive value", self._positive_only
            yield "the action of the highest stated value", self._greedy

    def _positive_only(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        values = _result_of(self.base, "action_values")
        return self._greedy(env, turn, rng) if values and max(values.values()) > 0 else SILENCE

    def _greedy(self, env: Env, turn: int, rng: np.random.Generator) -> Any:
        values = _result_of(self.base, "action_values")
        return max(values, key=values.__getitem__) if values else self._random(env, turn, rng)

    def _wordy(self, base: Policy, base_name: str) -> Iterator[Adversary]:
        """Text around the actions of a base policy, and several actions in one reply."""
        frames = {
            "text before the action": "I think: {}",
            "text after the action": "{} because it is best",
            "the action twice": "{0} {0}",
            "the action on two lines": "{0}\n{0}",
            "the action in brackets": "[{}]",
        }
        for name, frame in frames.items():
            yield (
                f"{name} ({base_name} play)",
                lambda e, t, r, f=frame: f.format(base(e, t, r)),
            )
        for separator in (" ", "\n", ", "):
            yield (
                f"two actions joined by {separator!r} ({base_name} play)",
                lambda e, t, r, s=separator: f"{base(e, t, r)}{s}{self._random(e, t, r)}",
            )
        for word, times in itertools.product(self.words, (1, 8)):
            yield (
                f"{base_name} play with {times} times {word!r} after it",
                lambda e, t, r, w=word, n=times: " ".join([str(base(e, t, r)), *[w] * n]),
            )


def _always(action: Any) -> Policy:
    """The policy that gives the same action in every turn."""
    return lambda env, turn, rng: action


def _words(texts: Sequence[Any]) -> list[str]:
    """Distinct words of texts, at most `MAX_WORDS` at equal distances."""
    words = list(dict.fromkeys(w for text in texts for w in re.findall(r"\w+", str(text).lower())))
    return words[:: max(1, -(-len(words) // MAX_WORDS))]


def _p_value(gains: np.ndarray, alternative: str) -> float:
    """p value of a t test that the mean gain is 0; constant gains give 0 or 1."""
    from scipy import stats

    if np.ptp(gains) < 1e-12:
        difference = gains[0] if alternative == "greater" else abs(gains[0])
        return 0.0 if difference > 1e-9 else 1.0
    test: Any = stats.ttest_1samp(gains, 0.0, alternative=alternative)
    return float(test.pvalue)


def _result_of(task: Any, method: str) -> Any:
    """The result of a method without arguments, or None if the environment does not know it."""
    try:
        return getattr(task, method)()
    except (AttributeError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return None
