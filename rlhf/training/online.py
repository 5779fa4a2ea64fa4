"""Trainer of the online algorithms, which collects rollouts and updates the policy on them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import get_scheduler

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.controllers import RunningRewardMoments
from rlhf.algorithms.metrics import add_metrics_of_part
from rlhf.common.files import read_jsonl, write_jsonl
from rlhf.common.score_names import SCORE
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.models.loading import load_model
from rlhf.models.policy import Policy, ReferencePolicy
from rlhf.models.policy_copy import PolicyCopy
from rlhf.models.rewards import check_component_names, load_rewards
from rlhf.models.sharding.loading import load_model_to_shard
from rlhf.models.trainable import warn_of_ignored_dropout
from rlhf.rollout.collector import Collector, open_local_engine
from rlhf.rollout.items import SeenOpenings
from rlhf.rollout.sampling.recording import RecordedReply, RecordingEngine
from rlhf.rollout.unused_keys import unused_rollout_key_message
from rlhf.runs.directory import Run
from rlhf.runs.metric_log import gold_metric_keys
from rlhf.runs.profiling import Stopwatch
from rlhf.runs.progress import online_displayed_metrics
from rlhf.training.batch import make_training_batch
from rlhf.training.collection import StartStateCounter, StepCollector
from rlhf.training.distributed import lost_process_as_user_error, prepare_for_sharding
from rlhf.training.held_out import (
    evaluate_held_out,
    write_final_evaluation,
    write_held_out_transcripts,
)
from rlhf.training.loop import fit
from rlhf.training.numeric_checks import (
    check_batch_is_finite,
    check_rewards,
    check_scores_and_rewards_are_finite,
)
from rlhf.training.online_parts import OnlineTrainerParts
from rlhf.training.online_setup import (
    check_online_config,
    load_split_prompts,
    make_kl_controller,
    make_lagrange_multiplier,
    open_external_engine,
)
from rlhf.training.optimize import compute_checked_gradients, update_policy
from rlhf.training.optimizers import OptimizerSettings, make_optimizer
from rlhf.training.rollouts.metrics import rollout_metrics, staleness_metrics
from rlhf.training.rollouts.source import BackgroundSource, RolloutSource, SynchronousSource
from rlhf.training.throughput import Throughput
from rlhf.training.trainer import Stateful
from rlhf.training.transcripts import token_table, transcript_row

log = logging.getLogger(__name__)

REPLIES_FILE = "replies.jsonl"
"""File of a checkpoint with replies that were not trained on yet."""


@lost_process_as_user_error()
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


def load_policy_and_reference(
    config: OnlineConfig, algorithm: Algorithm
) -> tuple[Policy, ReferencePolicy | None]:
    """Load the policy of a run, and its reference, or None if the algorithm needs no reference.

    Raises:
        UserError: The model cannot be loaded or trained.
    """
    sharded = prepare_for_sharding(config)
    load = load_model_to_shard if sharded else load_model
    model, tokenizer = load(config.model, seed=config.seed)
    warn_of_ignored_dropout(algorithm.name, config.model)
    policy = Policy(model, tokenizer, critic=config.critic if algorithm.needs_critic else "none")
    if config.activation_checkpointing:
        policy.checkpoint_activations()
    reference = ReferencePolicy(policy) if algorithm.needs_reference else None
    if sharded:
        policy.shard()
        if reference is not None:
            reference.shard()
    return policy, reference


class OnlineTrainer(OnlineTrainerParts):
    """Trains a policy on its own rollouts.

    Args:
        name: Name of the algorithm.
        config: Configuration of the run.

    Raises:
        UserError: A setting is invalid or has no effect, or a model, a reward, the prompts, the
            environment or the engine cannot be used.
    """

    learning_rate_key = "optimizer.learning_rate"

    def __init__(self, name: str, config: OnlineConfig) -> None:
        self.algorithm = check_online_config(name, config)
        self.rewards = load_rewards(config.rewards) if config.rewards else None
        self.monitor_rewards = load_rewards(config.gold) if config.gold else None
        has_env = config.env.id is not None
        check_component_names(self.rewards, self.monitor_rewards, has_env=has_env, trains=True)
        self.data_counts: dict[str, Any] = {}
        prompts, eval_prompts = load_split_prompts(config, counts=self.data_counts)
        self.policy, self.reference = load_policy_and_reference(config, self.algorithm)
        optimizer, scheduler = self._make_optimizer_and_scheduler(config)
        self.stopwatch = Stopwatch()
        self._open_collectors(config, prompts, eval_prompts)
        super().__init__(
            config,
            self.policy,
            optimizer,
            scheduler,
            num_steps=config.num_steps,
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        self.kl = make_kl_controller(config.kl, self.algorithm.settings.kl_coef)
        self.multiplier = make_lagrange_multiplier(self.algorithm)
        self.moments = RunningRewardMoments()
        self.starts = StartStateCounter()
        self.step_collector = StepCollector(
            config,
            self.algorithm,
            self.collector,
            rewards=self.rewards,
            monitor_rewards=self.monitor_rewards,
            world=self.world,
            starts=self.starts,
            moments=self.moments,
        )
        self.rollout_source = self._make_rollout_source()
        self.openings = SeenOpenings()
        self.throughput = None
        if config.profile:
            self.throughput = Throughput(self.policy, processes=self.world.size)
        self.keep_best = config.keep_best

    def _make_optimizer_and_scheduler(self, config: OnlineConfig) -> tuple[Any, Any]:
        """Return the optimizer of the policy and its learning rate schedule."""
        spec, settings = config.optimizer, self.algorithm.settings
        optimizer_settings = OptimizerSettings(
            learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, eps=spec.eps
        )
        optimizer = make_optimizer(
            spec.name,
            self.policy.parameters(),
            optimizer_settings,
            sharded=config.sharding != "none",
        )
        updates = config.num_steps * settings.num_epochs * settings.num_minibatches
        # Transformers' schedule "constant" ignores warm-up steps.
        name = "constant_with_warmup" if spec.schedule == "constant" else spec.schedule
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=updates,
        )
        return optimizer, scheduler

    def _open_collectors(
        self, config: OnlineConfig, prompts: Sequence[Any], eval_prompts: Sequence[Any]
    ) -> None:
        """Set the engines and the collectors of training episodes and of held-out episodes.

        The thread of a `BackgroundSource` has its own stopwatch, and its own tokenizer, because a
        fast tokenizer cannot be called by two threads at once.

        Raises:
            UserError: An environment or the engine cannot be used, or a key has no effect.
        """
        model, tokenizer, watch = self.policy.model, self.policy.tokenizer, self.stopwatch
        self.policy_copy = PolicyCopy(model) if config.rollout.max_staleness else None
        sampled, own_tokenizer, own_watch = model, tokenizer, watch
        if self.policy_copy is not None:
            sampled = self.policy_copy.model
            own_tokenizer, own_watch = copy.deepcopy(tokenizer), Stopwatch()
        self.external_engine = open_external_engine(config, sampled)
        with self.policy.whole_weights():  # the sampler is compared with the model
            self.engine = RecordingEngine(
                self.external_engine or open_local_engine(sampled, config.rollout)
            )
            self.collector = Collector.open(
                sampled,
                own_tokenizer,
                config.env,
                config.rollout,
                prompts=prompts,
                watch=own_watch,
                split="train",
                engine=self.engine,
            )
        if message := unused_rollout_key_message(self.collector):
            raise UserError(message)
        log.info(self.collector.chat_format.describe())
        self.max_episode_tokens = self.collector.max_sampled_tokens_per_episode()
        self.eval_collector = Collector.open(
            model,
            tokenizer,
            config.env,
            config.rollout,
            prompts=eval_prompts,
            watch=watch,
            split="test",
            engine=self.external_engine,
        )

    def _make_rollout_source(self) -> RolloutSource:
        """Return a `BackgroundSource` if ``max_staleness`` > 0, otherwise a `SynchronousSource`."""
        if self.policy_copy is None:
            return SynchronousSource(self.step_collector, self.engine)
        own = replace(
            self.step_collector, starts=StartStateCounter(), moments=RunningRewardMoments()
        )
        return BackgroundSource(
            own,
            self.engine,
            self.policy_copy,
            starts=self.starts,
            moments=self.moments,
            stopwatch=self.stopwatch,
        )

    @property
    def done(self) -> bool:
        """Whether all steps are done, a callback ended training, or the KL exceeded the budget."""
        return self.kl.stop or super().done

    def stateful_objects(self) -> dict[str, Stateful]:
        stateful: dict[str, Stateful] = {
            **super().stateful_objects(),
            "kl": self.kl,
            "moments": self.moments,
            "starts": self.starts,
            "openings": self.openings,
        }
        if self.multiplier:
            stateful["multiplier"] = self.multiplier
        return stateful

    def prepare_before_resuming(self, run: Run) -> None:
        """Select the metrics that the progress display shows, and record the numbers of prompts."""
        if self.data_counts:
            run.write_data_counts(self.data_counts)
        self.displayed_metrics = online_displayed_metrics(run.config)

    def evaluate_initial_model(self, run: Run) -> None:
        """Write transcripts of held-out episodes of the initial policy."""
        with self.rollout_source.engine_with_current_policy(self.progress.step):
            write_held_out_transcripts(self, run, split="before")

    def step(self, step: int, run: Run) -> dict[str, float]:
        """Collect rollouts, update the policy on them, and return the metrics of the step."""
        self.stopwatch.pop_time_metrics()  # discard the time of an evaluation
        self.state_is_complete = True
        with self.whole_weights():
            collected = self.rollout_source.collect(step)
        self.state_is_complete = False
        rollouts, returns = collected.rollouts, collected.returns
        check_rewards(rollouts, collected.rewards)
        self.openings.add(rollouts)
        metrics = {**rollout_metrics(rollouts, returns), **collected.metrics}
        if limit := self.config.rollout.max_staleness:
            metrics |= staleness_metrics(rollouts, version=step, limit=limit)
        batch, update_metrics = None, {"train/skipped": 1.0, "train/updates": 0.0}
        if not collected.skip:
            batch, batch_metrics = make_training_batch(self, rollouts, collected.rewards)
            with self.stopwatch("update"):
                update_metrics = update_policy(self, batch, step=step)
            metrics |= batch_metrics
            if "kl_coef" in self.algorithm.settings_with_effect:
                metrics["kl/coef"] = self.kl.coef
            if "policy/kl" in metrics:
                self.kl.update(metrics["policy/kl"], len(rollouts))
            if self.multiplier:
                metrics["cost/multiplier"] = self.multiplier.value
                self.multiplier.update(metrics["rollout/cost"])
        metrics["train/learning_rate"] = self.scheduler.get_last_lr()[0]
        loss = f"metrics of the loss {self.algorithm.loss}"
        metrics = add_metrics_of_part(metrics, update_metrics, what=loss)
        if self.external_engine is not None:
            engine = f"metrics of rollout.engine.kind {self.config.rollout.engine.kind}"
            metrics = add_metrics_of_part(metrics, self.external_engine.metrics(), what=engine)
        for row, rollout in enumerate(rollouts[: self.config.samples_per_step]):
            sample = transcript_row(rollout, step + 1, "train", return_trained=returns[row])
            if batch is not None:
                sample["tokens"] = token_table(batch, row, self.policy.tokenizer)
            run.write_sample(sample)
        seconds = self.stopwatch.pop_time_metrics()
        metrics |= seconds
        if self.throughput and batch is not None:
            epochs = self.algorithm.settings.num_epochs
            self.throughput.add(batch, seconds=seconds["time/update"], epochs=epochs)
            metrics |= self.throughput.pop_metrics()
            sampled = int(batch.action_mask.sum())
            metrics["profile/tokens_per_second"] = sampled / sum(seconds.values())
        return metrics

    def repeat_checks_of_halted_update(self, evidence: Mapping[str, Any]) -> None:
        if "scores" in evidence:
            check_scores_and_rewards_are_finite(evidence["scores"], evidence["rewards"], evidence)
            return
        device = self.policy.device
        batch = TrainingBatch(**{k: value.to(device) for k, value in evidence["batch"].items()})
        check_batch_is_finite(batch, kl_coef=evidence.get("kl_coef", self.kl.coef))
        if "rows" in evidence:
            flags = {name: evidence[name] for name in ("critic_only", "first")}
            compute_checked_gradients(self, batch, evidence["rows"], **flags)
            self.clip_gradients()

    def evaluate(self) -> dict[str, float]:
        """Return the mean metrics over held-out episodes, with keys ``eval/...``."""
        with self.rollout_source.engine_with_current_policy(self.progress.step):
            summary, _ = evaluate_held_out(self, "eval")
        return {f"eval/{name}": value["mean"] for name, value in summary["metrics"].items()}

    def model_selection_loss(self, metrics: Mapping[str, float]) -> float:
        """Return the negated score of an evaluation; infinity if no episode has a score.

        The score is the gold score of `gold_metric_keys`, or else the training reward.
        """
        config = self.config
        keys = gold_metric_keys({"gold": config.gold, "env": {"prompts": config.env.prompts}})
        keys = [key for key in keys if key.startswith("eval/")]
        if (reward := self.rewards) is not None:
            # The value of a reward that is not a composition is the component with its name.
            keys.append(f"eval/{reward.name if reward.leaves() == (reward,) else SCORE}")
        return -next((metrics[key] for key in keys if key in metrics), -math.inf)

    def is_evaluation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and step % every == 0

    def is_checkpoint_due(self, step: int) -> bool:
        return step % self.config.save_every == 0 or step == self.num_steps

    def evaluate_final_model(self, run: Run) -> None:
        """Write transcripts of the trained policy and evaluate it on held-out episodes."""
        self.rollout_source.stop()
        with self.rollout_source.engine_with_current_policy(self.progress.step):
            write_held_out_transcripts(self, run, split="after")
            write_final_evaluation(self, run)

    @property
    def schedule_depends_on_steps(self) -> bool:
        """Whether the schedule decreases to 0 at the last step."""
        return self.config.optimizer.schedule != "constant"

    def override_loaded_settings(self) -> None:
        super().override_loaded_settings()
        coef = self.algorithm.settings.kl_coef
        self.kl.use_settings_of(make_kl_controller(self.config.kl, coef))

    def save(self, directory: Path) -> None:
        self.policy.save(directory)

    def save_unfinished_work(self, checkpoint: Path) -> None:
        """Write the replies that were sampled for later steps, if there are any.

        If training is done, the rollout source is stopped first.
        """
        if self.done:  # the last batch is not needed, and one of its environments may hang
            self.rollout_source.stop()
        replies = self.rollout_source.replies_of_untrained_steps()
        if replies:
            write_jsonl(checkpoint / REPLIES_FILE, (reply.to_row() for reply in replies))

    def load_unfinished_work(self, checkpoint: Path) -> None:
        """Load the replies that were sampled for later steps, and schedule their replay."""
        if (checkpoint / REPLIES_FILE).exists():
            rows = read_jsonl(checkpoint / REPLIES_FILE)
            self.rollout_source.schedule_replay(RecordedReply.from_row(row) for row in rows)

    def close(self) -> None:
        """Stop collecting, and close the environments and the connections of the engine.

        The training environments stay open if one of them is still in a call.
        """
        if self.rollout_source.stop():
            self.collector.close()
        self.eval_collector.close()
        if self.external_engine is not None:
            self.external_engine.close()
