"""Collect held-out episodes of a policy, summarize them, and write both to a run directory.

Every policy is evaluated on the same seeds, so that policies can be compared by paired differences.
Training uses other seeds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.common.files import atomic_path, json_line
from rlhf.common.score_names import GOLD, SCORE
from rlhf.config.rollout import RolloutSpec
from rlhf.errors import UserError
from rlhf.evaluation.metric_limits import MetricLimits, ReferenceReturns
from rlhf.evaluation.metrics import (
    independent_unit_of,
    metric_interval,
    pass_at_k_by_seed,
    start_entry_id,
    unit_name,
)
from rlhf.evaluation.notes import evaluation_caveats, missing_scores_by_reward
from rlhf.evaluation.records import REFERENCE_POLICIES
from rlhf.reward_models.core import components_with_value, score_copies
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector
from rlhf.rollout.environments.calls import EnvironmentCaller, reset_environment, step_environment
from rlhf.rollout.episode import EpisodeSeed
from rlhf.rollout.seeds import evaluation_seed
from rlhf.rollout.turns import StepResult, opening_messages
from rlhf.stats import Interval

EVALUATION_FILES = frozenset({"episodes.jsonl", "summary.json"})
"""Names of the files of an evaluation."""
RANDOM_STREAM = 11
"""First element of the seed of the random policy's generator."""
_METRIC_FIELDS = ("return", "success", "cost", "turns", "invalid", "tokens")
"""Fields of an episode that are metrics of the summary. The reward components are also metrics."""


def evaluation_episode_seeds(
    num_start_states: int, *, first: int = 0, samples: int = 1
) -> list[EpisodeSeed]:
    """Return ``samples`` episode seeds for each of ``num_start_states`` held-out start states.

    ``first`` is the index of the first start state.
    """
    numbers = range(first, first + num_start_states)
    return [
        EpisodeSeed(evaluation_seed(i), i, sample) for i in numbers for sample in range(samples)
    ]


def play_model_episodes(
    collector: Collector,
    starts: Sequence[EpisodeSeed],
    *,
    decoding: str,
    rewards: Sequence[Any],
    gold: Any = None,
    counts: Counter[str] | None = None,
) -> list[dict[str, Any]]:
    """Play one episode for each start with a model, and return the rows of ``episodes.jsonl``.

    Args:
        collector: Collector with the model and the environment.
        starts: Seeds of the episodes.
        decoding: "greedy", or "sampled" to sample at the collector's temperature.
        rewards: Rewards whose components are added to the episodes.
        gold: A reward that is only measured, whose components are also added; None if there is
            none.
        counts: Counter to which the numbers of truncated texts, of missing scores by reason and of
            environment failures are added.

    Raises:
        UserError: See `Collector.collect`.
    """
    began = time.monotonic()
    temperature = 0.0 if decoding == "greedy" else None
    collector.workers.caller.failures.clear()
    rollouts = collector.collect(starts, temperature=temperature)
    if counts is not None:
        counts.update(collector.workers.caller.failures)
    seconds = (time.monotonic() - began) / len(rollouts)
    return scored_episode_rows(
        rollouts, rewards, gold=gold, decoding=decoding, seconds_per_episode=seconds, counts=counts
    )


def play_reference_episodes(
    policy: str,
    make_env: Callable[[], gym.Env],
    starts: Sequence[EpisodeSeed],
    *,
    rewards: Sequence[Any],
    spec: RolloutSpec | None = None,
    counts: Counter[str] | None = None,
    calls: EnvironmentCaller | None = None,
) -> list[dict[str, Any]]:
    """Play one episode for each start with the random or the expert policy of an environment.

    The conversations begin like those of other policies, with the system message and the keys of a
    prompt, such as its reference answer, because the rewards score them.

    Args:
        policy: "random" or "expert".
        make_env: Function that creates the environment.
        starts: Seeds of the episodes.
        rewards: Rewards whose components are added to the episodes.
        spec: Sampling settings of the evaluation, which may have a system message.
        counts: Counter to which the numbers of truncated texts, of missing scores by reason and of
            environment failures are added.
        calls: Error handling for environment code; by default a failure raises UserError.

    Returns:
        The rows of ``episodes.jsonl``.

    Raises:
        UserError: The policy is unknown, the environment does not have it, every episode failed, or
            an episode failed and ``calls`` does not count failures.
    """
    if policy not in REFERENCE_POLICIES:
        raise UserError(f"policy must be one of {', '.join(REFERENCE_POLICIES)}, got {policy!r}")
    env = make_env()
    began = time.monotonic()
    calls, spec = calls or EnvironmentCaller(), spec or RolloutSpec()
    rollouts = []
    for start in starts:
        rollout = _play_reference_episode(policy, env, start, spec, calls)
        if rollout is not None:
            rollouts.append(rollout)
            continue
        calls.close(env)
        env = make_env()
    calls.close(env)
    if not rollouts:
        raise UserError("every episode failed with an environment error; see the warnings above")
    if counts is not None:
        counts.update(calls.failures)
    seconds = (time.monotonic() - began) / len(rollouts)
    return scored_episode_rows(
        rollouts,
        rewards,
        decoding=policy,
        seconds_per_episode=seconds,
        counts=counts,
        tokens_known=False,
    )


def _play_reference_episode(
    policy: str, env: gym.Env, start: EpisodeSeed, spec: RolloutSpec, calls: EnvironmentCaller
) -> Rollout | None:
    """Play one episode with a reference policy; return None if the environment failed."""
    # The environment's generator has the same seed, so the policy's generator needs another one.
    key = [RANDOM_STREAM, start.seed]
    rng = np.random.default_rng([*key, start.sample_index] if start.sample_index else key)
    opening = calls.run(start.seed, lambda: reset_environment(env, start.seed))
    if opening is None:
        return None
    observation, info = opening
    start_info = {**info, "observation": observation}
    rollout = Rollout(start.seed, start.group_index, start.sample_index, start_info=start_info)
    rollout.conversation = opening_messages(env, observation, info, spec)
    done = False
    while not done:
        turn = calls.run(start.seed, lambda: _take_reference_step(policy, env, rng))
        if turn is None:
            return None
        action, result = turn
        rollout.append([0], turn=len(rollout.tokens), logprobs=[0.0])
        rollout.record_step(action, result)
        _, _, terminated, truncated, _ = result
        done = terminated or truncated
    return rollout


def _take_reference_step(
    policy: str, env: gym.Env, rng: np.random.Generator
) -> tuple[str, StepResult]:
    """Take one step with a reference policy.

    Returns:
        The action as text, and the result of the environment's step.

    Raises:
        UserError: The environment does not have the policy.
    """
    task: Any = env.unwrapped
    try:
        action = task.expert() if policy == "expert" else task.sample_action(rng)
    except (NotImplementedError, AttributeError) as error:
        raise UserError(f"{env} has no {policy} policy") from error
    return str(action), step_environment(env, action)


def scored_episode_rows(
    rollouts: Sequence[Rollout],
    rewards: Sequence[Any],
    *,
    gold: Any = None,
    decoding: str,
    seconds_per_episode: float,
    counts: Counter[str] | None,
    tokens_known: bool = True,
) -> list[dict[str, Any]]:
    """Score episodes and return the rows of ``episodes.jsonl``.

    The values of ``rewards`` are the component "score", unless they are equal to the only
    component. Those of ``gold``, a reward that is only measured, are the component "gold".
    ``seconds_per_episode`` is a mean. ``tokens_known`` is False if the policy does not report its
    numbers of tokens. Missing scores by reason, and truncated texts, are added to ``counts`` unless
    it is None.
    """
    conversations = [rollout.scored_conversation for rollout in rollouts]
    columns: dict[str, list[float | None]] = {}
    measured = [(reward, SCORE) for reward in rewards]
    if gold is not None:
        measured.append((gold, GOLD))
    for reward, name in measured:
        scores = score_copies(reward, conversations)
        columns |= components_with_value(reward, scores, name, always=name == GOLD)
        if counts is not None:
            counts.update(scores.counts)
    return [
        {
            "decoding": decoding,
            "seed": rollout.seed,
            "sample": rollout.sample_index,
            "prompt_index": rollout.start_info.get("prompt_index"),
            "prompt_id": prompt_id_of(rollout),
            "return": rollout.env_return,
            "success": rollout.success,
            "cost": rollout.cost,
            "turns": rollout.num_turns,
            "invalid": rollout.invalid,
            "length_limited": rollout.num_length_limited,
            "tokens": rollout.num_sampled_tokens if tokens_known else None,
            "seconds": round(seconds_per_episode, 4),
            "components": {name: column[index] for name, column in columns.items()},
            "messages": rollout.conversation,
        }
        for index, rollout in enumerate(rollouts)
    ]


def prompt_id_of(rollout: Rollout) -> str | None:
    """Return the id of the start state, see `start_entry_id`; None if there is no fixed list.

    The id is computed from the prompt without few-shot examples, so examples do not change it.
    """
    info = rollout.start_info
    observation = {"role": "user", "content": info.get("observation", "")}
    return start_entry_id([*info.get("messages", ()), observation], info)


def random_and_optimal_return(env: gym.Env) -> tuple[float | None, float | None]:
    """Return the expected returns of the random and the optimal policy of an environment.

    A return is None if the environment does not define it.
    """
    values = []
    for name in ("random_value", "optimal_value"):
        try:
            values.append(float(getattr(env.unwrapped, name)()))
        except (NotImplementedError, AttributeError):
            values.append(None)
    return values[0], values[1]


def summarize_episodes(
    rows: Sequence[dict[str, Any]],
    *,
    name: str,
    env: str,
    random_return: float | None = None,
    optimal_return: float | None = None,
    turn_limit: int | None = None,
    outcomes: Mapping[str, tuple[float, float]] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the content of ``summary.json``: the mean of every metric with its 95% interval.

    The intervals are computed over independent units. Episodes with the same prompt, or the same
    seed, belong to one unit; see `independent_unit_of`. If a seed has several samples, pass@k of
    binary metrics is included. Rewards that could not score every episode are listed under
    ``unscored``.

    Args:
        rows: Episodes of one policy, as in ``episodes.jsonl``.
        name: Name of the policy.
        env: Id of the environment, or "prompts" for a prompt dataset.
        random_return: Expected return of the random policy, if known.
        optimal_return: Expected return of the optimal policy, if known.
        turn_limit: Maximum number of turns of an episode, if known.
        outcomes: Reward component -> its two possible scores, see `binary_outcomes_by_name`; if
            None, the components named after kinds that score 0 or 1 have these scores.
        counts: "NAME: reason" -> number of missing scores, truncated texts or failures.
    """
    counts = counts or {}
    rows = [{"env": env, **row} for row in rows]
    units = {row["seed"]: independent_unit_of(row) for row in rows}
    scored = _scores_by_metric_and_seed(rows)
    returns = ReferenceReturns.if_known(random_return, optimal_return)
    limits = MetricLimits(returns, turn_limit, outcomes)
    metrics = {
        key: _interval_over_units(key, seeds, units, limits) for key, seeds in scored.items()
    }
    if returns:
        metrics["normalized"] = returns.normalize_interval(metrics["return"])
    for key, column in pass_at_k_by_seed(scored).items():
        metrics[key] = _interval_over_units(key, {seed: [v] for seed, v in column.items()}, units)
    unscored = missing_scores_by_reward(rows, counts)
    return {
        "name": name,
        "env": env,
        "policy": name,
        "decoding": rows[0]["decoding"],
        "episodes": len(rows),
        "unit": unit_name([units[row["seed"]] for row in rows]),
        "units": len(set(units.values())),
        "random": random_return,
        "optimal": optimal_return,
        "turn_limit": turn_limit,
        "outcomes": None if outcomes is None else dict(outcomes),
        "metrics": {key: estimate.as_dict() for key, estimate in metrics.items()},
        "unscored": unscored,
        "counts": dict(counts),
        "notes": evaluation_caveats(rows, unscored, counts),
    }


def _scores_by_metric_and_seed(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[Hashable, list[float]]]:
    """Return metric -> seed -> the values of its episodes that are not missing."""
    scored: dict[str, dict[Hashable, list[float]]] = {}
    for row in rows:
        fields = {name: row[name] for name in _METRIC_FIELDS} | row["components"]
        for key, value in fields.items():
            if value is not None:
                scored.setdefault(key, {}).setdefault(row["seed"], []).append(float(value))
    return scored


def _interval_over_units(
    metric: str,
    values_by_seed: Mapping[Hashable, Sequence[float]],
    unit_by_seed: Mapping[Hashable, Hashable],
    limits: MetricLimits | None = None,
) -> Interval:
    """Return the mean of a metric with its interval over units.

    `values_by_seed` maps each seed to the metric's values, one for each sample. `unit_by_seed` maps
    each seed to its unit. `limits` are the known limits of the environment.
    """
    values = [value for samples in values_by_seed.values() for value in samples]
    labels = [unit_by_seed[seed] for seed, samples in values_by_seed.items() for _ in samples]
    return metric_interval(metric, values, labels, limits)


def is_complete_evaluation(folder: Path) -> bool:
    """Return whether a folder has all files of an evaluation."""
    return all((folder / name).is_file() for name in EVALUATION_FILES)


def write_evaluation(
    directory: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> Path:
    """Write episodes and summary to ``evaluation/<name>/`` in a run directory; return this folder.

    The folder is created atomically. A folder that lacks a file is replaced.

    Raises:
        UserError: The folder exists already and is complete, or it contains other files.
    """
    target = directory / "evaluation" / summary["name"]
    if target.exists() and (
        is_complete_evaluation(target) or {p.name for p in target.iterdir()} - EVALUATION_FILES
    ):
        raise UserError(
            f"{target} exists already, and an evaluation is never overwritten: choose another name "
            "or another run directory"
        )
    labels = {"env": summary["env"], "policy": summary["policy"]}
    with atomic_path(target) as partial:
        partial.mkdir()
        with (partial / "episodes.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json_line(labels | row) for row in rows)
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return target
