"""Decide when a batch of rollouts is collected in the background, and with which policy."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.models.policy_copy import Snapshot


@dataclass(frozen=True)
class BatchAssignment:
    """One batch to collect."""

    step: int
    """Index of the training step that trains on the batch."""
    policy: Snapshot
    """The policy that samples the batch."""


class RolloutSchedule:
    """Assigns batches of rollouts to the latest policy, within a limit on their staleness.

    Batches are collected one after another and trained on in the same order, one per step. The
    batch of step n is collected as soon as n minus the version of the latest policy is at most
    ``max_staleness``, so its staleness in training is never larger than this limit. At most
    ``max_staleness`` complete batches wait while another one is trained on.

    The policy of a batch is decided when the previous batch is complete or when a policy is
    published. With ``max_staleness`` 1, the batch of step n > 0 therefore always has policy n - 1:
    if it is decided when the previous batch is complete, the trainer waits for that batch and has
    published no later policy. With a larger limit, the policy depends on the time of collection.

    The methods are called by two threads; the caller holds a lock.

    Args:
        next_step: Index of the training step that the first batch is for.
        num_steps: Number of training steps. No batch is collected for later steps.
        max_staleness: Maximum number of updates between the policy that sampled a batch and the
            policy that trains on it.
    """

    def __init__(self, *, next_step: int, num_steps: int, max_staleness: int) -> None:
        self.next_step, self.num_steps, self.max_staleness = next_step, num_steps, max_staleness
        self.waiting = 0
        """Number of complete batches that were not taken yet."""
        self.assignment: BatchAssignment | None = None
        """The batch that is being collected, or is to be collected now."""
        self.latest: Snapshot | None = None
        self.paused = False

    def use_policy_for_next_batches(self, policy: Snapshot) -> None:
        """Use a policy for the next batches."""
        self.latest = policy
        self._assign_next_batch()

    def record_complete_batch(self) -> None:
        """Record that the assigned batch is complete."""
        self.assignment = None
        self.waiting += 1
        self._assign_next_batch()

    def record_taken_batch(self) -> None:
        """Record that the trainer takes the oldest complete batch."""
        self.waiting -= 1
        self.next_step += 1

    def resume(self) -> None:
        """Assign batches again after ``paused`` was set."""
        self.paused = False
        self._assign_next_batch()

    def _assign_next_batch(self) -> None:
        step = self.next_step + self.waiting
        if self.assignment or self.paused or self.latest is None or step >= self.num_steps:
            return
        if step - self.latest.version <= self.max_staleness:
            self.assignment = BatchAssignment(step, self.latest)
