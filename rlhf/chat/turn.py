"""One turn of a chat with several models, and the vote on its replies."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from rlhf.chat.policy import Reply
from rlhf.common.conversation import Conversation, Score
from rlhf.rollout.turns import StepResult


@dataclass(frozen=True)
class ReplyScore:
    """Score of one reply."""

    value: Score
    """The score; None if the reply could not be scored."""
    components: dict[str, Score]
    reason: str | None
    """Reason of a missing score."""


@dataclass
class Turn:
    """The replies of all models to their prompts. Lists have one entry for each model."""

    prompts: list[Conversation]
    """Messages before the reply."""
    order: list[int]
    """Indices of the models in the order in which their replies are shown."""
    replies: list[Reply | None]
    """The replies; None for a model that has not replied."""
    results: list[StepResult | None]
    """Result of the environment for each reply; None without an environment or a reply."""
    scores: list[ReplyScore | None]
    earlier_reply_counts: list[int]
    """Number of replies of each model before this turn."""
    turn_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Random id, which distinguishes this turn from one that was taken back."""
    given_by_user: bool = False
    """Whether the user replied instead of the models."""
    vote_id: str | None = None
    """Id of the vote of the user; None before the vote."""
    preferred: int | None = None
    """Index of the model with the preferred reply; None before the vote, and for a tie."""

    @property
    def is_voted(self) -> bool:
        """Whether the user has compared the replies."""
        return self.vote_id is not None


@dataclass(frozen=True)
class Vote:
    """A comparison of the replies of one turn."""

    vote_id: str
    turn: Turn
    models: list[str]
    """Names of the models."""
    preferred: int | None
    """Index of the model with the preferred reply; None for a tie."""
    blind: bool
    """Whether the names of the models were hidden."""
    seed: int
    """Seed of the conversation."""
