"""Play held-out episodes with a policy and write down each of them.

One explicit seed per episode, the same for every policy, so that differences pair; the seeds lie in
a block that training cannot reach.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.passes import pass_columns
from rlhf.evaluation.records import Bounds
from rlhf.evaluation.statistics import mean_interval, wilson_interval
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collect import Collector, Start
from rlhf.rollout.seeds import evaluation_seed

REFERENCE_POLICIES = ("random", "expert")
RANDOM_STREAM = 11


def evaluation_starts(episodes: int, *, first: int = 0, samples: int = 1) -> list[Start]:
    """So many evaluation seeds from the ``first`` on, the same for every policy."""
    numbers = range(first, first + episodes)
    return [Start(evaluation_seed(i), i, member) for i in numbers for member in range(samples)]


def play_model(
    model: Any,
    collector: Collector,
    starts: Sequence[Start],
    *,
    decoding: str,
    rewards: Sequence[Any],
) -> list[dict[str, Any]]:
    """Rows of ``episodes.jsonl`` for a model.

    Args:
        model: a causal model.
        collector: environments and turn format; its temperature is used when sampling.
        starts: the episodes.
        decoding: "greedy" or "sampled".
        rewards: rewards measured beside the environment's own; each adds its components.
    """
    began = time.monotonic()
    temperature = 0.0 if decoding == "greedy" else None
    rollouts = collector.collect(model, starts, temperature=temperature)
    seconds = (time.monotonic() - began) / len(rollouts)
    return _rows(rollouts, rewards, decoding=decoding, seconds=seconds)


def play_reference(
    policy: str,
    make_env: Callable[[], gym.Env],
    *,
    episodes: int,
    rewards: Sequence[Any],
    first: int = 0,
    samples: int = 1,
) -> list[dict[str, Any]]:
    """Rows of ``episodes.jsonl`` for the random or the expert policy of an environment.

    Raises:
        UserError: the environment knows no such policy.
    """
    if policy not in REFERENCE_POLICIES:
        raise UserError(f"policy must be one of {', '.join(REFERENCE_POLICIES)}, got {policy!r}")
    env = make_env()
    rollouts, began = [], time.monotonic()
    for start in evaluation_starts(episodes, first=first, samples=samples):
        rollouts.append(_play(policy, env, start))
    env.close()
    seconds = (time.monotonic() - began) / len(rollouts)
    return _rows(rollouts, rewards, decoding=policy, seconds=seconds)


def _play(policy: str, env: gym.Env, start: Start) -> Rollout:
    # Not the seed alone: the environment draws from that stream, and equal draws are no chance.
    key = [RANDOM_STREAM, start.seed]
    rng = np.random.default_rng([*key, start.member] if start.member else key)
    observation, _ = env.reset(seed=start.seed)
    task: Any = env.unwrapped
    rollout = Rollout(start.seed, start.group, start.member)
    over = False
    while not over:
        try:
            action = task.expert() if policy == "expert" else task.sample_action(rng)
        except (NotImplementedError, AttributeError) as error:
            raise UserError(f"{env} has no {policy} policy") from error
        rollout.conversation += [
            {"role": "user", "content": str(observation)},
            {"role": "assistant", "content": str(action)},
        ]
        observation, reward, terminated, truncated, info = env.step(action)
        rollout.append([0], turn=len(rollout.tokens), logprobs=[0.0])
        rollout.rewards[-1] += float(reward)  # type: ignore[arg-type]
        rollout.costs[-1] += float(info.get("cost", 0.0))
        rollout.invalid += not info.get("valid", True)
        success = info.get("is_success")
        rollout.success = None if success is None else bool(success)
        over = terminated or truncated
    return rollout


def _rows(
    rollouts: Sequence[Rollout], rewards: Sequence[Any], *, decoding: str, seconds: float
) -> list[dict[str, Any]]:
    conversations = [rollout.conversation for rollout in rollouts]
    columns = {}
    for reward in rewards:
        columns |= reward.score(conversations).components
    rows = []
    for index, rollout in enumerate(rollouts):
        components = {name: column[index] for name, column in columns.items()}
        rows.append(
            {
                "decoding": decoding,
                "seed": rollout.seed,
                "sample": rollout.member,
                "return": rollout.score,
                "success": rollout.success,
                "cost": rollout.cost,
                "turns": rollout.num_turns,
                "invalid": rollout.invalid,
                "cut": rollout.cut,
                # Nobody sampled what a policy of the environment says.
                "tokens": None if decoding in REFERENCE_POLICIES else rollout.num_actions,
                "seconds": round(seconds, 4),
                "components": components,
                "messages": rollout.conversation,
            }
        )
    return rows


def bounds(make_env: Callable[[], gym.Env]) -> tuple[float | None, float | None]:
    """(value of the random policy, value of the optimal one), where the environment knows them."""
    task: Any = make_env().unwrapped
    values = []
    for name in ("random_value", "optimal_value"):
        try:
            values.append(float(getattr(task, name)()))
        except (NotImplementedError, AttributeError):
            values.append(None)
    return values[0], values[1]


def summarise(
    rows: Sequence[dict[str, Any]],
    *,
    name: str,
    env: str,
    random: float | None = None,
    optimal: float | None = None,
) -> dict[str, Any]:
    """``summary.json``: the mean of every metric with its 95% interval over seeds.

    A seed that was played several times counts once, with its mean, and gives pass@k.
    """
    groups: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        fields = {key: row[key] for key in ("return", "success", "cost", "turns", "invalid")}
        for key, value in {**fields, "tokens": row["tokens"], **row["components"]}.items():
            if value is not None:
                groups.setdefault(key, {}).setdefault(row["seed"], []).append(float(value))
    columns = {key: [float(np.mean(v)) for v in seeds.values()] for key, seeds in groups.items()}
    once = all(len(v) == 1 for v in groups.get("success", {}).values())
    if limits := Bounds.known(random, optimal):
        columns["normalized"] = [limits.normalise(value) for value in columns["return"]]
    columns |= pass_columns(groups)
    return {
        "name": name,
        "env": env,
        "policy": name,
        "decoding": rows[0]["decoding"],
        "episodes": len(rows),
        "random": random,
        "optimal": optimal,
        "metrics": {
            key: share(values) if key == "success" and once else interval(values)
            for key, values in columns.items()
        },
    }


def share(values: Sequence[float]) -> dict[str, float | int | None]:
    """Share of ones with its 95% Wilson interval, which holds near 0 and 1 too."""
    return wilson_interval(int(sum(values)), len(values)).as_dict()


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean with its 95% t interval, as plain data; the bounds are None for a single value."""
    return mean_interval(values).as_dict()


def write_evaluation(
    directory: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> Path:
    """Write ``evaluation/<name>/`` of a run.

    The folder appears whole or not at all: one that is there was measured to its end.

    Raises:
        UserError: there is one already; what was measured is never overwritten.
    """
    target = directory / "evaluation" / summary["name"]
    if target.exists():
        raise UserError(f"{target} exists already: an evaluation is never overwritten")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    labels = {"env": summary["env"], "policy": summary["policy"]}
    with (part / "episodes.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(labels | row, ensure_ascii=False) + "\n")
    (part / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    part.rename(target)
    return target
