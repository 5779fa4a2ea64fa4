"""Sources of the rollouts of training steps: collect them when they are needed, or in advance."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlhf.algorithms.controllers import RunningRewardMoments
from rlhf.errors import UserError
from rlhf.models.policy_copy import PolicyCopy, Snapshot
from rlhf.rollout.sampling.base import Completion
from rlhf.rollout.sampling.recording import CollectionStopped, RecordedReply, RecordingEngine
from rlhf.runs.profiling import WAITING_FOR_ROLLOUTS, Stopwatch
from rlhf.training.collection import StartStateCounter, StepCollector, StepRollouts
from rlhf.training.rollouts.schedule import BatchAssignment, RolloutSchedule

STOP_TIMEOUT_SECONDS = 10.0
"""Time for which a run that ends waits for the environments of an unfinished batch."""


class RolloutSource(Protocol):
    """Interface of the sources of rollouts."""

    def collect(self, step: int) -> StepRollouts:
        """Return the rollouts of a training step, which starts with the current policy.

        Raises:
            EngineStopped: A server does not answer. The replies that it has sampled for the step
                are part of ``replies_of_untrained_steps``.
            UserError: An environment or a reward failed.
        """
        ...

    def engine_with_current_policy(self, version: int) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which the engine has the current policy and is not in use.

        Args:
            version: Version of the current policy.
        """
        ...

    def replies_of_untrained_steps(self) -> list[RecordedReply]:
        """Return the replies that were sampled for steps that are not trained yet."""
        ...

    def schedule_replay(self, replies: Iterable[RecordedReply]) -> None:
        """Use the unfinished replies of an interrupted run, before the first step."""
        ...

    def stop(self) -> bool:
        """Stop collecting, at the end of the run.

        Returns:
            Whether the environments are not in use any more, so that they can be closed.
        """
        ...


def _collect_with_completions(
    collector: StepCollector, engine: RecordingEngine, step: int, *, min_policy_version: int
) -> tuple[StepRollouts, list[Completion]]:
    """Collect the rollouts of a step; return them and the completions that they consist of."""
    engine.start_batch(step, min_policy_version=min_policy_version)
    rollouts = collector.collect(step)
    completions = engine.finish_batch()
    if discarded := engine.pop_unreplayed_reply_count():
        metrics = {**rollouts.metrics, "rollout/replies_discarded": float(discarded)}
        rollouts = replace(rollouts, metrics=metrics)
    return rollouts, completions


class SynchronousSource:
    """Collects the rollouts of a step when the step begins.

    Args:
        collector: Collects the rollouts.
        engine: Engine of the collector.
    """

    def __init__(self, collector: StepCollector, engine: RecordingEngine) -> None:
        self.collector, self.engine = collector, engine

    def collect(self, step: int) -> StepRollouts:
        """Collect the rollouts of a step with the current policy; see `RolloutSource`.

        After a UserError, the counter of start states and the moments have their earlier values.
        """
        counters = (self.collector.starts, self.collector.moments)
        before = [counter.state_dict() for counter in counters]
        try:
            self.engine.update_policy(step)
            return _collect_with_completions(
                self.collector, self.engine, step, min_policy_version=step
            )[0]
        except UserError:  # the resumed run plays the same episodes
            for counter, state in zip(counters, before, strict=True):
                counter.load_state_dict(state)
            raise

    @contextlib.contextmanager
    def engine_with_current_policy(self, version: int) -> Iterator[None]:
        """Load the current policy into the engine; see `RolloutSource`."""
        self.engine.update_policy(version)
        yield

    def replies_of_untrained_steps(self) -> list[RecordedReply]:
        """Return the replies of a step whose collection failed."""
        return self.engine.replies_of_unfinished_batch()

    def schedule_replay(self, replies: Iterable[RecordedReply]) -> None:
        """Use the unfinished replies of an interrupted run; see `RolloutSource`."""
        self.engine.schedule_replay(replies)

    def stop(self) -> bool:
        """Return True, because nothing is collected in advance."""
        return True


@dataclass(frozen=True)
class _CollectedBatch:
    """A collected batch that waits for its training step."""

    step: int
    rollouts: StepRollouts
    completions: list[Completion]
    counters: list[dict[str, Any]]
    """States of the counter of start states and of the moments of the scores after the batch."""


class BackgroundSource:
    """Collects rollouts in a thread while the policy is trained.

    `RolloutSchedule` defines which policy samples a batch. The thread starts at the first call of
    ``collect``.

    Args:
        collector: Collects the rollouts, with a stopwatch of its own. Only the thread uses it.
        engine: Engine of the collector, which samples from the model of ``policy``.
        policy: Copy of the policy.
        starts: Counter of the start states of the batches that were passed to the trainer.
        moments: Moments of the scores of the batches that were passed to the trainer.
        stopwatch: Measures the time for which the trainer waits.
    """

    def __init__(
        self,
        collector: StepCollector,
        engine: RecordingEngine,
        policy: PolicyCopy,
        *,
        starts: StartStateCounter,
        moments: RunningRewardMoments,
        stopwatch: Stopwatch,
    ) -> None:
        self.collector, self.engine, self.policy = collector, engine, policy
        self.max_staleness = collector.config.rollout.max_staleness
        self.counters, self.stopwatch = (starts, moments), stopwatch
        self._latest: Snapshot | None = None
        self._schedule: RolloutSchedule | None = None
        self._batches: deque[_CollectedBatch] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._changed = threading.Condition()
        """Guards the attributes above, and is notified of their changes."""

    def collect(self, step: int) -> StepRollouts:
        """Publish the current policy, and return the batch of the step; see `RolloutSource`.

        ``starts`` and ``moments`` are set to their states after this batch.
        """
        schedule = self._schedule or self._start(step)
        self._publish(step)
        with self._changed, self.stopwatch(WAITING_FOR_ROLLOUTS):
            self._changed.wait_for(lambda: self._batches or self._error)
            if not self._batches:
                assert self._error is not None
                raise self._error
            batch = self._batches.popleft()
            schedule.record_taken_batch()
        assert batch.step == step
        for counter, state in zip(self.counters, batch.counters, strict=True):
            counter.load_state_dict(state)
        return batch.rollouts

    @contextlib.contextmanager
    def engine_with_current_policy(self, version: int) -> Iterator[None]:
        """Load the current policy into the engine between two batches; see `RolloutSource`.

        After ``stop``, the engine is in use until the thread has ended.
        """
        with self._paused():
            if self._stopped and self._schedule is not None:
                self._thread.join()
            self.policy.load(self._publish(version))
            self.engine.update_policy(version)
            yield

    def replies_of_untrained_steps(self) -> list[RecordedReply]:
        """Return the replies of the waiting batches, and of a batch whose collection failed.

        The method waits until the current batch is complete, unless the source is stopped.
        """
        with self._paused():
            waiting = [
                RecordedReply.from_completion(completion, batch.step)
                for batch in self._batches
                for completion in batch.completions
            ]
            return waiting + self.engine.replies_of_unfinished_batch()

    def schedule_replay(self, replies: Iterable[RecordedReply]) -> None:
        """Use the unfinished replies of an interrupted run; see `RolloutSource`."""
        self.engine.schedule_replay(replies)

    def stop(self) -> bool:
        """End the thread; see `RolloutSource`. The current batch is not completed.

        If the call of an environment does not return within `STOP_TIMEOUT_SECONDS`, the thread
        continues, and the environments cannot be closed. They then end with the process.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.engine.stop_at_next_poll()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_SECONDS)
        return not self._thread.is_alive()

    def _start(self, step: int) -> RolloutSchedule:
        """Start the thread, whose first batch is for a training step.

        The collector's counters are set to the states of ``starts`` and ``moments``.
        """
        own = (self.collector.starts, self.collector.moments)
        for counter, passed in zip(own, self.counters, strict=True):
            counter.load_state_dict(passed.state_dict())
        num_steps = self.collector.config.num_steps
        self._schedule = RolloutSchedule(
            next_step=step, num_steps=num_steps, max_staleness=self.max_staleness
        )
        self._thread.start()
        return self._schedule

    def _publish(self, version: int) -> Snapshot:
        """Use the current weights of the policy for the next batches; return them."""
        if self._latest is None or self._latest.version != version:
            self._latest = self.policy.snapshot(version)
        with self._changed:
            if self._schedule is not None and self._schedule.latest is not self._latest:
                self._schedule.use_policy_for_next_batches(self._latest)
                self._changed.notify_all()
        return self._latest

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Return a context manager in which no batch is collected.

        It first waits until the current batch is complete, a collection fails or the source is
        stopped.
        """
        schedule = self._schedule
        if schedule is None:
            yield
            return
        with self._changed:
            schedule.paused = True
            self._changed.wait_for(
                lambda: schedule.assignment is None or self._error or self._stopped
            )
        try:
            yield
        finally:
            with self._changed:
                schedule.resume()
                self._changed.notify_all()

    def _run(self) -> None:
        """Collect batches until the source is stopped or a collection fails.

        The error of a failed collection is stored, and ``collect`` raises it.
        """
        try:
            while (assignment := self._next_assignment()) is not None:
                batch = self._collect_batch(assignment)
                with self._changed:
                    self._batches.append(batch)
                    assert self._schedule is not None
                    self._schedule.record_complete_batch()
                    self._changed.notify_all()
        except CollectionStopped:
            pass
        except BaseException as error:  # raised again in the thread of the trainer
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_assignment(self) -> BatchAssignment | None:
        """Wait for the next batch to collect; return None if the source is stopped."""
        schedule = self._schedule
        assert schedule is not None
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or schedule.assignment)
            return None if self._stopped else schedule.assignment

    def _collect_batch(self, assignment: BatchAssignment) -> _CollectedBatch:
        """Load the assigned policy into the engine, and collect the batch in this thread."""
        collector, step = self.collector, assignment.step
        self.policy.load(assignment.policy)
        self.engine.update_policy(assignment.policy.version)
        rollouts, completions = _collect_with_completions(
            collector, self.engine, step, min_policy_version=step - self.max_staleness
        )
        seconds = collector.stopwatch.pop_time_metrics()
        metrics = dict(rollouts.metrics)
        for name, value in seconds.items():  # the trainer does not wait for all of this time
            metrics[name.replace("time/", "time/background_")] = value
        counters = [collector.starts.state_dict(), collector.moments.state_dict()]
        return _CollectedBatch(step, replace(rollouts, metrics=metrics), completions, counters)
