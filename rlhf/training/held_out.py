"""Evaluate the policy on held-out episodes during and after training, and write transcripts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.common.plugins import short_name
from rlhf.envs.items import SAME_SPLIT_WARNING, draws_only_items_of_split, has_separate_splits
from rlhf.evaluation.episodes import (
    evaluation_episode_seeds,
    is_complete_evaluation,
    play_model_episodes,
    random_and_optimal_return,
    summarize_episodes,
    write_evaluation,
)
from rlhf.reward_models.core import binary_outcomes_by_name
from rlhf.rollout.environments.calls import temporary_environment
from rlhf.rollout.items import summarize_item_overlap
from rlhf.runs.directory import Run
from rlhf.training.online_parts import OnlineTrainerParts
from rlhf.training.transcripts import transcript_row

log = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Number of held-out transcripts that are written before training, and again after it."""


def evaluate_held_out(
    trainer: OnlineTrainerParts,
    name: str,
    random_return: float | None = None,
    optimal_return: float | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the policy on held-out episodes, which are divided among the processes.

    Args:
        trainer: The trainer, with the policy and the configuration of the evaluation.
        name: Name of the policy in the summary.
        random_return: Mean return of a random policy, if it is known.
        optimal_return: Optimal mean return, if it is known.

    Returns:
        The content of ``summary.json`` without the entry ``items``, and the rows of
        ``episodes.jsonl``.
    """
    spec = trainer.config.evaluation
    counts: Counter[str] = Counter()
    with trainer.whole_weights():
        rows = trainer.world.map(
            evaluation_episode_seeds(spec.episodes),
            lambda starts: play_model_episodes(
                trainer.eval_collector,
                starts,
                decoding=spec.decoding,
                rewards=[] if trainer.rewards is None else [trainer.rewards],
                gold=trainer.monitor_rewards,
                counts=counts,
            ),
        )
    total = sum(trainer.world.gather(counts), Counter())
    env = short_name(trainer.config.env.id or "prompts")
    summary = summarize_episodes(
        rows,
        name=name,
        env=env,
        random_return=random_return,
        optimal_return=optimal_return,
        turn_limit=trainer.eval_collector.turn_limit,
        outcomes=binary_outcomes_by_name(trainer.all_rewards),
        counts=total,
    )
    return summary, rows


def write_final_evaluation(trainer: OnlineTrainerParts, run: Run) -> None:
    """Evaluate the trained policy on held-out episodes; write the summary and all episodes.

    If the run directory contains a complete evaluation of the policy, nothing is done.
    """
    if is_complete_evaluation(run.directory / "evaluation" / run.directory.name):
        return  # the run was interrupted after its final evaluation
    env = trainer.config.env
    low, high = None, None
    if env.id is not None:
        make_env = trainer.eval_collector.make_env
        with temporary_environment(make_env, timeout=env.timeout) as task:
            low, high = random_and_optimal_return(task)
    summary, rows = evaluate_held_out(trainer, run.directory.name, low, high)
    summary["items"] = _item_overlap(trainer, rows)
    for note in summary["notes"]:
        log.warning("evaluation: %s", note)
    if run.writes:
        write_evaluation(run.directory, rows, summary)


def _item_overlap(trainer: OnlineTrainerParts, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the overlap of held-out and training episodes; warn if there is an overlap."""
    env = trainer.config.env
    if env.id is None:
        separate, note = True, "A prompt; training does not use the prompts of the evaluation."
    else:
        make_env = trainer.eval_collector.make_env
        with temporary_environment(make_env, timeout=env.timeout) as task:
            note = str(getattr(task.unwrapped, "items", "unknown"))
        separate = all(
            draws_only_items_of_split(env.id, env.kwargs, split) for split in ("train", "test")
        )
        if not separate and has_separate_splits(env.id):
            note = SAME_SPLIT_WARNING.format(env.kwargs["split"])
    overlap = summarize_item_overlap(trainer.openings, rows, has_separate_items=separate, note=note)
    if overlap["seen_in_training"]:
        log.warning(
            "%d of the %d held-out episodes start with the same messages as training episodes. "
            "Items of the environment: %s",
            overlap["seen_in_training"],
            overlap["episodes"],
            note,
        )
    return overlap


def write_held_out_transcripts(trainer: OnlineTrainerParts, run: Run, *, split: str) -> None:
    """Play `NUM_SAMPLES` held-out episodes, and write their transcripts to ``samples.jsonl``.

    Args:
        trainer: The trainer with the current policy.
        run: The run directory.
        split: Value of ``split`` in the transcripts: "before" or "after" training.
    """
    collector = replace(trainer.step_collector, collector=trainer.eval_collector)
    seeds = evaluation_episode_seeds(NUM_SAMPLES)
    with trainer.whole_weights():
        rollouts = trainer.world.map(seeds, collector.collect_and_score)
    for rollout in rollouts:
        run.write_sample(transcript_row(rollout, trainer.progress.step, split))
