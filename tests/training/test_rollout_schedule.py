"""The schedule of background collection: hand-worked orders of events, and random ones."""

import random

import pytest

from rlhf.models.policy_copy import Snapshot
from rlhf.training.rollouts.schedule import RolloutSchedule


class Played:
    """A schedule with what happened: (step, version) of every batch that was assigned."""

    def __init__(self, *, max_staleness: int, num_steps: int = 1000, first: int = 0) -> None:
        self.schedule = RolloutSchedule(
            next_step=first, num_steps=num_steps, max_staleness=max_staleness
        )
        self.assigned: list[tuple[int, int]] = []

    def note(self) -> None:
        assignment = self.schedule.assignment
        if assignment is not None:
            entry = (assignment.step, assignment.policy.version)
            if entry not in self.assigned:
                self.assigned.append(entry)

    def publish(self, version: int) -> None:
        self.schedule.use_policy_for_next_batches(Snapshot(version, {}))
        self.note()

    def finish(self) -> None:
        self.schedule.record_complete_batch()
        self.note()

    def take(self) -> None:
        self.schedule.record_taken_batch()
        self.note()


def test_without_staleness_a_batch_waits_for_its_policy():
    played = Played(max_staleness=0)
    for step in range(3):
        assert played.schedule.assignment is None
        played.publish(step)
        played.finish()
        played.take()
    assert played.assigned == [(0, 0), (1, 1), (2, 2)]


def test_one_batch_is_collected_while_the_policy_is_trained():
    """A slow trainer: each batch is complete before the update on the batch before it."""
    played = Played(max_staleness=1)
    played.publish(0)
    played.finish()
    assert played.assigned == [(0, 0), (1, 0)]
    played.take()  # the trainer updates with batch 0
    played.finish()
    assert played.schedule.assignment is None  # batch 2 with policy 0 would be two updates old
    played.publish(1)
    assert played.assigned == [(0, 0), (1, 0), (2, 1)]


def test_a_slow_collection_uses_the_latest_policy():
    """The trainer waits for each batch, so with a limit of 4 they are only one update old."""
    played = Played(max_staleness=4)
    played.publish(0)
    for step in range(1, 5):
        played.finish()  # batch step - 1 is complete and batch `step` begins
        played.take()
        played.publish(step)
    assert played.assigned == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]


def test_a_slow_trainer_has_batches_of_the_maximum_age():
    played = Played(max_staleness=2)
    played.publish(0)
    for version in range(4):
        if version:
            played.take()
            played.publish(version)
        while played.schedule.assignment:
            played.finish()
    assert played.assigned == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]
    assert played.schedule.waiting == 3


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_makes_a_batch_too_old(seed):
    """The trainer publishes, takes, updates, and now and then pauses the collection."""
    rng = random.Random(seed)
    limit, steps = rng.randrange(4), rng.randrange(1, 12)
    played = Played(max_staleness=limit, num_steps=steps)
    schedule = played.schedule
    played.publish(0)
    trained, updating = 0, False
    while trained < steps:
        events = ["finish"] * (schedule.assignment is not None)
        events += ["take"] * (schedule.waiting > 0 and not updating)
        events += ["update", "update and evaluate"] * updating
        event = rng.choice(events)
        if event == "finish":
            played.finish()
        elif event == "take":
            played.take()
            updating = True
        else:
            trained, updating = trained + 1, False
            if event == "update and evaluate":
                schedule.paused = True
                if schedule.assignment is not None:
                    played.finish()
                played.publish(trained)
                schedule.resume()
                played.note()
            else:
                played.publish(trained)
        assert schedule.waiting <= limit + 1  # one for the next step, the others in advance
    assert [step for step, _ in played.assigned] == list(range(steps)), seed
    for step, version in played.assigned:
        assert 0 <= step - version <= limit, seed
        if limit == 1:
            assert version == max(0, step - 1), seed  # as the documentation says


def test_a_resumed_run_begins_with_its_step_and_ends_with_the_last():
    played = Played(max_staleness=3, num_steps=7, first=5)
    played.publish(5)
    played.finish()
    played.finish()
    assert played.assigned == [(5, 5), (6, 5)]
    assert played.schedule.assignment is None


def test_no_batch_is_assigned_during_a_pause():
    played = Played(max_staleness=1)
    played.publish(0)
    played.schedule.paused = True
    played.finish()
    assert played.schedule.assignment is None
    played.publish(1)
    assert played.schedule.assignment is None
    played.schedule.resume()
    played.note()
    assert played.assigned == [(0, 0), (1, 1)]
