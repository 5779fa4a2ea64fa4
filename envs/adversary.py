"""Search for policies that beat a stated optimum, such as empty or malformed replies or stalling.

The stated optimum, `optimal_value()`, must be the maximum over all text policies. An adversary is a
policy that may exceed this optimum. All adversaries are screened on a few episodes. The best ones
are tested on new episodes, which are paired by seed with episodes of the expert if possible. A
significant gain must be confirmed on a third set of episodes. The significance level is the
family-wise error rate over all adversaries of an environment.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

Env = gym.Env[Any, Any]
Policy = Callable[[int, np.random.Generator], Any]
"""Function (index of the turn, generator) -> action."""
Adversary = tuple[str, Policy]
"""(name, policy) of a policy that should not earn more than the optimum."""
ERROR_RATE = 0.01
"""Family-wise error rate: probability of any finding if the stated optimum is correct."""
NUM_SCREENED, NUM_TESTED, NUM_CONFIRMED = 12, 200, 800
"""Number of episodes of an adversary in the three rounds: screening, test, confirmation."""
NUM_FINALISTS = 6
"""Number of adversaries that are tested after the screening."""
MAX_STEPS = 1000
"""Maximum number of actions in an episode."""
FIRST_SEED = 3 * 2**29
"""First seed of the episodes; tests and examples use other seeds."""
EMPTY_REPLY = ""
NONSENSE = ("?!", "I do not know.", "a" * 200)
"""Replies that are invalid in every task."""
MALFORMED_REPLIES = (
    "", " ", "\n", "\x00", "\ud800", "😀" * 50, "é→", "None", "nan", "-1", "1e999", "[]", "{}",
    "{{{", "<answer></answer>", "\\boxed{}", "```", "%s%n{0}", "'; --", "٣", "²", "9" * 5000,
    "a" * 100_000,
)  # fmt: skip
"""Replies that are invalid in most tasks. They must not raise an exception, count as success or
earn more than the optimum."""
SEPARATORS = (" ", "\n", ", ")
REPLY_FORMATS = {
    "text before the action": "I think: {}",
    "text after the action": "{} because it is best",
    "the action twice": "{0} {0}",
    "the action on two lines": "{0}\n{0}",
    "the action in brackets": "[{}]",
    **{f"two actions joined by {text!r}": f"{{}}{text}{{}}" for text in SEPARATORS},
}
"""Name of an adversary -> format string of its reply; its arguments are an action of the intended
policy and a random action."""
MAX_CONSTANTS, MAX_WORDS, MAX_PROMPT_WORDS = 24, 40, 20


@dataclass(frozen=True)
class SuccessfulAdversary:
    """An adversary that earned more than the baseline."""

    name: str
    mean: float
    baseline: float
    """The stated optimum, or else the mean return of the expert. If there is neither, the mean
    return of the best of random play and constant actions."""
    stated: bool
    """Whether the baseline is a stated optimum."""

    def __str__(self) -> str:
        """Describe the finding in one line."""
        source = "optimal_value() is" if self.stated else "intended play earns"
        return f"{self.name} earns {self.mean:.4f} per episode, {source} {self.baseline:.4f}"


def successful_adversaries(env: Env, *, level: float = ERROR_RATE) -> list[SuccessfulAdversary]:
    """Return the adversaries that earn significantly more than the baseline of an environment.

    The baseline is the stated optimum, or else the mean return of the expert. If the environment
    has neither, the baseline is the mean return of the best of random play and of repeating one
    action. In this case, the only adversaries are empty replies, `NONSENSE` and lists of all
    actions, or a reply that is not a number if the actions are numbers. If the environment has a
    `cost_price()`, this price times (cost - `cost_limit`) is subtracted from the returns.

    Args:
        env: The environment with its wrappers; `env.unwrapped` provides the values and actions.
        level: Family-wise error rate: the probability of any finding if no adversary is better than
            the baseline.
    """
    findings = []
    game = _AdversaryEvaluator(env)
    gains: dict[Adversary, float] = {}
    for adversary in game.adversaries():
        with contextlib.suppress(Exception):  # `check` reports replies for which `step` raises
            gains[adversary] = float(game.gains_over_baseline(adversary[1], 0, NUM_SCREENED).mean())
    finalists = sorted(gains, key=gains.__getitem__, reverse=True)[:NUM_FINALISTS]
    rounds = ((NUM_SCREENED, NUM_TESTED), (NUM_SCREENED + NUM_TESTED, NUM_CONFIRMED))
    for name, policy in finalists:
        p_values = (
            _p_value(game.gains_over_baseline(policy, *seeds), "greater") for seeds in rounds
        )
        if all(p_value < level / len(finalists) for p_value in p_values):
            mean = float(game.policy_returns(policy, *rounds[1]).mean())
            findings.append(SuccessfulAdversary(name, mean, game.baseline, game.is_stated))
    return findings


class _AdversaryEvaluator:
    """An environment with its adversaries, its baseline and the returns of the episodes so far.

    `baseline` is the value that no adversary should exceed. `partner` is the policy whose episodes
    are paired by seed with the episodes of an adversary. If `partner` is None, the returns of an
    adversary are compared with `baseline`.
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.task: Any = env.unwrapped
        self.is_discrete = isinstance(env.action_space, gym.spaces.Discrete)
        text, _ = env.reset(seed=FIRST_SEED - 1)
        actions = self._legal_or_random_actions()
        self.actions = _evenly_spaced(actions, MAX_CONSTANTS)
        self.observation: Any = text
        self.instructions = str(getattr(self.task, "system_prompt", None) or "")
        words = _evenly_spaced(_words_in_texts([*actions, text]), MAX_WORDS)
        further = [word for word in _words_in_texts([self.instructions]) if word not in words]
        self.words = [*words, *_evenly_spaced(further, MAX_PROMPT_WORDS)]
        self.optimum = call_if_supported(self.task, "optimal_value")
        self.is_stated = self.optimum is not None
        self.has_expert = call_if_supported(self.task, "expert") is not None
        self.has_values = bool(call_if_supported(self.task, "action_values"))
        self.play = self._expert_action if self.has_expert else self._random_action
        self.play_name = "expert play" if self.has_expert else "random play"
        self.price = float(call_if_supported(self.task, "cost_price") or 0.0)
        self.limit = float(getattr(self.task, "cost_limit", 0.0) or 0.0) if self.price else 0.0
        self.played: dict[tuple[Any, int, int], np.ndarray] = {}
        self.baseline, self.partner = self._baseline_and_paired_policy()

    def _legal_or_random_actions(self) -> list[Any]:
        """Return the legal actions in the first state, or random actions if none are listed."""
        space: Any = self.env.action_space
        if self.is_discrete:
            return [int(space.start + i) for i in range(int(space.n))]
        actions = call_if_supported(self.task, "legal_actions")
        if actions is None:
            space.seed(0)
            actions = dict.fromkeys(space.sample() for _ in range(MAX_CONSTANTS))
        return list(actions)

    def _baseline_and_paired_policy(self) -> tuple[float, Policy | None]:
        """Return the attributes `baseline` and `partner`.

        With a stated optimum, the partner is the expert if it earns this optimum, else None.
        Otherwise, the partner is the expert or else the best of random play and constant actions,
        and the baseline is its mean return.
        """
        if not self.is_stated:
            constants = (
                [] if self.has_expert else [_constant_policy(action) for action in self.actions]
            )
            policies = [self.play, *constants]
            best = max(
                policies, key=lambda policy: self.policy_returns(policy, 0, NUM_SCREENED).mean()
            )
            return float(self.policy_returns(best, NUM_SCREENED, NUM_TESTED).mean()), best
        # Episodes are paired with those of the expert only if the expert earns the stated optimum.
        can_pair = self.has_expert and (
            _p_value(
                self.policy_returns(self.play, NUM_SCREENED, NUM_TESTED) - self.optimum, "two-sided"
            )
            > ERROR_RATE
        )
        return float(self.optimum), self.play if can_pair else None

    def gains_over_baseline(self, policy: Policy, seed_offset: int, count: int) -> np.ndarray:
        """Compute the gains of a policy on `count` consecutive seeds, [count].

        A gain is the return minus the partner's return with the same seed, or minus the baseline
        if there is no partner. `seed_offset` is added to `FIRST_SEED`.
        """
        partner = self.partner
        reference = (
            self.baseline if partner is None else self.policy_returns(partner, seed_offset, count)
        )
        return self.policy_returns(policy, seed_offset, count) - reference

    def policy_returns(self, policy: Policy, seed_offset: int, count: int) -> np.ndarray:
        """Compute the returns of a policy on `count` consecutive seeds, [count].

        The price times (cost - limit) is subtracted from the rewards of an episode. `seed_offset`
        is added to `FIRST_SEED`. Results are cached.
        """
        key = (policy, seed_offset, count)
        if key not in self.played:
            seeds = range(FIRST_SEED + seed_offset, FIRST_SEED + seed_offset + count)
            self.played[key] = np.array([self._episode_return(policy, seed) for seed in seeds])
        return self.played[key]

    def _episode_return(self, policy: Policy, seed: int) -> float:
        rng = np.random.default_rng([seed, 5])
        self.observation, _ = self.env.reset(seed=seed)
        total = self.price * self.limit
        for turn in range(MAX_STEPS):
            action = policy(turn, rng)
            if self.is_discrete and not self.env.action_space.contains(action):
                break  # an unreadable reply ends the episode, as in a rollout
            self.observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward) - self.price * float(info.get("cost", 0.0))
            if terminated or truncated:
                break
        return total

    def _expert_action(self, turn: int, rng: np.random.Generator) -> Any:
        return self.task.expert(rng)

    def _random_action(self, turn: int, rng: np.random.Generator) -> Any:
        if hasattr(self.task, "sample_action"):
            return self.task.sample_action(rng)
        return self.actions[int(rng.integers(len(self.actions)))]

    def adversaries(self) -> Iterator[Adversary]:
        """Yield all adversaries to test.

        There are fewer if the environment has neither a stated optimum nor an expert, see
        `successful_adversaries`.
        """
        if self.is_discrete:
            yield "a reply that is not a number (rollout.invalid_reward: 0)", _constant_policy(None)
        else:
            yield "silence", _constant_policy(EMPTY_REPLY)
            for junk in NONSENSE:
                yield f"the junk {junk[:20]!r}", _constant_policy(junk)
            several = [action for action in self.actions if isinstance(action, str)]
            for separator in SEPARATORS:
                yield (
                    f"all actions joined by {separator!r}",
                    _constant_policy(separator.join(several)),
                )
        if not self.is_stated and not self.has_expert:
            return
        yield "random play", self._random_action
        for action in self.actions:
            yield f"{action!r} in every turn", _constant_policy(action)
        yield from self._silent_and_greedy_policies()
        if not self.is_discrete:
            for junk in filter(None, MALFORMED_REPLIES):
                yield f"the junk {junk[:20]!r}", _constant_policy(junk)
            yield "the instructions repeated", _constant_policy(self.instructions)
            yield "the observation repeated", lambda turn, rng: str(self.observation)
            play, name = self.play, self.play_name
            yield f"{name} in capitals", lambda turn, rng: str(play(turn, rng)).upper()
            yield from self._policies_with_extra_text()

    def _silent_and_greedy_policies(self) -> Iterator[Adversary]:
        """Yield policies with empty replies in some turns, and policies that use action values."""
        play, name, nothing = self.play, self.play_name, None if self.is_discrete else EMPTY_REPLY
        longest = int(getattr(self.task, "max_turns", 4))
        for turns in sorted({1, 2, max(1, longest // 2), max(1, longest - 1)}):
            yield (
                f"silence for {turns} turns, then {name}",
                lambda turn, rng, n=turns: nothing if turn < n else play(turn, rng),
            )
            yield (
                f"{name} for {turns} turns, then silence",
                lambda turn, rng, n=turns: play(turn, rng) if turn < n else nothing,
            )
        yield (
            f"silence every other turn of {name}",
            lambda turn, rng: nothing if turn % 2 else play(turn, rng),
        )
        if self.has_values:
            yield "silence if no action has a positive value", self._greedy_or_silent_action
            yield "the action of the highest stated value", self._greedy_action

    def _greedy_or_silent_action(self, turn: int, rng: np.random.Generator) -> Any:
        values = call_if_supported(self.task, "action_values")
        return (
            self._greedy_action(turn, rng) if values and max(values.values()) > 0 else EMPTY_REPLY
        )

    def _greedy_action(self, turn: int, rng: np.random.Generator) -> Any:
        values = call_if_supported(self.task, "action_values")
        return max(values, key=values.__getitem__) if values else self._random_action(turn, rng)

    def _policies_with_extra_text(self) -> Iterator[Adversary]:
        """Yield policies whose replies have text around an action, or several actions."""
        frames = {f"{name} ({self.play_name})": frame for name, frame in REPLY_FORMATS.items()}
        for word, times in itertools.product(self.words, (1, 8)):
            name = f"{self.play_name} with {times} times {word!r} after it"
            frames[name] = " ".join(["{}", *[word] * times])
        for name, frame in frames.items():
            yield name, lambda t, r, f=frame: f.format(self.play(t, r), self._random_action(t, r))


def _words_in_texts(texts: Sequence[Any]) -> list[str]:
    """Return the distinct words of texts in lower case, in order of first appearance."""
    return list(dict.fromkeys(w for text in texts for w in re.findall(r"\w+", str(text).lower())))


def _constant_policy(action: Any) -> Policy:
    """Return the policy that gives the same action in every turn."""
    return lambda turn, rng: action


def _evenly_spaced(items: Sequence[Any], most: int) -> Sequence[Any]:
    """Return at most `most` items that are evenly spaced in `items`."""
    return items[:: max(1, -(-len(items) // most))]


def _p_value(gains: np.ndarray, alternative: str) -> float:
    """Return the p value of a t test of the null hypothesis that the mean gain is 0.

    If all gains are equal, the p value is 0 for a gain in the direction of `alternative`, else 1.
    """
    from scipy import stats

    if np.ptp(gains) < 1e-12:
        difference = gains[0] if alternative == "greater" else abs(gains[0])
        return 0.0 if difference > 1e-9 else 1.0
    test: Any = stats.ttest_1samp(gains, 0.0, alternative=alternative)
    return float(test.pvalue)


def call_if_supported(task: Any, method: str) -> Any:
    """Call a method without arguments; return None if the environment does not support it."""
    try:
        return getattr(task, method)()
    except (AttributeError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return None
