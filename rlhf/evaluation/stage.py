"""`rlhf evaluate`: policies on episodes and text, rewards on pairs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import reward_models
from rlhf.data.load import load
from rlhf.evaluation.config import EvaluateConfig, PolicySpec
from rlhf.evaluation.evaluate import (
    bounds,
    evaluation_starts,
    play_model,
    play_reference,
    summarise,
    write_evaluation,
)
from rlhf.evaluation.pairs import write_pairs_evaluation
from rlhf.evaluation.statistics import Estimate, stretched_interval
from rlhf.evaluation.text import completion_losses, text_metrics
from rlhf.launch import release_memory
from rlhf.models.heads import Policy
from rlhf.models.loading import load_model
from rlhf.rollout.collect import Collector, make_env_factory
from rlhf.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What every policy is measured on, loaded once."""

    config: EvaluateConfig
    prompts: list[Any]
    text: list[Any]
    rewards: list[Any]


def run_evaluation(verb: str, config: EvaluateConfig, run: Run) -> Path:
    """Measure everything that the configuration names; returns the run directory."""
    task = load_task(config)
    for spec in config.policies:
        if (run.directory / "evaluation" / spec.name).exists():
            continue  # measured before an interruption
        log.info("evaluating %s", spec.name)
        _evaluate_policy(spec, task, run)
        release_memory()
    if config.pairs:
        _evaluate_pairs(config, run, task.rewards[0])
    return run.directory


def load_task(config: EvaluateConfig) -> Task:
    """Prompts, text and rewards of a configuration."""
    prompts: list[Any] = []
    if config.env and config.env.prompts:
        loaded = load(config.env.prompts, "prompt", seed=config.seed)
        log.info("prompts: %s", loaded.summary())
        prompts = [row["prompt"] for row in loaded.rows]
    text = load(config.text, "sft", seed=config.seed).rows if config.text else []
    rewards = [reward_models.build(config.rewards)] if config.rewards else []
    return Task(config, prompts, text, rewards)


def _evaluate_policy(spec: PolicySpec, task: Task, run: Run) -> None:
    config = task.config
    policy = Policy(*load_model(spec.model, seed=config.seed)) if spec.model else None
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"name": spec.name, "env": "text", "policy": spec.name, "metrics": {}}
    if config.env:
        rows = _play(spec, policy, task)
        make_env = make_env_factory(config.env, task.prompts)
        low, high = bounds(make_env) if config.env.id else (None, None)
        name = config.env.id or "prompts"
        summary = summarise(rows, name=spec.name, env=name, random=low, optimal=high)
    if task.text and policy is not None:
        losses, counts = completion_losses(policy, task.text, max_length=config.max_length)
        summary["metrics"] |= text_summary(losses, counts, seed=config.seed)
        summary["text"] = {"losses": losses, "tokens": counts}
    write_evaluation(run.directory, rows, summary)


def _play(spec: PolicySpec, policy: Policy | None, task: Task) -> list[dict[str, Any]]:
    """Episodes of a model, or of the environment's own random or expert policy."""
    config = task.config
    assert config.env is not None
    if policy is None:
        make_env = make_env_factory(config.env, task.prompts)
        return play_reference(
            spec.name,
            make_env,
            episodes=config.episodes,
            rewards=task.rewards,
            first=config.first_episode,
        )
    collector = Collector.open(
        policy.model, policy.tokenizer, config.env, config.rollout, prompts=task.prompts
    )
    try:
        return play_model(
            policy.model,
            collector,
            evaluation_starts(config.episodes, first=config.first_episode),
            decoding=config.decoding,
            rewards=task.rewards,
        )
    finally:
        collector.close()


def text_summary(losses: list[float], counts: list[int], *, seed: int) -> dict[str, Any]:
    """Loss per completion token with an interval over examples, and its perplexity."""
    pairs = [pair for pair in zip(losses, counts, strict=True) if pair[1]]
    table = np.array(pairs, dtype=float)
    rng = np.random.default_rng(seed)
    resampled = table[rng.integers(len(table), size=(2000, len(table)))].sum(1)
    replicates = resampled[:, 0] / resampled[:, 1]
    metrics = text_metrics(losses, counts)
    loss = stretched_interval(metrics["loss"], replicates, len(table), len(table) - 1, 0.95)
    low, high = math.exp(loss.low), math.exp(loss.high)
    perplexity = Estimate(math.exp(loss.value), low, high, loss.n)
    return {"text_loss": loss.as_dict(), "text_perplexity": perplexity.as_dict()}


def _evaluate_pairs(config: EvaluateConfig, run: Run, reward: Any) -> None:
    """Accuracy of the rewards on pairs, beside the trivial baselines."""
    pairs = load(config.pairs, "preference", seed=config.seed).rows
    train = config.pairs_train
    write_pairs_evaluation(
        reward,
        pairs,
        run.directory,
        name="pairs",
        train_rows=load(train, "preference", seed=config.seed).rows if train else (),
        seed=config.seed,
    )
