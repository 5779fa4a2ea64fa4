"""Say what is wrong with a text environment, beyond gymnasium's own checker."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from rlhf.envs.adversary import beaten
from rlhf.envs.catalogue import find
from rlhf.envs.core import FreeText, TextEnv
from rlhf.envs.exact import NotEnumerableError, exact_value

Env = gym.Env[Any, Any]
MAX_STEPS = 1000
EXACT_STEPS = 4_000
"""Calls of an environment that the exact solution may spend, times `episodes`."""
JUNK = (
    "", " ", "\n", "\x00", "\ud800", "😀" * 50, "é→", "None", "nan", "-1", "1e999", "[]", "{}",
    "{{{", "<answer></answer>", "\\boxed{}", "```", "%s%n{0}", "'; --", "٣", "²", "9" * 5000,
    "a" * 100_000,
)  # fmt: skip
"""Replies that a confused model may give; none of them should raise or count as success."""


def check(env: str | Env, *, episodes: int = 10, **env_kwargs: Any) -> list[str]:
    """Findings, one line each; an empty list when nothing is wrong.

    Runs gymnasium's `check_env` and then what it does not look at: whole episodes repeated and
    interleaved, the global generators, types in info, junk actions, endings, whether its ground
    truth agrees with what can be simulated, and whether anything that a policy can say (silence,
    junk, invalid actions, stalling, text around an action, any legal action) beats the stated
    optimum: by `rlhf.envs.adversary`, and exactly by `rlhf.envs.exact` where the task can be
    enumerated.

    Args:
        env: An environment, its id, or `module:id`.
        episodes: Episodes per check.
    """
    make: Callable[[], Env]
    if isinstance(env, str):
        make = partial(find(env).make, **env_kwargs)
    elif env.spec is not None:
        make = env.spec.make
    else:
        make = partial(copy.deepcopy, env)
    findings: list[str] = []
    for part in (
        _gymnasium,
        _spec,
        _texts,
        _repeats,
        _globals,
        _junk,
        _truth,
        _adversaries,
        _exact,
    ):
        try:
            findings += part(make, episodes)
        except Exception as error:
            # A checker must outlive what it checks, whatever that raises.
            findings.append(f"{part.__name__[1:]}: raised {type(error).__name__}: {error}")
    return findings


def _play(env: Env, seed: int) -> Iterator[tuple[Any, ...]]:
    """An episode of sampled actions: the reset's result, then each action with its step's."""
    # Another seed than the episode's: equal streams would make actions match hidden draws.
    env.action_space.seed(seed + 2**31)
    yield env.reset(seed=seed)
    for _ in range(MAX_STEPS):
        action = env.action_space.sample()
        result = env.step(action)
        yield action, result
        if result[2] or result[3]:
            return


def _gymnasium(make: Callable[[], Env], episodes: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(make().unwrapped)
        except Exception as error:
            return [f"gymnasium: {type(error).__name__}: {error}"]
    return [f"gymnasium: {_plain(str(warning.message))}" for warning in caught]


def _plain(message: str) -> str:
    """gymnasium's warnings without their colour codes."""
    return message.replace("\x1b[33mWARN: ", "").replace("\x1b[0m", "")


def _spec(make: Callable[[], Env], episodes: int) -> list[str]:
    spec = make().spec
    if spec is None:
        return ["spec: made without an id; register it, so that runs can name it"]
    try:
        json.loads(spec.to_json())
    except (TypeError, ValueError) as error:
        return [f"spec: cannot be written as JSON ({error}); keep functions out of its arguments"]
    return []


def _texts(make: Callable[[], Env], episodes: int) -> list[str]:
    """Types, endings and emptiness."""
    findings, types = set[str](), dict[str, type]()
    env = make()
    if isinstance(env.observation_space, gym.spaces.Text):
        findings.add(
            "texts: gymnasium's Text space admits its alphabet only (no blanks by default) and is "
            "misread by AsyncVectorEnv's shared memory; use rlhf.envs.core.FreeText"
        )
    for seed in range(episodes):
        record = list(_play(env, seed))
        results = [(text, 0.0, False, False, info) for text, info in record[:1]]
        results += [step for _, step in record[1:]]
        if not (results[-1][2] or results[-1][3]):
            findings.add(f"texts: an episode did not end within {MAX_STEPS} actions")
        if not results[0][0]:
            findings.add("texts: the first observation is empty, the agent has nothing to go by")
        for text, reward, _, _, info in results:
            if not isinstance(text, str):
                findings.add(f"texts: an observation is {type(text).__name__}, not str")
            if not math.isfinite(float(reward)):
                findings.add("texts: a reward is not finite")
            for key, value in info.items():
                if type(value) is not types.setdefault(key, type(value)):
                    findings.add(
                        f"texts: info[{key!r}] is now {types[key].__name__}, now "
                        f"{type(value).__name__}; a vector environment keeps the first type only"
                    )
    return sorted(findings)


def _repeats(make: Callable[[], Env], episodes: int) -> list[str]:
    """One seed is one episode, also while a copy is stepped in between."""
    first, second = make(), make()
    findings = set[str]()
    for seed in range(episodes):
        alone = repr(list(_play(first, seed)))
        if repr(list(_play(first, seed))) != alone:
            findings.add("repeats: the same seed and actions gave two different episodes")
            continue
        mine, record, running = _play(first, seed), [], True
        other = _play(second, seed + 1)
        while running:
            step = next(mine, None)
            running = step is not None
            record += [step] if step is not None else []
            next(other, None)
        if repr(record) != alone:
            findings.add("repeats: stepping another copy changed the episode (shared state)")
    return sorted(findings)


def _globals(make: Callable[[], Env], episodes: int) -> list[str]:
    """The global generators belong to the user."""
    python, legacy = random.getstate(), repr(np.random.get_state())
    for seed in range(episodes):
        list(_play(make(), seed))
    findings = []
    if random.getstate() != python:
        findings.append("globals: draws from (or seeds) Python's global generator; use np_random")
    if repr(np.random.get_state()) != legacy:
        findings.append("globals: draws from (or seeds) numpy's global generator; use np_random")
    return findings


def _junk(make: Callable[[], Env], episodes: int) -> list[str]:
    """Junk must not raise, and must not succeed; an environment of numbers never hears it."""
    findings, env = [], make()
    if not isinstance(env.action_space, gym.spaces.Text | FreeText):
        return []
    for text in JUNK:
        env.reset(seed=0)
        shown = repr(text[:20])
        try:
            _, reward, _, _, info = env.step(text)
        except Exception as error:
            findings.append(f"junk: action {shown} raised {type(error).__name__}: {error}"[:200])
            continue
        if info.get("is_success", False):
            findings.append(f"junk: action {shown} counts as success")
        if not math.isfinite(float(reward)):
            findings.append(f"junk: action {shown} earns {reward}")
    return findings


def _truth(make: Callable[[], Env], episodes: int) -> list[str]:
    """Stated values against simulation, for environments that state any."""
    env = make().unwrapped
    if not isinstance(env, TextEnv) or type(env).optimal_value is TextEnv.optimal_value:
        return []
    rng = np.random.default_rng(0)
    findings, count = [], 20 * episodes
    policies = {"optimal_value": (env.optimal_value(), lambda: env.expert(rng))}
    if type(env).random_value is not TextEnv.random_value:
        policies["random_value"] = (env.random_value(), lambda: env.sample_action(rng))
    if policies.get("random_value", (-math.inf,))[0] > policies["optimal_value"][0]:
        findings.append("truth: random_value() is above optimal_value()")
    for name, (stated, act) in policies.items():
        returns = np.array([_return(env, act, seed) for seed in range(count)])
        error = max(float(returns.std()) / count**0.5, 1e-9)
        if abs(returns.mean() - stated) > 5 * error:
            mean = f"{returns.mean():.4f} ± {error:.4f}"
            findings.append(f"truth: {name}() says {stated:.4f}, {count} episodes gave {mean}")
    return findings


def _adversaries(make: Callable[[], Env], episodes: int) -> list[str]:
    """What can be said without playing, or around playing, must not pay more than the optimum."""
    return [str(found) for found in beaten(make())]


def _exact(make: Callable[[], Env], episodes: int) -> list[str]:
    """The optimum over every policy, where the task is small enough to be walked through."""
    env = make()
    task: Any = env.unwrapped
    if not hasattr(task, "optimal_value") or not _is_bare(env):
        return []
    try:
        stated = float(task.optimal_value())
        price = task.cost_price() if isinstance(task, TextEnv) else 0.0
        best = exact_value(env, max_steps=EXACT_STEPS * episodes, price=price)
    except (NotEnumerableError, NotImplementedError, ValueError):
        return []
    if price:
        best += price * float(getattr(task, "cost_limit", 0.0))
    if best <= stated + 1e-6 * max(1.0, abs(stated)):
        return []
    return [f"exact: the best of all policies earns {best:.4f}, optimal_value() says {stated:.4f}"]


def _is_bare(env: Env) -> bool:
    """Whether nothing but gymnasium's own watchers is wrapped around an environment."""
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, PassiveEnvChecker | OrderEnforcing):
            return False
        env = env.env
    return True


def _return(env: TextEnv, act: Callable[[], str], seed: int) -> float:
    env.reset(seed=seed)
    total = 0.0
    for _ in range(MAX_STEPS):
        _, reward, terminated, truncated, _ = env.step(act())
        total += float(reward)
        if terminated or truncated:
            break
    return total
