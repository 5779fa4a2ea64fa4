"""Recording and replaying the completions of an engine."""

import json
from dataclasses import replace
from typing import Any

import pytest

from rlhf.rollout.episode import start_episode
from rlhf.rollout.sampling.base import SamplingParams
from rlhf.rollout.sampling.recording import (
    CollectionStopped,
    RecordedReply,
    RecordingEngine,
    prompt_digest,
)
from tests.helpers.models import tiny_model
from tests.helpers.rollouts import FakeEngine, Tales, episode_seeds, make_collector

SEEDS = episode_seeds(3, 4, 5)


def playing(*replies: str, version: int = 0) -> tuple[Any, RecordingEngine]:
    """A collector whose engine is recorded, and the recorder."""
    engine = RecordingEngine(Counting(*replies))
    engine.update_policy(version)
    return make_collector(engine), engine


class Counting(FakeEngine):
    """An engine whose reply depends on the turn, also if earlier turns were not sampled."""

    def complete(self, request: Any) -> Any:
        self.turns[request.episode_id] = request.seed[3]
        return super().complete(request)

    def release(self, episode_id: int) -> None:
        self.turns.pop(episode_id, None)


class Failing(Counting):
    """Stops after a number of completions, one in each poll."""

    def __init__(self, *replies: str, completions: int) -> None:
        super().__init__(*replies)
        self.left = completions

    def poll(self) -> list[Any]:
        if not self.left:
            raise RuntimeError("the server is dead")
        self.left -= 1
        first, self.requests = self.requests[:1], self.requests[1:]
        return [self.complete(request) for request in first]


def stored(replies: list[RecordedReply]) -> list[RecordedReply]:
    """The replies after a checkpoint."""
    rows = json.loads(json.dumps([reply.to_row() for reply in replies]))
    return [RecordedReply.from_row(row) for row in rows]


def record(*replies: str, step: int = 0, version: int = 0) -> tuple[list[Any], list[RecordedReply]]:
    """The rollouts of one step, and the record of its replies as a checkpoint stores it."""
    collector, engine = playing(*replies, version=version)
    engine.start_batch(step, min_policy_version=version)
    rollouts = collector.collect(SEEDS)
    completions = engine.finish_batch()
    assert engine.replies_of_unfinished_batch() == []
    return rollouts, stored([RecordedReply.from_completion(c, step) for c in completions])


def test_a_stored_batch_is_replayed_without_sampling():
    rollouts, replies = record("go", "on", "stop", version=3)
    assert len(replies) == 9
    assert replies[0].seed == (7, 3, 0, 0)
    assert {reply.policy_version for reply in replies} == {3}
    collector, engine = playing("other", version=3)
    engine.schedule_replay(replies)
    assert (
        engine.replies_of_unfinished_batch() == replies
    )  # a checkpoint before the first step keeps them
    engine.start_batch(0, min_policy_version=3)
    assert collector.collect(SEEDS) == rollouts  # tokens, log-probabilities, rewards, versions
    assert engine.engine.submitted == []
    assert len(engine.finish_batch()) == 9  # a checkpoint before the update stores them again
    assert engine.replies_of_unfinished_batch() == []
    assert engine.pop_unreplayed_reply_count() == 0


def test_only_the_missing_replies_of_an_unfinished_batch_are_sampled():
    engine = RecordingEngine(Failing("go", "stop", completions=4))
    engine.start_batch(0, min_policy_version=0)
    with pytest.raises(RuntimeError, match="dead"):
        make_collector(engine).collect(SEEDS)
    replies = stored(engine.replies_of_unfinished_batch())
    assert len(replies) == 4
    collector, resumed = playing("go", "stop", version=1)
    resumed.schedule_replay(replies)
    resumed.start_batch(0, min_policy_version=0)
    rollouts = collector.collect(SEEDS)
    sampled = [request.seed for request in resumed.engine.submitted]
    assert {reply.seed for reply in replies}.isdisjoint(sampled)
    assert len(set(sampled)) == len(sampled) == 6 - 4
    versions = {
        version
        for rollout in rollouts
        for version, sampled in zip(rollout.policy_versions, rollout.is_action, strict=True)
        if sampled
    }
    assert versions == {0, 1}


def test_a_reply_to_another_prompt_is_sampled_again_and_counted():
    """An environment that does not repeat its observations, as from another version of it."""
    _, replies = record("go", "stop")

    class Changed(Tales):
        def step(self, action):
            observation, *rest = super().step(action)
            return (f"{observation}!", *rest)

    engine = RecordingEngine(Counting("on", "stop"))
    engine.schedule_replay(replies)
    engine.start_batch(0, min_policy_version=0)
    rollouts = make_collector(engine, Changed).collect(SEEDS)
    assert len(engine.engine.submitted) == 3  # the second turns
    assert engine.num_discarded == 3
    texts = [m["content"] for m in rollouts[0].conversation if m["role"] == "assistant"]
    assert texts[0] == "go"


def test_replies_of_a_policy_that_is_too_old_are_sampled_again_and_counted():
    _, replies = record("stop", version=4)
    collector, engine = playing("stop", version=6)
    engine.schedule_replay(replies)
    engine.start_batch(0, min_policy_version=5)
    rollouts = collector.collect(SEEDS)
    assert len(engine.engine.submitted) == 3
    assert {v for r in rollouts for v in r.policy_versions} == {6}
    engine.finish_batch()
    assert engine.pop_unreplayed_reply_count() == 3
    assert engine.pop_unreplayed_reply_count() == 0


def test_replies_of_later_steps_are_kept_and_unused_ones_of_the_step_are_counted():
    _, replies = record("stop", step=1)
    later = [replace(reply, step=2, seed=(9, 9, 9, n)) for n, reply in enumerate(replies)]
    collector, engine = playing("stop")
    engine.schedule_replay([*replies, *later])
    engine.start_batch(1, min_policy_version=0)
    collector.collect(episode_seeds(3, 4))  # the episode of seed 5 is not played
    engine.finish_batch()
    assert engine.replies_of_unfinished_batch() == later
    assert engine.pop_unreplayed_reply_count() == 1


def test_a_stopped_collection_ends_at_the_next_poll():
    collector, engine = playing("go")
    engine.start_batch(0, min_policy_version=0)
    engine.stop_at_next_poll()
    with pytest.raises(CollectionStopped):
        collector.collect(SEEDS)


def test_released_requests_have_no_replayed_completion():
    _, replies = record("stop")
    engine = RecordingEngine(Counting("stop"))
    engine.schedule_replay(replies)
    engine.start_batch(0, min_policy_version=0)
    collector = make_collector(engine)
    envs = collector._get_or_make_environments(1)
    episode = start_episode(
        collector.settings, envs[0], SEEDS[0], *envs[0].reset(seed=3), policy_version=0
    )
    request = episode.make_request(SamplingParams())
    engine.submit([request])
    engine.release(request.episode_id)
    assert engine.poll() == []


@pytest.mark.parametrize("seed", range(3))
def test_a_replayed_batch_of_a_model_is_equal_to_the_bit(seed):
    model, _ = tiny_model(seed=seed)
    found = []
    replies: list[RecordedReply] = []
    for _ in range(2):
        collector = make_collector(model, max_new_tokens=5, parallel=3)
        collector.engine = engine = RecordingEngine(collector.engine)
        engine.schedule_replay(replies)
        engine.start_batch(0, min_policy_version=0)
        found.append(collector.collect(episode_seeds(*range(10 * seed, 10 * seed + 5))))
        replies = stored([RecordedReply.from_completion(c, 0) for c in engine.finish_batch()])
        collector.close()
    assert found[0] == found[1]
    assert engine.engine.prefill_tokens == 0


def test_the_digest_depends_on_every_token_and_on_their_order():
    digests = {prompt_digest(ids) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [1 + 2**40, 2], [])}
    assert len(digests) == 6
