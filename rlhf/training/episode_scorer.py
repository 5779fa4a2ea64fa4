"""Score finished episodes while other episodes are still being played."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Sequence

from rlhf.common.conversation import Score
from rlhf.reward_models.core import Reward, Scores, score_copies
from rlhf.rollout.batch import Rollout


class EpisodeScorer:
    """Scores episodes in a thread, in the order in which they end.

    Only rewards with ``waits`` and ``independent`` are computed in the thread: they wait for
    another program instead of using the processor, and the score of an episode is the same whether
    other episodes are scored with it or not. Each call of a reward scores all episodes that have
    ended since the start of the previous call, because a judge answers several requests at once.

    Args:
        rewards: The rewards of the episodes; None is ignored.
    """

    def __init__(self, rewards: Iterable[Reward | None]) -> None:
        self._rewards = [r for r in rewards if r is not None and r.independent and r.waits]
        self._ended: queue.SimpleQueue[Rollout | None] = queue.SimpleQueue()
        self._scores: dict[tuple[int, int], Scores] = {}  # by ids of the reward and of the rollout
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)

    def __enter__(self) -> EpisodeScorer:
        if self._rewards:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.put(None)  # the thread ends after the queued episodes

    def submit(self, rollout: Rollout) -> None:
        """Queue an episode that has ended. Its conversation must not change any more."""
        if self._rewards:
            self._ended.put(rollout)

    def score(self, reward: Reward, rollouts: Sequence[Rollout]) -> Scores:
        """Wait for the scores of submitted episodes, and return them.

        If the reward is not computed in the thread, it is computed now, on all episodes at once.
        Otherwise, the thread ends, so no further episodes can be submitted, and an error of a
        reward in the thread is raised here.

        Raises:
            UserError: The reward does not return one score for each conversation.
        """
        if reward not in self._rewards:
            return score_copies(reward, [rollout.scored_conversation for rollout in rollouts])
        self._ended.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        singles = [self._scores[id(reward), id(rollout)] for rollout in rollouts]
        names = dict.fromkeys(name for scores in singles for name in scores.components)
        components: dict[str, list[Score]] = {
            name: [scores.components[name][0] for scores in singles] for name in names
        }
        values = [scores.values[0] for scores in singles]
        return Scores(values, components, reasons=[scores.reasons[0] for scores in singles])

    def _run(self) -> None:
        """Score episodes until None arrives."""
        more = True
        try:
            while more:
                ended = [self._ended.get()]
                with contextlib.suppress(queue.Empty):
                    while ended[-1] is not None:
                        ended.append(self._ended.get_nowait())
                more = ended[-1] is not None
                self._score_together([rollout for rollout in ended if rollout is not None])
        except BaseException as error:
            self._error = error

    def _score_together(self, rollouts: Sequence[Rollout]) -> None:
        """Score episodes with each reward of the thread, and record the scores."""
        if not rollouts:
            return
        for reward in self._rewards:
            scores = score_copies(reward, [rollout.scored_conversation for rollout in rollouts])
            for index, rollout in enumerate(rollouts):
                self._scores[id(reward), id(rollout)] = Scores(
                    [scores.values[index]],
                    {name: [column[index]] for name, column in scores.components.items()},
                    reasons=[scores.reasons[index]],
                )
