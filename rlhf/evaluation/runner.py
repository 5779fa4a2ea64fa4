"""`rlhf evaluate`: evaluate policies on episodes, text, labels and tasks, and rewards on pairs."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.common.imports import import_object
from rlhf.common.plugins import short_name
from rlhf.config.evaluate import PAIRS_FOLDER, EvaluateConfig, PolicySpec
from rlhf.data.conversation import insert_after_system, without_system
from rlhf.data.load import load_and_log
from rlhf.envs.items import SAME_SPLIT_WARNING, draws_only_items_of_split, has_separate_splits
from rlhf.errors import UserError
from rlhf.evaluation.classes import classification_report
from rlhf.evaluation.episodes import (
    evaluation_episode_seeds,
    is_complete_evaluation,
    play_model_episodes,
    play_reference_episodes,
    random_and_optimal_return,
    scored_episode_rows,
    summarize_episodes,
    write_evaluation,
)
from rlhf.evaluation.harness import evaluate_on_tasks, require_harness
from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.evaluation.text import CompletionLosses, completion_losses
from rlhf.evaluation.text_policies import TextEpisodePlayer, TextPolicy, make_text_policy
from rlhf.models.loading import find_model_folder, load_model
from rlhf.models.policy import Policy
from rlhf.models.rewards import check_component_names, load_rewards
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.core import binary_outcomes_by_name
from rlhf.rollout.collector import Collector
from rlhf.rollout.environments.calls import (
    EnvironmentCaller,
    make_env_factory,
    temporary_environment,
    turn_limit,
)
from rlhf.rollout.episode import EpisodeSeed
from rlhf.runs.directory import Run
from rlhf.runs.launch import collect_garbage_and_trim_heap
from rlhf.stats import Interval, ratio_interval
from rlhf.stats.units import distinct_clusters_and_index

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationInputs:
    """Data and rewards that are loaded once and used for the evaluation of every policy."""

    config: EvaluateConfig
    prompts: list[Any]
    """Conversations to reply to; empty if there is no prompt dataset."""
    text: list[Any]
    """Canonical SFT rows on which the loss is computed."""
    classes: list[Any]
    """Canonical classification rows."""
    rewards: list[Any]
    """The sum of all configured rewards as one element, or an empty list."""


def run_evaluation(command: str, config: EvaluateConfig, run: Run) -> Path:
    """Evaluate the policies that have no complete evaluation, and the rewards on the pairs.

    The result is the run directory.
    """
    for spec in config.policies:  # Wrong paths are errors before the first evaluation.
        if spec.path:
            import_object(spec.path, what=f"policies: {spec.name}: path")
        if spec.model:
            find_model_folder(spec.model)
    data = load_evaluation_data(config)
    for spec in config.policies:
        if is_complete_evaluation(run.directory / "evaluation" / spec.name):
            continue  # The evaluation was finished before an interruption.
        log.info("evaluating %s", spec.name)
        _evaluate_policy(spec, data, run)
        collect_garbage_and_trim_heap()
    if config.pairs:
        _evaluate_pairs(config, run, data.rewards[0])
    return run.directory


def load_evaluation_data(config: EvaluateConfig) -> EvaluationInputs:
    """Load the prompts, texts, labeled texts and rewards of a configuration.

    Raises:
        UserError: Data or rewards cannot be loaded, or tasks are configured and the extra is not
            installed.
    """
    if config.tasks:
        require_harness()
    sets = config.env.prompts if config.env else []
    prompts = [
        prompt_with_tools(row)
        for row in load_and_log(sets, "prompt", data_name="prompts", seed=config.seed)
    ]
    text = load_and_log(config.text, "sft", data_name="text", seed=config.seed)
    labeled_sets = config.classes.data if config.classes else []
    labeled = load_and_log(labeled_sets, "classification", data_name="classes", seed=config.seed)
    rewards = [load_rewards(config.rewards)] if config.rewards else []
    if config.env and rewards:
        check_component_names(rewards[0], has_env=config.env.id is not None)
    return EvaluationInputs(config, prompts, text, labeled, rewards)


def _evaluate_policy(spec: PolicySpec, data: EvaluationInputs, run: Run) -> None:
    """Evaluate one policy on all data and write its folder of `evaluation/`."""
    config = data.config
    policy = Policy(*load_model(spec.model, seed=config.seed)) if spec.model else None
    examples = few_shot_messages(spec, config.seed)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    summary: dict[str, Any] = {"name": spec.name, "env": "text", "policy": spec.name, "metrics": {}}
    if config.env:
        rows = _play_episodes(spec, policy, data, examples, counts)
        make_env = make_env_factory(config.env, data.prompts, split="test")
        with temporary_environment(make_env, timeout=config.env.timeout) as env:
            limit, items = turn_limit(env), str(getattr(env.unwrapped, "items", "unknown"))
            low, high = random_and_optimal_return(env) if config.env.id else (None, None)
        summary = summarize_episodes(
            rows,
            name=spec.name,
            env=short_name(config.env.id or "prompts"),
            random_return=low,
            optimal_return=high,
            turn_limit=limit,
            outcomes=binary_outcomes_by_name(data.rewards),
            counts=counts,
        )
        if config.env.id:
            note = items
            separate = draws_only_items_of_split(config.env.id, config.env.kwargs, "test")
            if not separate and has_separate_splits(config.env.id):
                note = SAME_SPLIT_WARNING.format(config.env.kwargs["split"])
            summary["items"] = {"separate": separate, "note": note}
    if policy is not None:
        _add_metrics_without_episodes(policy, data, summary, examples)
    if fixed := [key for key in ("path", "api") if getattr(spec, key) is not None]:
        summary["fixed_policy"] = fixed[0]
    for note in summary.get("notes", ()):
        log.warning("%s: %s", spec.name, note)
    write_evaluation(run.directory, rows, summary)


def few_shot_messages(spec: PolicySpec, seed: int) -> list[dict[str, str]]:
    """Return the messages of a policy's few-shot examples, without system messages.

    Raises:
        UserError: The examples are plain text, or cannot be loaded.
    """
    rows = load_and_log(spec.examples, "sft", data_name="examples", seed=seed)
    if any("text" in row for row in rows):
        raise UserError("examples: expected rows with prompt and completion, got plain text")
    return [m for row in rows for m in without_system([*row["prompt"], *row["completion"]])]


def _add_metrics_without_episodes(
    policy: Policy,
    data: EvaluationInputs,
    summary: dict[str, Any],
    examples: Sequence[dict[str, str]],
) -> None:
    """Add the metrics that need no episodes to `summary`, in place.

    They are the loss on text, and the metrics on labeled texts and standard tasks.
    """
    config = data.config
    if data.text:
        text = [
            {**row, "prompt": insert_after_system(row["prompt"], examples)}
            if "prompt" in row
            else row
            for row in data.text
        ]
        losses = completion_losses(policy, text, max_length=config.max_length)
        summary["metrics"] |= text_loss_metrics(losses, [_example_key(row) for row in text])
        if losses.truncated:
            note = f"text: {losses.truncated} of {len(text)} examples were truncated to max_length "
            note += f"= {config.max_length} tokens"
            if losses.emptied:
                note += f", and {losses.emptied} of these have no completion token left"
            summary["notes"] = [*summary.get("notes", ()), note]
        summary["text"] = {"losses": losses.nats, "tokens": losses.tokens, "bytes": losses.bytes}
    if config.classes:
        report = classification_report(
            policy,
            data.classes,
            config.classes,
            examples=examples,
            max_length=config.max_length,
        )
        summary["metrics"] |= {f"class_{name}": v for name, v in report["metrics"].items()}
        summary["classes"] = report
    if config.tasks:
        summary["metrics"] |= evaluate_on_tasks(policy, config.tasks, seed=config.seed)


def _play_episodes(
    spec: PolicySpec,
    policy: Policy | None,
    data: EvaluationInputs,
    examples: Sequence[dict[str, str]],
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """Play the episodes of a policy; return the rows of `episodes.jsonl`.

    `policy` is None if the policy is not a local model. `examples` are few-shot messages. The
    numbers of missing scores, truncated texts and environment failures are added to `counts`.
    """
    config = data.config
    assert config.env is not None
    starts = evaluation_episode_seeds(
        config.episodes, first=config.first_episode, samples=config.samples
    )
    text_policy = make_text_policy(spec, config.rollout, config.decoding)
    if text_policy is not None:
        return _play_text_episodes(text_policy, data, starts, examples, counts)
    if policy is None:
        make_env = make_env_factory(config.env, data.prompts, split="test")
        return play_reference_episodes(
            spec.name,
            make_env,
            starts,
            rewards=data.rewards,
            spec=config.rollout,
            counts=counts,
            calls=EnvironmentCaller.from_spec(config.env),
        )
    collector = Collector.open(
        policy.model,
        policy.tokenizer,
        config.env,
        config.rollout,
        prompts=data.prompts,
        examples=examples,
        split="test",
    )
    try:
        return play_model_episodes(
            collector, starts, decoding=config.decoding, rewards=data.rewards, counts=counts
        )
    finally:
        collector.close()


def _play_text_episodes(
    policy: TextPolicy,
    data: EvaluationInputs,
    starts: Sequence[EpisodeSeed],
    examples: Sequence[dict[str, str]],
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """Play the episodes of a function or of a model on a server; see `_play_episodes`."""
    config = data.config
    assert config.env is not None
    calls = EnvironmentCaller.from_spec(config.env)
    make_env = make_env_factory(config.env, data.prompts, split="test")
    player = TextEpisodePlayer(policy, make_env, config.rollout, examples=examples, calls=calls)
    began = time.monotonic()
    rollouts = player.play(starts)
    counts.update(calls.failures)
    return scored_episode_rows(
        rollouts,
        data.rewards,
        decoding=config.decoding,
        seconds_per_episode=(time.monotonic() - began) / len(rollouts),
        counts=counts,
        tokens_known=player.tokens_known,
    )


def text_loss_metrics(
    losses: CompletionLosses, units: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Return the loss per token, the perplexity and the bits per byte, with intervals.

    The independent units of the intervals are the different examples. Examples without completion
    tokens are omitted. Bits per byte can be compared between models with different tokenizers, but
    losses per token cannot.

    Args:
        losses: Losses of the examples.
        units: Independent unit of each example; copies of an example have the same unit. By
            default, each example is a unit.

    Returns:
        ``text_loss`` (nats per token), ``text_perplexity`` and ``text_bits_per_byte``, each as a
        result of `Interval.as_dict`. ``text_bits_per_byte`` is omitted if a completion has no
        bytes.

    Raises:
        UserError: No example has a completion token.
    """
    if not any(losses.tokens):
        raise UserError(
            f"text: none of the {len(losses.tokens)} examples has a completion token within "
            "max_length: increase max_length, use shorter prompts, or correct the rows that the "
            "log reports as left out"
        )
    columns = np.array([losses.nats, losses.tokens, losses.bytes], dtype=float)
    has_tokens = columns[1] > 0
    _, index = distinct_clusters_and_index(
        list(range(columns.shape[1])) if units is None else units
    )
    _, index = distinct_clusters_and_index(np.array(index)[has_tokens].tolist())
    nats, tokens, size = (np.bincount(index, weights=row[has_tokens]) for row in columns)
    loss = _with_low_at_least_zero(ratio_interval(nats, tokens))
    with np.errstate(over="ignore"):
        value, low, high = np.exp([loss.value, loss.low, loss.high]).tolist()
    perplexity = replace(loss, value=value, low=low, high=high)
    metrics = {"text_loss": loss, "text_perplexity": perplexity}
    if (size > 0).all():
        metrics["text_bits_per_byte"] = _with_low_at_least_zero(
            ratio_interval(nats / math.log(2), size)
        )
    return {name: estimate.as_dict() for name, estimate in metrics.items()}


def _example_key(row: Mapping[str, Any]) -> str:
    """Return a key of an example that is equal for copies of the example."""
    content = {key: row[key] for key in ("prompt", "completion", "text", "tools") if key in row}
    return json.dumps(content, sort_keys=True, default=repr)


def _with_low_at_least_zero(estimate: Interval) -> Interval:
    """Return the interval with a lower end of at least 0, because a loss is not negative."""
    return replace(estimate, low=max(0.0, estimate.low)) if estimate.known else estimate


def _evaluate_pairs(config: EvaluateConfig, run: Run, reward: Any) -> None:
    """Write the report on preference pairs for the sum of the rewards and for simple baselines."""
    pairs = load_and_log(
        config.pairs, "preference", data_name="pairs", seed=config.seed, with_answer_and_tests=True
    )
    train = load_and_log(
        config.pairs_train, "preference", data_name="pairs_train", seed=config.seed
    )
    write_pair_evaluation(
        reward,
        pairs,
        run.directory,
        name=PAIRS_FOLDER,
        train_rows=train,
        stress_size=100,
        seed=config.seed,
    )
