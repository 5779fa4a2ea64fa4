"""Rewards that wait are computed while other episodes are played, with the same results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.reward_models import Reward, Scores, build
from rlhf.reward_models.adapters import as_reward
from rlhf.reward_models.core import PerConversationReward, Unscorable
from rlhf.reward_models.judge import RatingJudge
from rlhf.rollout.batch import Rollout
from rlhf.rollout.environments.workers import LockstepWorkers, ThreadedWorkers
from rlhf.training.episode_scorer import EpisodeScorer
from rlhf.training.scoring import score_rollouts
from tests.helpers.rollouts import FakeEngine, Tales, episode_seeds, make_collector

WAIT = 60.0
"""Time limit of a wait that a correct program ends at once, in seconds."""


def waiting_reward(function: Callable[[Any], float], name: str = "slow") -> PerConversationReward:
    return PerConversationReward(function, name=name, waits=True)


def by_start(conversation: Any) -> float:
    """The number that the environment has said first; numbers below 400 have no score."""
    number = int(conversation[0]["content"].split()[1])
    if number < 400:
        raise Unscorable(f"{number} is small")
    return number / 1000


class ReverseEngine(FakeEngine):
    """Completes one request per poll, the newest first, so that episodes end in another order."""

    def poll(self) -> list[Any]:
        return [self.complete(self.requests.pop())] if self.requests else []


def scored(
    seeds: Sequence[int],
    rewards: Any,
    *,
    gold: Any = None,
    engine: Any = None,
    workers: Any = LockstepWorkers,
    early: bool = True,
) -> list[Rollout]:
    collector = make_collector(
        engine or ReverseEngine("go", "stop"), Tales, workers=workers, parallel=4
    )
    with EpisodeScorer([rewards, gold] if early else []) as scorer:
        rollouts = collector.collect(episode_seeds(*seeds), on_finish=scorer.submit)
        score_rollouts(rollouts, rewards=rewards, gold=gold, env_weight=0.5, scorer=scorer)
    collector.close()
    return rollouts


@pytest.mark.parametrize("workers", [LockstepWorkers, ThreadedWorkers])
@pytest.mark.parametrize("first", [0, 40, 80])
def test_early_scores_are_those_of_the_whole_batch(workers: Any, first: int) -> None:
    """Values, components, reasons and the order of the records, with several rewards."""
    seeds = range(first, first + 12)
    rewards = waiting_reward(by_start) + 2.0 * waiting_reward(lambda c: len(c), "turns")
    gold = RatingJudge(lambda prompts: [f"Rating: {len(p) % 12}" for p in prompts])
    expected = scored(seeds, rewards, gold=gold, engine=FakeEngine("go", "stop"), early=False)
    found = scored(seeds, rewards, gold=gold, workers=workers)
    assert [rollout.seed for rollout in found] == [*seeds]
    for one, other in zip(found, expected, strict=True):
        assert one.components == other.components
        assert one.components.keys() == {"env", "slow", "turns", "judge", "gold"}
        assert one.unscored == other.unscored
        assert repr(one.rewards) == repr(other.rewards)  # nan is equal to nan
    reasons = [rollout.unscored for rollout in expected]
    assert any(reasons)
    assert not all(reasons)


def test_an_episode_is_scored_while_another_one_is_played() -> None:
    """The engine completes the second episode only after the first one has its score."""
    has_score = threading.Event()

    def tell(conversation: Any) -> float:
        has_score.set()
        return 1.0

    class Waiting(FakeEngine):
        def poll(self) -> list[Any]:
            first, self.requests = self.requests[:1], self.requests[1:]
            if first and first[0].seed[1] == 1:
                assert has_score.wait(WAIT)
            return [self.complete(request) for request in first]

    rollouts = scored([0, 1], waiting_reward(tell), engine=Waiting("stop"))
    assert [rollout.components["slow"] for rollout in rollouts] == [1.0, 1.0]


def test_episodes_that_end_during_a_call_are_scored_together() -> None:
    """A judge sees the first episode alone and then all episodes that have ended meanwhile."""
    sizes: list[int] = []
    begun, all_ended = threading.Event(), threading.Event()

    def rate(prompts: list[str]) -> list[str]:
        sizes.append(len(prompts))
        begun.set()
        assert all_ended.wait(WAIT)
        return ["Rating: 5"] * len(prompts)

    class Waiting(FakeEngine):
        def poll(self) -> list[Any]:
            first, self.requests = self.requests[:1], self.requests[1:]
            assert first[0].seed[1] == 0 or begun.wait(WAIT)
            return [self.complete(request) for request in first]

    judge = RatingJudge(rate)
    collector = make_collector(Waiting("stop"), Tales)
    with EpisodeScorer([judge]) as scorer:
        rollouts = collector.collect(episode_seeds(*range(6)), on_finish=scorer.submit)
        all_ended.set()
        scores = scorer.score(judge, rollouts)
    assert scores.values == [pytest.approx(4 / 9)] * 6
    assert sizes == [1, 5]


def test_rewards_that_compare_or_do_not_wait_see_the_whole_batch() -> None:
    seen: list[tuple[int, bool]] = []

    def ranks(conversations: Any) -> list[float]:
        main = threading.current_thread() is threading.main_thread()
        seen.append((len(conversations), main))
        texts = [conversation[0]["content"] for conversation in conversations]
        return [float(sorted(texts).index(text)) for text in texts]

    rollouts = scored(range(5), as_reward(ranks))
    assert seen == [(5, True)]
    assert sorted(rollout.components["ranks"] for rollout in rollouts) == [0, 1, 2, 3, 4]
    seen.clear()
    scored(range(5), as_reward(ranks) + waiting_reward(by_start))  # a sum with one of them
    assert seen == [(5, True)]
    seen.clear()
    ranks.independent = True  # type: ignore[attr-defined]
    scored(range(5), as_reward(ranks))
    assert sum(count for count, _ in seen) == 5
    assert not any(main for _, main in seen)


class Wrong(Reward):
    """Returns too few scores."""

    name, independent, waits = "wrong", True, True

    def score(self, conversations: Any) -> Scores:
        return Scores([])


def test_an_error_of_a_reward_is_raised_in_the_main_thread() -> None:
    with pytest.raises(UserError, match="reward 'wrong' returned Scores of 0"):
        scored(range(3), Wrong())


@pytest.mark.parametrize(
    ("spec", "early"),
    [
        ({"kind": "code", "tests": "assert f(1) == 2"}, True),
        ({"kind": "math"}, True),
        ({"kind": "judge", "url": "http://localhost:1", "model": "m"}, True),
        ({"kind": "function", "path": "tests.helpers.training:judge", "timeout": 1.0}, True),
        ({"kind": "function", "path": "tests.helpers.training:judge"}, False),
        ({"kind": "length"}, False),
        ([{"kind": "math"}, {"kind": "length"}], True),
        ([{"kind": "math"}, {"kind": "function", "path": "tests.helpers.training:judge"}], False),
        ({"kind": "gate", "reward": {"kind": "math"}, "condition": {"kind": "refusal"}}, True),
    ],
)
def test_kinds_that_wait_and_score_conversations_alone_are_early(spec: Any, early: bool) -> None:
    reward = build(spec)
    assert (reward.independent and reward.waits) == early
