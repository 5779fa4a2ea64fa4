"""The loop that every online algorithm shares: collect, score, assign credit, learn."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.algorithms.advantages import informative_groups
from rlhf.algorithms.batch import TrainingBatch
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
from rlhf.models.adapters import share_base
from rlhf.models.flops import update_flops
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector, EpisodeSeed
from rlhf.rollout.items import describe_items
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopRequest
from rlhf.runs.profiling import usage
from rlhf.runs.progress import Reporter, online_slots
from rlhf.training.batch import make_training_batch
from rlhf.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rlhf.training.optimize import update_policy
from rlhf.training.scoring import refuse_unscored, score_rollouts, shape_scores
from rlhf.training.session import Session, open_session
from rlhf.training.token_table import token_table

log = logging.getLogger(__name__)

# DAPO keeps sampling until a batch is full of informative groups; after so many rounds it trains on
# the fewer that it has, or skips the update if it has none.
MAX_ROUNDS = 4
SAMPLES_KEPT = 16


def train_online(name: str, config: OnlineConfig, run: Run) -> Path:
    """Run an online algorithm from start, or from its last checkpoint, to its end.

    Args:
        name: of a row of the algorithm table.
        config: of the run.
        run: its directory.

    Returns:
        The folder of the trained policy.

    Raises:
        UserError: a setting cannot be meant, a reward or environment fails, training diverges.
    """
    session = open_session(name, config)
    try:
        step = _resume(session, run)
        if step == 0:
            _keep_samples(session, run, step=0, split="before")
        with (
            StopRequest() as stop,
            Reporter(
                run.directory.name, config.num_steps, start=step, slots=online_slots(run.config)
            ) as bar,
        ):
            watch = TrainingMonitor(run.directory, run.config)
            while step < config.num_steps and not session.kl.stop:
                metrics = train_step(session, run, step)
                step += 1
                metrics |= _evaluate_if_due(session, step)
                due = step % config.save_every == 0 or step == config.num_steps
                if due:
                    metrics["train/moved"] = session.movement.share()
                run.log(step, metrics)
                bar.show(step, metrics, watch.update(step, metrics))
                if due or stop.asked:
                    _save(session, run, step)
                stop.check(run.directory)
        _keep_samples(session, run, step=step, split="after")
        _final_evaluation(session, run)
        if run.writes:
            share_base(run.directory / "checkpoints", run.final)
            session.policy.save(run.final)
    finally:
        session.close()
    return run.final


def train_step(session: Session, run: Run, step: int) -> dict[str, float]:
    """One batch of rollouts and what is learned from it; returns the step's metrics."""
    watch = session.watch
    watch.take()  # an evaluation's
    session.collector.engine.update_policy(step)
    gathered = gather(session)
    rollouts = gathered.rollouts
    session.openings.note(rollout.conversation for rollout in rollouts)
    if gathered.skip:
        return _skipped(session, run, step, gathered)
    batch, batch_metrics = make_training_batch(session, rollouts)
    with watch("update"):
        update_metrics = update_policy(session, batch, step=step)
    metrics = {**rollout_metrics(rollouts), **gathered.metrics, **batch_metrics}
    if "kl_coef" in session.algorithm.effective:
        metrics["kl/coef"] = session.kl.coef
    metrics["train/learning_rate"] = session.scheduler.get_last_lr()[0]
    _control(session, metrics, rollouts)
    _check_finite(update_metrics, step)
    for row, rollout in enumerate(rollouts[: session.config.samples_per_step]):
        tokens = token_table(batch, row, session.policy.tokenizer)
        run.sample(sample_row(rollout, step + 1, "train") | {"tokens": tokens})
    seconds = watch.take()
    return {**metrics, **update_metrics, **seconds, **profile(session, batch, seconds)}


def profile(
    session: Session, batch: TrainingBatch, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Throughput of a step, with `profile: true`."""
    if session.peak_flops is None:
        return {}
    settings = session.algorithm.settings
    real, sampled = int(batch.attention_mask.sum()), int(batch.action_mask.sum())
    computed = session.policy.computed_tokens(batch.tokens, batch.attention_mask)
    flops = update_flops(session.policy.model, tokens=computed, learned=sampled)
    rate = settings.num_epochs * flops / seconds["time/update"]
    return {
        "profile/tokens_per_second": sampled / sum(seconds.values()),
        **usage(real=real, computed=computed, flops=rate, peak_flops=session.peak_flops),
    }


@dataclass(frozen=True)
class Gathered:
    """The episodes of a step."""

    rollouts: list[Rollout]
    skip: bool = False
    """Whether none of them tells anything: all groups that were sampled are uniform."""
    metrics: dict[str, float] = field(default_factory=dict)


def gather(session: Session) -> Gathered:
    """Rollouts with final rewards; uninformative groups are replaced where the row says so.

    As in DAPO (Yu et al. 2025, 3.2) a group is informative if its scores differ before penalties
    and scaling: a penalty of length alone makes no group worth learning from.

    Raises:
        UserError: every episode failed, or too many could not be scored.
    """
    settings, config = session.algorithm.settings, session.config
    wanted = config.episodes_per_step // settings.group_size
    kept: list[Rollout] = []
    sampled: list[Rollout] = []
    groups = rounds = taken = 0
    while groups < wanted and rounds < MAX_ROUNDS:
        starts = session.starts.take(config.seed, wanted - groups, settings.group_size)
        fresh = session.world.map(starts, lambda part: play(session, part, session.collector))
        rounds, taken = rounds + 1, taken + wanted - groups
        raw = [rollout.score for rollout in fresh]
        sampled = sampled + fresh
        if fresh:
            refuse_unscored(sampled, limit=config.shaping.max_unscored)
            shape_scores(fresh, session.algorithm, config, session.moments)
        if not settings.dynamic_sampling:
            break
        useful = _informative(fresh, raw)
        kept += useful
        groups += len({rollout.group for rollout in useful})
    if not sampled:
        raise UserError("every environment failed, so there is nothing to learn from")
    if not settings.dynamic_sampling:
        return Gathered(sampled)
    told = {"rollout/rounds": float(rounds), "rollout/groups_dropped": float(taken - groups)}
    return Gathered(kept or sampled, skip=not kept, metrics=told)


def _informative(rollouts: Sequence[Rollout], scores: Sequence[float]) -> list[Rollout]:
    """Episodes of the groups in which scores differ."""
    if not rollouts:
        return []
    groups = torch.tensor([rollout.group for rollout in rollouts])
    useful = informative_groups(torch.tensor(scores, dtype=torch.float64), groups)
    return [r for r, keep in zip(rollouts, useful.tolist(), strict=True) if keep]


def _skipped(session: Session, run: Run, step: int, gathered: Gathered) -> dict[str, float]:
    """Metrics of a step without an update."""
    log.warning(
        "step %d: all %d groups of %d rounds have equal scores, so nothing is learned from them; "
        "easier or harder tasks, or a larger algorithm.group_size, give groups that differ",
        step + 1,
        gathered.metrics["rollout/groups_dropped"],
        gathered.metrics["rollout/rounds"],
    )
    for rollout in gathered.rollouts[: session.config.samples_per_step]:
        run.sample(sample_row(rollout, step + 1, "train"))
    return {
        **rollout_metrics(gathered.rollouts),
        **gathered.metrics,
        "train/skipped": 1.0,
        "train/updates": 0.0,
        "train/learning_rate": session.scheduler.get_last_lr()[0],
        **session.watch.take(),
    }


def play(session: Session, starts: Sequence[EpisodeSeed], collector: Collector) -> list[Rollout]:
    """Episodes with the scores of all rewards, trained and measured."""
    rollouts = collector.collect(starts, allow_none=True)
    if not rollouts:
        return []  # of this process's share; who gathers them sees whether there are any
    with session.watch("rewards"):
        score_rollouts(
            rollouts,
            rewards=session.rewards,
            gold=session.gold,
            env_weight=session.config.env.reward,
        )
    return rollouts


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the episodes of a batch; components that no episode has are left out."""
    metrics = {
        "reward/mean": _mean([r.score for r in rollouts]),
        "reward/unscored": float(np.mean([math.isnan(r.score) for r in rollouts])),
        "rollout/tokens": _mean([r.num_actions for r in rollouts]),
        "rollout/turns": _mean([r.num_turns for r in rollouts]),
        "rollout/invalid": _mean([r.invalid for r in rollouts]),
        "rollout/length_limited": _mean([r.cut for r in rollouts]),
        "rollout/missing_eos": _mean([not r.finished for r in rollouts]),
        "rollout/truncated": _mean([r.truncated for r in rollouts]),
        "rollout/evasion_gain": _evasion_gain(rollouts),
        "rollout/cost": _mean([r.cost for r in rollouts]),
    }
    reasons = Counter(reason_key(r.unscored) for r in rollouts if r.unscored)
    metrics |= {key: count / len(rollouts) for key, count in reasons.items()}
    for name in rollouts[0].components:
        metrics[f"reward/{name}"] = _mean([r.components[name] for r in rollouts])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def reason_key(reason: str) -> str:
    """The metric of a reason: ``rewards/unscored/NAME/REASON``, without what differs by text."""
    name, _, what = reason.partition(": ")
    what = re.sub(r"[^a-z]+", "_", what.partition(": ")[0].partition(" (")[0].lower()).strip("_")
    return f"rewards/unscored/{name}/{what or 'no_score'}"


def _evasion_gain(rollouts: Sequence[Rollout]) -> float:
    """Mean score of episodes with an invalid reply or cut by a limit, less that of the others."""
    parts: tuple[list[float], list[float]] = ([], [])
    for rollout in rollouts:
        parts[rollout.truncated or rollout.invalid > 0].append(rollout.score)
    return _mean(parts[True]) - _mean(parts[False])


def sample_row(rollout: Rollout, step: int, split: str) -> dict[str, Any]:
    """A transcript as a line of ``samples.jsonl``.

    ``return_env`` is the environment's own return, ``score`` the weighted sum of all rewards that
    are trained on; ``return_trained`` is what a training episode earned once scores were scaled and
    penalties taken off. None stands for what could not be scored.
    """
    row = {
        "step": step,
        "split": split,
        "seed": rollout.seed,
        "messages": rollout.conversation,
        "return_env": rollout.components.get("env"),
        "score": _finite(rollout.unshaped_score),
    }
    if split == "train":
        row["return_trained"] = _finite(rollout.score)
    row["rewards"] = rollout.components
    return row | ({"unscored": rollout.unscored} if rollout.unscored else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float:
    """Mean of what is there; nan when nothing is."""
    there = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(there)) if there else math.nan


def _control(session: Session, metrics: dict[str, float], rollouts: Sequence[Rollout]) -> None:
    """Let the KL controller and the multiplier see the step."""
    if "policy/kl" in metrics:
        session.kl.update(metrics["policy/kl"], len(rollouts))
    if session.multiplier:
        metrics["cost/multiplier"] = session.multiplier.value
        session.multiplier.update(metrics["rollout/cost"])


def _check_finite(metrics: dict[str, float], step: int) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"training diverged in step {step + 1}: {', '.join(bad)} is not finite; lower "
            "optimizer.learning_rate and continue from the last checkpoint with --resume"
        )


def _resume(session: Session, run: Run) -> int:
    """Restore the last checkpoint if the run asks for it; returns the finished steps."""
    found = latest_checkpoint(run.directory / "checkpoints")
    if not session.config.resume or found is None:
        run.rewind(-1)
        return 0
    step = load_checkpoint(
        found,
        model=session.policy,
        optimizer=session.optimizer,
        scheduler=session.scheduler,
        stateful=session.stateful(),
    )
    run.rewind(step)
    return step


def _save(session: Session, run: Run, step: int) -> None:
    if not run.writes:
        return
    save_checkpoint(
        run.directory / "checkpoints",
        step=step,
        model=session.policy,
        optimizer=session.optimizer,
        scheduler=session.scheduler,
        stateful=session.stateful(),
    )


def _measured(session: Session) -> list[Any]:
    return [reward for reward in (session.rewards, session.gold) if reward is not None]


def _evaluate_if_due(session: Session, step: int) -> dict[str, float]:
    """Means over held-out episodes, every ``evaluation.every`` steps."""
    spec = session.config.evaluation
    if not spec.every or step % spec.every:
        return {}
    summary, _ = _held_out(session, "eval")
    return {f"eval/{name}": value["mean"] for name, value in summary["metrics"].items()}


def _held_out(
    session: Session, name: str, low: float | None = None, high: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and rows of held-out episodes; the processes share the playing."""
    spec = session.config.evaluation
    counts: Counter[str] = Counter()
    rows = session.world.map(
        evaluation_starts(spec.episodes),
        lambda starts: play_model(
            session.held_out,
            starts,
            decoding=spec.decoding,
            rewards=_measured(session),
            counts=counts,
        ),
    )
    total = sum(session.world.gather(counts), Counter())
    env = session.config.env.id or "prompts"
    return summarize(rows, name=name, env=env, random=low, optimal=high, counts=total), rows


def _final_evaluation(session: Session, run: Run) -> None:
    """Held-out episodes of the trained policy, each written down."""
    if (run.directory / "evaluation" / run.directory.name).exists():
        return  # by a run that was cut after it
    env = session.config.env
    low, high = (None, None) if env.id is None else bounds(session.held_out.make_env)
    summary, rows = _held_out(session, run.directory.name, low, high)
    summary["items"] = _items(session, rows)
    for note in summary["notes"]:
        log.warning("evaluation: %s", note)
    if run.writes:
        write_evaluation(run.directory, rows, summary)


def _items(session: Session, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the held-out episodes share with training; a line says so where it is anything."""
    env = session.config.env
    if env.id is None:
        separate, note = True, "A prompt; prompts of evaluation are not in training."
    else:
        task: Any = session.held_out.make_env().unwrapped
        separate, note = is_separable(env.id), str(getattr(task, "items", "unknown"))
    found = describe_items(session.openings, rows, separate=separate, note=note)
    if found["seen_in_training"]:
        log.warning(
            "%d of the %d held-out episodes open like episodes of training. Their items: %s",
            found["seen_in_training"],
            found["episodes"],
            note,
        )
    return found


def _keep_samples(session: Session, run: Run, *, step: int, split: str) -> None:
    """Transcripts of held-out episodes, before and after training."""
    starts = evaluation_starts(SAMPLES_KEPT)
    rollouts = session.world.map(starts, lambda part: play(session, part, session.held_out))
    for rollout in rollouts:
        run.sample(sample_row(rollout, step, split))
