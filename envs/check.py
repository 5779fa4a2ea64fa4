"""Check a text environment more strictly than gymnasium's own checker."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from rlhf.envs.adversary import (
    MALFORMED_REPLIES,
    MAX_STEPS,
    Env,
    call_if_supported,
    successful_adversaries,
)
from rlhf.envs.catalog import find
from rlhf.envs.core import FreeText, TextEnv
from rlhf.envs.exact import NotEnumerableError, exact_value

EXACT_CALLS_PER_EPISODE = 4_000
"""Budget of the exact solution: calls of `step` and `reset` per episode of the check."""


def check(env: str | Env, *, episodes: int = 10, **env_kwargs: Any) -> list[str]:
    """Run all checks and return one line for each problem that was found.

    The first check is gymnasium's `check_env`. Further checks concern repeated and interleaved
    episodes, the use of global generators, the types of info values, malformed actions and the ends
    of episodes. The stated `optimal_value()` and `random_value()` are compared with simulations.
    `rlhf.envs.adversary` searches for policies that beat the stated optimum (empty or malformed
    replies, stalling, text around an action, any legal action). If the task can be enumerated, the
    stated optimum is compared with the exact one from `rlhf.envs.exact`.

    Args:
        env: An environment, its id, or `module:id`.
        episodes: Number of episodes of random play per check. Simulations of `optimal_value()` and
            `random_value()` use 20 times this number, and the exact solution at most
            `EXACT_CALLS_PER_EPISODE` times this number of calls. The search for better policies
            does not depend on it.
        **env_kwargs: Keyword arguments of the environment, if `env` is an id.
    """
    make: Callable[[], Env]
    if isinstance(env, str):
        make = partial(find(env).make, **env_kwargs)
    elif env.spec is not None:
        make = env.spec.make
    else:
        make = partial(copy.deepcopy, env)
    findings: list[str] = []
    for name, run_check in CHECKS.items():
        try:
            findings += [f"{name}: {finding}" for finding in run_check(make, episodes)]
        except (Exception, SystemExit) as error:  # raised by the environment
            findings.append(f"{name}: raised {type(error).__name__}: {error}")
    return findings


def _play_episode(
    env: Env, seed: int, act: Callable[[], Any] | None = None
) -> Iterator[tuple[Any, Any, float, bool, bool, dict[str, Any]]]:
    """Play an episode; yield the action and the five results of `step` for each step.

    The first item describes the reset; its action is None and its reward is 0.0. `act` returns the
    next action. By default, actions are sampled from the action space.
    """
    # With the seed of the episode, actions could be equal to the hidden draws of the environment.
    env.action_space.seed(seed + 2**31)
    text, info = env.reset(seed=seed)
    yield None, text, 0.0, False, False, info
    for _ in range(MAX_STEPS):
        action = env.action_space.sample() if act is None else act()
        text, reward, terminated, truncated, info = env.step(action)
        yield action, text, float(reward), terminated, truncated, info
        if terminated or truncated:
            return


def _check_with_gymnasium(make: Callable[[], Env], episodes: int) -> list[str]:
    """Return the messages of the error or of the warnings of gymnasium's `check_env`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(make().unwrapped)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
    # Remove the color codes in gymnasium's warnings.
    return [re.sub(r"\x1b\[\d+m(WARN: )?", "", str(warning.message)) for warning in caught]


def _check_spec_is_json(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check that the environment has a spec that can be written as JSON."""
    spec = make().spec
    if spec is None:
        return ["the environment has no id; register it with gymnasium, so that runs can name it"]
    if callable(
        spec.entry_point
    ):  # of a plug-in; gymnasium cannot serialize it, which is not an error
        spec = dataclasses.replace(spec, entry_point="module:name")
    try:
        json.loads(spec.to_json())
    except (TypeError, ValueError) as error:
        return [
            f"the spec cannot be written as JSON ({error}); use no functions as keyword arguments"
        ]
    return []


def _check_step_results(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check the observation space and the types of results, and that episodes end.

    The function also checks that the first observation is not empty and that rewards are finite.
    """
    findings, types = set[str](), dict[str, type]()
    env = make()
    if isinstance(env.observation_space, gym.spaces.Text):
        findings.add(
            "gymnasium's Text space allows only its alphabet (without spaces by default), and "
            "AsyncVectorEnv with shared memory misreads it; use rlhf.envs.core.FreeText"
        )
    for seed in range(episodes):
        steps = list(_play_episode(env, seed))
        if not (steps[-1][3] or steps[-1][4]):
            findings.add(f"an episode did not end within {MAX_STEPS} actions")
        if steps[0][1] == "":
            findings.add("the first observation is empty, so the agent has no information")
        for _, text, reward, _, _, info in steps:
            if not isinstance(text, str):
                findings.add(f"an observation is {type(text).__name__}, not str")
            if not math.isfinite(reward):
                findings.add("a reward is not finite")
            for key, value in info.items():
                if type(value) is not types.setdefault(key, type(value)):
                    findings.add(
                        f"info[{key!r}] has the types {types[key].__name__} and "
                        f"{type(value).__name__}; a vector environment keeps the first type only"
                    )
    return sorted(findings)


def _check_reproducibility(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check that a seed determines an episode, even if another instance is stepped meanwhile."""
    first, second = make(), make()
    findings = set[str]()
    for seed in range(episodes):
        alone = repr(list(_play_episode(first, seed)))
        if repr(list(_play_episode(first, seed))) != alone:
            findings.add("the same seed and actions gave two different episodes")
            continue
        other, record = _play_episode(second, seed + 1), []
        for step in _play_episode(first, seed):
            record.append(step)
            next(other, None)
        if repr(record) != alone:
            findings.add("stepping another copy changed the episode (shared state)")
    return sorted(findings)


def _check_global_generators(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check that episodes do not change the state of Python's and numpy's global generators."""
    python, legacy = random.getstate(), repr(np.random.get_state())
    for seed in range(episodes):
        list(_play_episode(make(), seed))
    findings = []
    if random.getstate() != python:
        findings.append("draws from (or seeds) Python's global generator; use np_random")
    if repr(np.random.get_state()) != legacy:
        findings.append("draws from (or seeds) numpy's global generator; use np_random")
    return findings


def _check_malformed_replies(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check that malformed replies raise no exception, are not successful and have finite rewards.

    Environments without text actions are not checked.
    """
    findings, env = [], make()
    if not isinstance(env.action_space, gym.spaces.Text | FreeText):
        return []
    for text in MALFORMED_REPLIES:
        env.reset(seed=0)
        shown = repr(text[:20])
        try:
            _, reward, _, _, info = env.step(text)
        except Exception as error:
            findings.append(f"action {shown} raised {type(error).__name__}: {error}"[:200])
            continue
        if info.get("is_success", False):
            findings.append(f"action {shown} counts as success")
        if not math.isfinite(float(reward)):
            findings.append(f"action {shown} has the reward {reward}, which is not finite")
    return findings


def _check_values_by_simulation(make: Callable[[], Env], episodes: int) -> list[str]:
    """Compare `optimal_value()` with simulated expert play, and `random_value()` with random play.

    A difference of more than 5 standard errors is reported. The function also checks that both
    values are finite and that `random_value()` is at most `optimal_value()`.
    """
    env: Any = make().unwrapped
    rng = np.random.default_rng(0)
    findings, count = [], 20 * episodes
    policies = {"optimal_value": "expert", "random_value": "sample_action"}
    values = {name: call_if_supported(env, name) for name in policies}
    for name, method in policies.items():
        stated = values[name]
        if stated is None:
            continue
        if not math.isfinite(stated):
            findings.append(f"{name}() is {stated}, which is not finite")
            continue
        env.reset(seed=0)
        try:
            getattr(env, method)(rng)
        except (AttributeError, NotImplementedError):
            continue  # a value can be known although the environment does not implement the policy
        act = partial(getattr(env, method), rng)
        returns = np.array(
            [
                sum(reward for _, _, reward, *_ in _play_episode(env, seed, act))
                for seed in range(count)
            ]
        )
        error = max(float(returns.std()) / count**0.5, 1e-9)
        if abs(returns.mean() - stated) > 5 * error:
            mean = f"{returns.mean():.4f} ± {error:.4f}"
            findings.append(f"{name}() is {stated:.4f}, but {count} episodes gave {mean}")
    # Random play may violate the constraint of a constrained task.
    known = None not in values.values() and not call_if_supported(env, "cost_price")
    if known and values["random_value"] > values["optimal_value"]:
        findings.append("random_value() is above optimal_value()")
    return findings


def _search_adversaries(make: Callable[[], Env], episodes: int) -> list[str]:
    """Describe each adversary that earns significantly more than the baseline."""
    return [str(result) for result in successful_adversaries(make())]


def _check_exact_optimum(make: Callable[[], Env], episodes: int) -> list[str]:
    """Check that the exact optimum is at most `optimal_value()`.

    Environments that state no optimum, have wrappers or cannot be enumerated are not checked.
    """
    env = make()
    task: Any = env.unwrapped
    if not hasattr(task, "optimal_value") or not _has_only_checker_wrappers(env):
        return []
    try:
        stated = float(task.optimal_value())
        price = task.cost_price() if isinstance(task, TextEnv) else 0.0
        best = exact_value(env, max_steps=EXACT_CALLS_PER_EPISODE * episodes, price=price)
    except (NotEnumerableError, NotImplementedError, ValueError):
        return []
    best += price * float(getattr(task, "cost_limit", 0.0))
    if best <= stated + 1e-6 * max(1.0, abs(stated)):
        return []
    return [f"the exact optimum is {best:.4f}, but optimal_value() is {stated:.4f}"]


def _has_only_checker_wrappers(env: Env) -> bool:
    """Return whether an environment has no wrappers except gymnasium's checkers."""
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, PassiveEnvChecker | OrderEnforcing):
            return False
        env = env.env
    return True


CHECKS: dict[str, Callable[[Callable[[], Env], int], list[str]]] = {
    "gymnasium": _check_with_gymnasium,
    "spec": _check_spec_is_json,
    "texts": _check_step_results,
    "repeats": _check_reproducibility,
    "globals": _check_global_generators,
    "junk": _check_malformed_replies,
    "truth": _check_values_by_simulation,
    "adversary": _search_adversaries,
    "exact": _check_exact_optimum,
}
"""Prefix of the findings -> function (environment factory, number of episodes) -> findings."""
