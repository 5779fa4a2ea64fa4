"""The route for scores of conversations."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlhf.config.serve import ServerLimits
from rlhf.errors import UserError
from rlhf.reward_models.core import Reward, Scores, score_copies
from rlhf.serving.bodies import ScoreBody, read_body
from rlhf.serving.disconnect import result_while_connected
from rlhf.serving.errors import ApiError, overloaded_error, timeout_error, unknown_model_error
from rlhf.serving.metrics import ServerMetrics

_RETRY_SECONDS = 5
"""Time after which a client should repeat a request if the queue was full, in seconds."""


class ScoreRoute:
    """Scores conversations with a reward.

    Args:
        name: Name of the reward in requests.
        reward: The reward.
        limits: Limits of requests.
        metrics: Counters of the server.
    """

    def __init__(
        self, name: str, reward: Reward, limits: ServerLimits, metrics: ServerMetrics
    ) -> None:
        self.name, self.reward, self.limits, self.metrics = name, reward, limits, metrics
        self._num_unfinished = 0
        # Rewards may not be thread-safe.
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="score")

    def close(self) -> None:
        """Stop the thread. Waiting requests are canceled."""
        self._scoring.shutdown(wait=False, cancel_futures=True)

    async def score(self, request: Request) -> Response:
        """Score the conversations of a request to ``/v1/score``.

        Raises:
            ApiError: The body is invalid, has too many conversations or another model, the queue is
                full, the reward refuses the conversations, or the time limit is exceeded.
            ClientDisconnect: The client closed the connection.
        """
        body, limits = read_body(ScoreBody, await request.body()), self.limits
        if body.model != self.name:
            raise unknown_model_error(body.model, [self.name], place="/v1/score")
        count = len(body.conversations)
        if count > limits.conversations:
            raise ApiError(
                400,
                f"{count} conversations, but a request is limited to {limits.conversations}",
                param="conversations",
            )
        if self._num_unfinished + count > limits.conversations + limits.queue:
            raise overloaded_error(_RETRY_SECONDS)
        self._num_unfinished += count
        try:
            scores = await result_while_connected(request, self._score(body))
        finally:
            self._num_unfinished -= count
        self.metrics.scored.inc(count)
        return JSONResponse(self._scores_json(scores))

    async def _score(self, body: ScoreBody) -> Scores:
        """Score conversations in the thread of the reward.

        Raises:
            ApiError: The reward refuses the conversations, or the time limit is exceeded.
        """
        loop = asyncio.get_running_loop()
        scoring = loop.run_in_executor(self._scoring, score_copies, self.reward, body.conversations)
        try:
            return await asyncio.wait_for(scoring, self.limits.seconds)
        except UserError as error:
            raise ApiError(400, f"conversations: {error}", param="conversations") from error
        except TimeoutError as error:
            raise timeout_error(self.limits.seconds) from error

    def _scores_json(self, scores: Scores) -> dict[str, object]:
        return {
            "object": "list",
            "model": self.name,
            "data": [
                {
                    "index": index,
                    "object": "score",
                    "score": value,
                    "components": {name: c[index] for name, c in scores.components.items()},
                    "reason": scores.reasons[index],
                }
                for index, value in enumerate(scores.values)
            ],
        }
