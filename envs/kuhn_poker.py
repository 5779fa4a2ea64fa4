"""Kuhn poker: a minimal poker game with bluffing and a known game value."""

from __future__ import annotations

import itertools

from rlhf.envs.core import Step, normalized
from rlhf.envs.two_player import SEATS, Opponent, TwoPlayerEnv, append_opponent_reply

Strategy = dict[str, dict[str, float]]
"""History -> own card -> probability of `bet` or `call`, whichever is legal."""
CARDS: tuple[str, ...] = ("jack", "queen", "king")
DEALS = tuple(itertools.permutations(CARDS, 2))
LEGAL_WORDS_BY_HISTORY = {
    "": ("check", "bet"),
    "c": ("check", "bet"),
    "b": ("call", "fold"),
    "cb": ("call", "fold"),
}
"""History (one letter per action so far) -> legal actions."""
AGGRESSIVE = ("bet", "call")

# The equilibrium of Kuhn 1950, "A simplified two-person poker", with alpha = 1/3. A test verifies
# that it is an equilibrium.
EQUILIBRIUM: Strategy = {
    "": {"jack": 1 / 3, "queen": 0.0, "king": 1.0},
    "c": {"jack": 1 / 3, "queen": 0.0, "king": 1.0},
    "b": {"jack": 0.0, "queen": 1 / 3, "king": 1.0},
    "cb": {"jack": 0.0, "queen": 2 / 3, "king": 1.0},
}
UNIFORM: Strategy = {history: dict.fromkeys(CARDS, 0.5) for history in LEGAL_WORDS_BY_HISTORY}
STRATEGIES = {"optimal": EQUILIBRIUM, "random": UNIFORM}
RULES = (
    "Kuhn poker. Cards: jack, queen, king; the higher card wins. Each player antes 1 and gets one "
    "card. Answer check or bet when nobody has bet, call or fold after a bet. A bet or a call adds "
    "1 to the pot; a showdown or a fold decides who gets it. Any other answer folds."
)


class KuhnPoker(TwoPlayerEnv):
    """One hand of Kuhn poker against an opponent.

    State: the cards of both players (of three cards, dealt uniformly), the seat and the actions so
    far. Observation: the agent's card and the opponent's action. Action: check, bet, call or fold;
    an invalid action folds, even if there was no bet. Reward at the end: the number of chips won (1
    or 2) or lost (-1 or -2). Optimum: the exact best response to the opponent. The value of the
    game is -1/18 for the first seat.

    Args:
        opponent: "optimal" (a Nash equilibrium), "random", or a function from the opponent's
            conversation to its reply, such as a snapshot of the agent for self-play. An invalid
            reply of the function folds, or checks if it is the first action of the hand.
        seat: "first", "second", or "random" (drawn at each reset).
    """

    max_turns = 2
    items = "One of six deals, all of which also occur in training."
    rules = RULES
    opponents = {  # noqa: RUF012
        "optimal": " Your opponent plays a Nash equilibrium.",
        "random": " Your opponent answers at random.",
    }

    def __init__(
        self,
        opponent: Opponent = "optimal",
        seat: str = "random",
        *,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(opponent, seat, render_mode=render_mode)
        self._begin_episode("first", CARDS[0], CARDS[1])

    def _begin_episode(self, seat: str, card: str, opponent_card: str) -> None:
        """Start an episode in which the agent has this seat and this card."""
        self._seat, self._card, self._opponent_card, self._history = seat, card, opponent_card, ""
        self._restart_opponent_conversation()
        self._last_move = ""

    def start(self) -> str:
        seat = self._draw_seat()
        self._begin_episode(seat, *DEALS[int(self.np_random.integers(len(DEALS)))])
        text = f"You hold the {self._card}."
        if seat == "second":
            text += f" {self._play_opponent_move()}"
        return f"{text} {' or '.join(LEGAL_WORDS_BY_HISTORY[self._history])}?"

    def step(self, action: str) -> Step:
        word = normalized(action)
        valid = word in LEGAL_WORDS_BY_HISTORY[self._history]
        reason = "" if valid else f"not {' or '.join(LEGAL_WORDS_BY_HISTORY[self._history])}"
        word = word if valid else "fold"
        self._history += word[0]
        self.turns_left -= 1
        self._last_move = f"Your opponent says {word}."
        text = ""
        if winner_and_chips(self._history) is None:
            text = self._play_opponent_move()
        chips = winner_and_chips(self._history)
        if chips is None:
            text = f"{text} {' or '.join(LEGAL_WORDS_BY_HISTORY[self._history])}?"
            return self.turn(text, 0.0, valid=valid, reason=reason)
        won = _chips_won(self._history, self._seat, self._card, self._opponent_card)
        text = f"{text} You held the {self._card}, your opponent the {self._opponent_card}.".strip()
        return self.turn(text, won, True, success=won > 0, valid=valid, reason=reason)

    def _play_opponent_move(self) -> str:
        """Append the opponent's move to the history, and return its description for the agent.

        An invalid reply of a function is a fold, or a check if it is the first action of the hand.
        """
        legal = LEGAL_WORDS_BY_HISTORY[self._history]
        if isinstance(self.opponent, str):
            chance = STRATEGIES[self.opponent][self._history][self._opponent_card]
            is_aggressive = self.np_random.random() < chance
            first, second = legal
            word = first if (first in AGGRESSIVE) == is_aggressive else second
        else:
            first = f"You hold the {self._opponent_card}." if len(self._opponent_view) == 1 else ""
            text = f"{first} {self._last_move} {' or '.join(legal)}?"
            text = " ".join(text.split())
            word = normalized(append_opponent_reply(self.opponent, self._opponent_view, text))
            if word not in legal:
                # An episode cannot end at reset, so an invalid first action is not a fold.
                word = "fold" if self._history else "check"
        self._history += word[0]
        return f"Your opponent says {word}."

    def legal_actions(self) -> list[str]:
        return list(LEGAL_WORDS_BY_HISTORY.get(self._history, LEGAL_WORDS_BY_HISTORY[""]))

    def action_values(self) -> dict[str, float]:
        strategy = self._opponent_strategy()
        others = [card for card in CARDS if card != self._card]
        # Likelihood of the opponent's actions so far, for each card that the opponent may have.
        weights = {
            c: _opponent_reach_probability(self._history, self._seat, c, strategy) for c in others
        }
        total = sum(weights.values())
        after = {word: self._history + word[0] for word in self.legal_actions()}
        return {
            word: _weighted_future_chips(history, self._seat, self._card, weights, strategy) / total
            for word, history in after.items()
        }

    def optimal_value(self) -> float:
        return self._mean_chips(None)

    def random_value(self) -> float:
        return self._mean_chips(UNIFORM)

    def reference_values(self) -> dict[str, float]:
        """Return `equilibrium`, the value of the Nash strategy against this opponent."""
        return {"equilibrium": self._mean_chips(EQUILIBRIUM)}

    def _opponent_strategy(self) -> Strategy:
        return STRATEGIES[self._require_built_in_opponent()]

    def _mean_chips(self, agent_strategy: Strategy | None) -> float:
        """Return the agent's mean chips over all deals and seats.

        If `agent_strategy` is None, the agent plays the best response to the opponent.
        """
        strategy = self._opponent_strategy()
        values = [
            _weighted_future_chips(
                "", seat, card, dict.fromkeys(set(CARDS) - {card}, 0.5), strategy, agent_strategy
            )
            for seat in self._possible_agent_seats
            for card in CARDS
        ]
        return sum(values) / len(values)


def winner_and_chips(history: str) -> tuple[str, int] | None:
    """Return (winner, chips) of a finished hand, or None if the hand is not finished.

    The winner is "first", "second", or "showdown" if the higher card wins.
    """
    if history.endswith("f"):
        return SEATS[len(history) % 2], 1
    return {"cc": ("showdown", 1), "bc": ("showdown", 2), "cbc": ("showdown", 2)}.get(history)


def _chips_won(history: str, seat: str, card: str, opponent_card: str) -> float:
    """Return the chips that the player in `seat` wins in a finished hand; a loss is negative."""
    end = winner_and_chips(history)
    assert end is not None
    winner, chips = end
    has_higher_card = CARDS.index(card) > CARDS.index(opponent_card)
    wins = has_higher_card if winner == "showdown" else winner == seat
    return float(chips if wins else -chips)


def _action_probability(history: str, word: str, card: str, strategy: Strategy) -> float:
    """Return the probability that a strategy chooses `word` with this card."""
    chance = strategy[history][card]
    return chance if word in AGGRESSIVE else 1 - chance


def _opponent_reach_probability(
    history: str, agent_seat: str, opponent_card: str, strategy: Strategy
) -> float:
    """Return the probability of the opponent's actions in `history`.

    Args:
        history: One letter per action so far.
        agent_seat: Seat of the agent.
        opponent_card: Card of the opponent.
        strategy: Strategy of the opponent.
    """
    chance = 1.0
    for i, letter in enumerate(history):
        if SEATS[i % 2] != agent_seat:
            (word,) = (word for word in LEGAL_WORDS_BY_HISTORY[history[:i]] if word[0] == letter)
            chance *= _action_probability(history[:i], word, opponent_card, strategy)
    return chance


def _weighted_future_chips(
    history: str,
    seat: str,
    card: str,
    opponent_card_weights: dict[str, float],
    opponent_strategy: Strategy,
    agent_strategy: Strategy | None = None,
) -> float:
    """Return the weighted sum, over the opponent's possible cards, of the agent's expected chips.

    The agent's action may depend only on its own card and the history. The best response therefore
    maximizes the weighted sum, and not the chips for each card of the opponent.

    Args:
        history: One letter per action so far.
        seat: Seat of the agent.
        card: Card of the agent.
        opponent_card_weights: Weight of each possible card of the opponent.
        opponent_strategy: Strategy of the opponent.
        agent_strategy: Strategy of the agent; None means the exact best response.
    """
    if winner_and_chips(history) is not None:
        return sum(
            w * _chips_won(history, seat, card, other) for other, w in opponent_card_weights.items()
        )
    values = {}
    is_agents_turn = SEATS[len(history) % 2] == seat
    for word in LEGAL_WORDS_BY_HISTORY[history]:
        after = opponent_card_weights
        if not is_agents_turn:
            after = {
                c: w * _action_probability(history, word, c, opponent_strategy)
                for c, w in opponent_card_weights.items()
            }
        values[word] = _weighted_future_chips(
            history + word[0], seat, card, after, opponent_strategy, agent_strategy
        )
    if not is_agents_turn:
        return sum(values.values())
    if agent_strategy is None:
        return max(values.values())
    return sum(
        _action_probability(history, word, card, agent_strategy) * value
        for word, value in values.items()
    )
