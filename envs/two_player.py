"""Base class of the games in which one agent plays against an opponent."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rlhf.common.conversation import Conversation
from rlhf.envs.core import TextEnv, check_choice
from rlhf.errors import UserError

Opponent = str | Callable[[Conversation], str]
"""Name of a built-in opponent, or a function from the opponent's conversation to its reply."""
SEATS = ("first", "second")


class TwoPlayerEnv(TextEnv):
    """A game against a built-in opponent or a function.

    A function receives the game from the opponent's perspective: the rules as system message, the
    observations as user messages and its own replies as assistant messages.
    """

    rules: ClassVar[str]
    """System prompt of both players."""
    opponents: ClassVar[dict[str, str]]
    """Built-in opponent -> the sentence about it that is added to the agent's system prompt."""

    def __init__(self, opponent: Opponent, seat: str, *, render_mode: str | None = None) -> None:
        if isinstance(opponent, str):
            check_choice("opponent", opponent, tuple(self.opponents))
        check_choice("seat", seat, (*SEATS, "random"))
        super().__init__(render_mode=render_mode)
        self.opponent, self.seat = opponent, seat
        opponent_sentence = self.opponents[opponent] if isinstance(opponent, str) else ""
        self.system_prompt = self.rules + opponent_sentence

    def _restart_opponent_conversation(self) -> None:
        """Start the opponent's conversation again with the rules."""
        self._opponent_view: Conversation = [{"role": "system", "content": self.rules}]

    @property
    def _possible_agent_seats(self) -> tuple[str, ...]:
        """Possible seats of the agent, which are equally probable."""
        return SEATS if self.seat == "random" else (self.seat,)

    def _draw_seat(self) -> str:
        return self.seat if self.seat != "random" else SEATS[int(self.np_random.integers(2))]

    def _require_built_in_opponent(self) -> str:
        """Return the built-in opponent's name; raise a UserError if the opponent is a function."""
        if not isinstance(self.opponent, str):
            raise UserError(
                "values can be computed only against a built-in opponent, "
                "but opponent is a function"
            )
        return self.opponent


def append_opponent_reply(
    opponent: Callable[[Conversation], str], conversation: Conversation, user_text: str
) -> str:
    """Return the opponent's reply to a new user message.

    The message and the reply are appended to `conversation` in place.
    """
    conversation.append({"role": "user", "content": user_text})
    reply = opponent([dict(message) for message in conversation])
    conversation.append({"role": "assistant", "content": reply})
    return reply
