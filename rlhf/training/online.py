"""Online training: collect rollouts, score them, estimate advantages, update the policy."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.algorithms.advantages import informative_groups
from rlhf.algorithms.controllers import RewardMoments
from rlhf.config.online import OnlineConfig
from rlhf.envs.items import is_separable
from rlhf.errors import UserError
from rlhf.evaluation.episodes import (
    bounds,
    evaluation_starts,
    play_model,
    summarize,
    write_evaluation,
)
from rlhf.models.loading import load_model
from rlhf.models.policy import Policy, Reference
from rlhf.models.rewards import load_rewards
from rlhf.models.trainable import warn_of_dropout
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector, EpisodeSeed
from rlhf.rollout.items import Openings, describe_items
from rlhf.runs.directory import Run
from rlhf.runs.profiling import Stopwatch
from rlhf.runs.progress import online_slots
from rlhf.training.batch import make_training_batch
from rlhf.training.checkpoint import Stateful
from rlhf.training.loop import fit
from rlhf.training.online_setup import (
    EpisodeCounter,
    check_config,
    make_controller,
    make_multiplier,
    refuse_idle_rollout_keys,
    split_prompts,
)
from rlhf.training.optimize import update_policy
from rlhf.training.optimizers import OptimizerSettings, make_optimizer, make_scheduler
from rlhf.training.scoring import refuse_unscored, score_rollouts, shaped_rewards
from rlhf.training.throughput import Throughput
from rlhf.training.token_table import token_table
from rlhf.training.trainer import Trainer

log = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""Rounds in which DAPO samples groups until a batch is full of informative ones. After the last
round it trains on those that it has, or skips the update if it has none."""

NUM_SAMPLES = 16
"""Transcripts of held-out episodes that are written before and after training."""


def train_online(name: str, config: OnlineConfig, run: Run) -> Path:
    """Train with an online algorithm, from the start or from the last checkpoint.

    Args:
        name: Name of the algorithm.
        config: Configuration of the run.
        run: The run directory.

    Returns:
        The folder of the trained policy.

    Raises:
        UserError: A setting is invalid, a reward or an environment fails, or training diverges.
    """
    trainer = OnlineTrainer(name, config)
    try:
        return fit(trainer, run)
    finally:
        trainer.close()


class OnlineTrainer(Trainer):
    """Trains a policy on its own rollouts.

    Args:
        name: Name of the algorithm.
        config: Configuration of the run.

    Raises:
        UserError: A setting is invalid or has no effect; the message names its key.
    """

    learning_rate_key = "optimizer.learning_rate"

    def __init__(self, name: str, config: OnlineConfig) -> None:
        self.algorithm = check_config(name, config)
        self.rewards = load_rewards(config.rewards) if config.rewards else None
        self.monitor_rewards = load_rewards(config.gold) if config.gold else None
        prompts, eval_prompts = split_prompts(config)
        model, tokenizer = load_model(config.model, seed=config.seed)
        warn_of_dropout(name, config.model)
        critic = config.critic if self.algorithm.critic else "none"
        self.policy = Policy(model, tokenizer, critic=critic)
        optimizer, scheduler = self._make_optimizer(config)
        self.stopwatch = Stopwatch()

        def collector(prompts: Sequence[Any], split: str) -> Collector:
            parts = (model, tokenizer, config.env, config.rollout)
            return Collector.open(*parts, prompts=prompts, watch=self.stopwatch, split=split)

        self.collector = collector(prompts, "train")
        refuse_idle_rollout_keys(config, self.collector)
        log.info(self.collector.chat_format.describe())
        self.reference = Reference(self.policy) if self.algorithm.reference else None
        self.eval_collector = collector(eval_prompts, "test")
        super().__init__(
            config,
            self.policy,
            optimizer,
            scheduler,
            num_steps=config.num_steps,
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        self.kl = make_controller(config.kl, self.algorithm.settings.kl_coef)
        self.multiplier = make_multiplier(self.algorithm)
        self.moments = RewardMoments()
        self.starts = EpisodeCounter()
        self.openings = Openings()
        self.throughput = Throughput(self.policy) if config.profile else None

    def _make_optimizer(self, config: OnlineConfig) -> tuple[Any, Any]:
        """Return the optimizer of the policy and its learning rate schedule."""
        spec, settings = config.optimizer, self.algorithm.settings
        optimizer_settings = OptimizerSettings(
            learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, eps=spec.eps
        )
        optimizer = make_optimizer(spec.name, self.policy.parameters(), optimizer_settings)
        updates = config.num_steps * settings.num_epochs * settings.num_minibatches
        scheduler = make_scheduler(
            spec.schedule,
            optimizer,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=updates,
        )
        return optimizer, scheduler

    @property
    def all_rewards(self) -> list[Any]:
        """The rewards that are trained on, and those that are only monitored."""
        return [r for r in (self.rewards, self.monitor_rewards) if r is not None]

    @property
    def done(self) -> bool:
        """Whether no step is left to take, or the KL budget is spent."""
        return self.kl.stop or super().done

    def state(self) -> dict[str, Stateful]:
        """Return the objects whose state a checkpoint keeps."""
        stateful: dict[str, Stateful] = {
            **super().state(),
            "kl": self.kl,
            "moments": self.moments,
            "starts": self.starts,
            "openings": self.openings,
        }
        if self.multiplier:
            stateful["multiplier"] = self.multiplier
        return stateful

    def prepare(self, run: Run) -> None:
        """Choose the metrics that are displayed."""
        self.slots = online_slots(run.config)

    def start(self, run: Run) -> None:
        """Write transcripts of held-out episodes of the initial policy."""
        _write_samples(self, run, split="before")

    def step(self, step: int, run: Run) -> dict[str, float]:
        """Collect rollouts, update the policy on them, and return the step's metrics."""
        self.stopwatch.take()  # drops the seconds of an evaluation
        self.collector.engine.update_policy(step)
        gathered = gather(self)
        rollouts = gathered.rollouts
        self.openings.note(rollout.conversation for rollout in rollouts)
        if gathered.skip:
            return _skipped(self, run, step, gathered)
        batch, batch_metrics = make_training_batch(self, rollouts, gathered.rewards)
        with self.stopwatch("update"):
            update_metrics = update_policy(self, batch, step=step)
        returns = gathered.returns
        metrics = {**rollout_metrics(rollouts, returns), **gathered.metrics, **batch_metrics}
        if "kl_coef" in self.algorithm.effective:
            metrics["kl/coef"] = self.kl.coef
        metrics["train/learning_rate"] = self.scheduler.get_last_lr()[0]
        _update_controllers(self, metrics, rollouts)
        for row, rollout in enumerate(rollouts[: self.config.samples_per_step]):
            tokens = token_table(batch, row, self.policy.tokenizer)
            sample = sample_row(rollout, step + 1, "train", return_trained=returns[row])
            run.sample(sample | {"tokens": tokens})
        seconds = self.stopwatch.take()
        metrics = {**metrics, **update_metrics, **seconds}
        if self.throughput:
            epochs = self.algorithm.settings.num_epochs
            self.throughput.add(batch, seconds=seconds["time/update"], epochs=epochs)
            metrics |= self.throughput.pop()
            sampled = int(batch.action_mask.sum())
            metrics["profile/tokens_per_second"] = sampled / sum(seconds.values())
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Return means over held-out episodes."""
        summary, _ = evaluate_held_out(self, "eval")
        return {f"eval/{name}": value["mean"] for name, value in summary["metrics"].items()}

    def evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate when ``step`` steps are done."""
        every = self.config.evaluation.every
        return every > 0 and step % every == 0

    def save_due(self, step: int) -> bool:
        """Return whether to write a checkpoint when ``step`` steps are done."""
        return step % self.config.save_every == 0 or step == self.num_steps

    def finish(self, run: Run) -> None:
        """Write transcripts of the trained policy and evaluate it on held-out episodes."""
        _write_samples(self, run, split="after")
        _final_evaluation(self, run)

    def save(self, directory: Path) -> None:
        """Write the trained policy."""
        self.policy.save(directory)

    def close(self) -> None:
        """Close every environment."""
        self.collector.close()
        self.eval_collector.close()


@dataclass(frozen=True)
class Gathered:
    """The rollouts of a step."""

    rollouts: list[Rollout]
    rewards: list[list[float]]
    """Training rewards of the tokens of each rollout, after scaling and penalties."""
    skip: bool = False
    """Whether the update is skipped, because all scores of every sampled group are equal."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def returns(self) -> list[float]:
        """The return that each rollout is trained on; nan if it could not be scored."""
        return [sum(rewards) for rewards in self.rewards]


def gather(trainer: OnlineTrainer) -> Gathered:
    """Collect the rollouts of a step; with dynamic sampling, replace uninformative groups.

    As in DAPO (Yu et al. 2025, section 3.2), a group is informative if its scores differ before
    penalties and scaling. A length penalty alone does not make a group informative.

    Raises:
        UserError: Every episode failed, or too many could not be scored.
    """
    settings, config = trainer.algorithm.settings, trainer.config
    wanted = config.episodes_per_step // settings.group_size
    sampled: list[Rollout] = []
    rewards: list[list[float]] = []
    kept: list[int] = []
    groups = rounds = sampled_groups = 0
    while groups < wanted and rounds < MAX_ROUNDS:
        starts = trainer.starts.take(config.seed, wanted - groups, settings.group_size)
        fresh = trainer.world.map(
            starts, lambda shard: collect_and_score(trainer, shard, trainer.collector)
        )
        rounds, sampled_groups = rounds + 1, sampled_groups + wanted - groups
        first, sampled = len(sampled), sampled + fresh
        if fresh:
            refuse_unscored(sampled, limit=config.shaping.max_unscored)
            scores = torch.tensor([rollout.score for rollout in fresh], dtype=torch.float64)
            trainer.moments.update(scores)
            rewards += shaped_rewards(fresh, trainer.algorithm, config, trainer.moments)
        if not settings.dynamic_sampling:
            break
        informative = [first + index for index in _informative(fresh)]
        kept += informative
        groups += len({sampled[index].group_index for index in informative})
    if not sampled:
        raise UserError("every environment failed, so there are no rollouts to train on")
    if not settings.dynamic_sampling:
        return Gathered(sampled, rewards)
    dropped = float(sampled_groups - groups)
    metrics = {"rollout/rounds": float(rounds), "rollout/groups_dropped": dropped}
    indices = kept or range(len(sampled))
    return Gathered(
        [sampled[index] for index in indices],
        [rewards[index] for index in indices],
        skip=not kept,
        metrics=metrics,
    )


def _informative(rollouts: Sequence[Rollout]) -> list[int]:
    """Return the indices of the rollouts of groups whose scores differ."""
    if not rollouts:
        return []
    groups = torch.tensor([rollout.group_index for rollout in rollouts])
    scores = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
    return informative_groups(scores, groups).nonzero()[:, 0].tolist()


def _skipped(trainer: OnlineTrainer, run: Run, step: int, gathered: Gathered) -> dict[str, float]:
    """Log a step without an update; return its metrics."""
    log.warning(
        "step %d: all %d groups of %d rounds have equal scores, so nothing is learned from them; "
        "easier or harder tasks, or a larger algorithm.group_size, give groups that differ",
        step + 1,
        gathered.metrics["rollout/groups_dropped"],
        gathered.metrics["rollout/rounds"],
    )
    returns = gathered.returns
    for row, rollout in enumerate(gathered.rollouts[: trainer.config.samples_per_step]):
        run.sample(sample_row(rollout, step + 1, "train", return_trained=returns[row]))
    return {
        **rollout_metrics(gathered.rollouts, returns),
        **gathered.metrics,
        "train/skipped": 1.0,
        "train/updates": 0.0,
        "train/learning_rate": trainer.scheduler.get_last_lr()[0],
        **trainer.stopwatch.take(),
    }


def collect_and_score(
    trainer: OnlineTrainer, starts: Sequence[EpisodeSeed], collector: Collector
) -> list[Rollout]:
    """Collect episodes and score them with all rewards, those that are only monitored too."""
    rollouts = collector.collect(starts, allow_none=True)
    if not rollouts:
        return []  # other processes may have some; `gather` checks all of them together
    with trainer.stopwatch("rewards"):
        score_rollouts(
            rollouts,
            rewards=trainer.rewards,
            gold=trainer.monitor_rewards,
            env_weight=trainer.config.env.reward,
        )
    return rollouts


def rollout_metrics(rollouts: Sequence[Rollout], returns: Sequence[float]) -> dict[str, float]:
    """Return means over the rollouts of a batch, without components that no rollout has.

    Args:
        rollouts: The rollouts of a step.
        returns: The return that each rollout is trained on; nan if it could not be scored.
    """
    metrics = {
        "reward/mean": _mean(returns),
        "reward/unscored": float(np.mean([math.isnan(value) for value in returns])),
        "rollout/tokens": _mean([r.num_actions for r in rollouts]),
        "rollout/turns": _mean([r.num_turns for r in rollouts]),
        "rollout/invalid": _mean([r.invalid for r in rollouts]),
        "rollout/length_limited": _mean([r.num_length_limited for r in rollouts]),
        "rollout/missing_eos": _mean([not r.stopped for r in rollouts]),
        "rollout/truncated": _mean([r.truncated for r in rollouts]),
        "rollout/evasion_gain": _evasion_gain(rollouts, returns),
        "rollout/cost": _mean([r.cost for r in rollouts]),
    }
    reasons = Counter(reason_key(r.unscored) for r in rollouts if r.unscored)
    metrics |= {key: count / len(rollouts) for key, count in reasons.items()}
    for name in rollouts[0].components:
        metrics[f"reward/{name}"] = _mean([r.components[name] for r in rollouts])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def reason_key(reason: str) -> str:
    """Return the metric key ``rewards/unscored/NAME/REASON``, without details of one text."""
    name, _, detail = reason.partition(": ")
    summary = detail.partition(": ")[0].partition(" (")[0].lower()
    summary = re.sub(r"[^a-z]+", "_", summary).strip("_")
    return f"rewards/unscored/{name}/{summary or 'no_score'}"


def _evasion_gain(rollouts: Sequence[Rollout], returns: Sequence[float]) -> float:
    """Return the mean return of truncated or invalid rollouts, minus that of the others."""
    by_evasion: dict[bool, list[float]] = {True: [], False: []}
    for rollout, value in zip(rollouts, returns, strict=True):
        by_evasion[rollout.truncated or rollout.invalid > 0].append(value)
    return _mean(by_evasion[True]) - _mean(by_evasion[False])


def sample_row(
    rollout: Rollout, step: int, split: str, *, return_trained: float | None = None
) -> dict[str, Any]:
    """Return a transcript as a line of ``samples.jsonl``.

    ``return_env`` is the return of the environment. ``score`` is the weighted sum of all rewards
    that are trained on. ``return_trained`` is the return of a training episode after scaling and
    penalties. A value is None if the episode could not be scored.
    """
    row = {
        "step": step,
        "split": split,
        "seed": rollout.seed,
        "messages": rollout.conversation,
        "return_env": rollout.env_return,
        "score": _finite(rollout.score),
    }
    if return_trained is not None:
        row["return_trained"] = _finite(return_trained)
    row["rewards"] = rollout.components
    return row | ({"unscored": rollout.unscored} if rollout.unscored else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are neither None nor nan; nan without any."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _update_controllers(
    trainer: OnlineTrainer, metrics: dict[str, float], rollouts: Sequence[Rollout]
) -> None:
    """Update the KL controller and the Lagrange multiplier with the metrics of a step."""
    if "policy/kl" in metrics:
        trainer.kl.update(metrics["policy/kl"], len(rollouts))
    if trainer.multiplier:
        metrics["cost/multiplier"] = trainer.multiplier.value
        trainer.multiplier.update(metrics["rollout/cost"])


def evaluate_held_out(
    trainer: OnlineTrainer, name: str, low: float | None = None, high: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Collect held-out episodes on all processes; return their summary and rows.

    Args:
        trainer: The trainer with its policy.
        name: Name of the evaluation.
        low: Mean return of a random policy, if it is known.
        high: Optimal mean return, if it is known.
    """
    spec = trainer.config.evaluation
    counts: Counter[str] = Counter()
    rows = trainer.world.map(
        evaluation_starts(spec.episodes),
        lambda starts: play_model(
            trainer.eval_collector,
            starts,
            decoding=spec.decoding,
            rewards=trainer.all_rewards,
            counts=counts,
        ),
    )
    total = sum(trainer.world.gather(counts), Counter())
    env = trainer.config.env.id or "prompts"
    return summarize(rows, name=name, env=env, random=low, optimal=high, counts=total), rows


def _final_evaluation(trainer: OnlineTrainer, run: Run) -> None:
    """Evaluate the trained policy on held-out episodes and write all of them."""
    if (run.directory / "evaluation" / run.directory.name).exists():
        return  # written by a run that was interrupted after its evaluation
    env = trainer.config.env
    low, high = (None, None) if env.id is None else bounds(trainer.eval_collector.make_env)
    summary, rows = evaluate_held_out(trainer, run.directory.name, low, high)
    summary["items"] = _items(trainer, rows)
    for note in summary["notes"]:
        log.warning("evaluation: %s", note)
    if run.writes:
        write_evaluation(run.directory, rows, summary)


def _items(trainer: OnlineTrainer, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe what held-out episodes share with training, and warn if they share anything."""
    env = trainer.config.env
    if env.id is None:
        separate, note = True, "A prompt; prompts of evaluation are not in training."
    else:
        task: Any = trainer.eval_collector.make_env().unwrapped
        separate, note = is_separable(env.id), str(getattr(task, "items", "unknown"))
    overlap = describe_items(trainer.openings, rows, separate=separate, note=note)
    if overlap["seen_in_training"]:
        log.warning(
            "%d of the %d held-out episodes open like episodes of training. Their items: %s",
            overlap["seen_in_training"],
            overlap["episodes"],
            note,
        )
    return overlap


def _write_samples(trainer: OnlineTrainer, run: Run, *, split: str) -> None:
    """Write transcripts of held-out episodes to ``samples.jsonl``."""
    rollouts = trainer.world.map(
        evaluation_starts(NUM_SAMPLES),
        lambda starts: collect_and_score(trainer, starts, trainer.eval_collector),
    )
    for rollout in rollouts:
        run.sample(sample_row(rollout, trainer.progress.step, split))
