"""Kuhn poker: the smallest poker, with bluffing and a known game value."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from rlhf.envs.core import Conversation, Step, TextEnv, check_choice, plain
from rlhf.errors import UserError

Opponent = str | Callable[[Conversation], str]
Strategy = dict[str, dict[str, float]]  # history -> card -> chance of betting or calling
Choice = Callable[[str, str, dict[str, float]], float]
"""(history, own card, value of each action) -> value of the state: who decides, and how."""
CARDS: tuple[str, ...] = ("jack", "queen", "king")
DEALS = tuple(itertools.permutations(CARDS, 2))
LEGAL = {
    "": ("check", "bet"),
    "c": ("check", "bet"),
    "b": ("call", "fold"),
    "cb": ("call", "fold"),
}
"""What may be said after each history; a history holds one letter per action so far."""
SEATS = ("first", "second")

# Chance of betting or calling, by history and card (Kuhn 1950, "A simplified two-person poker"):
# one member, alpha = 1/3, of the family of equilibria. That it is one is tested, not taken on
# trust.
EQUILIBRIUM: Strategy = {
    "": {"jack": 1 / 3, "queen": 0.0, "king": 1.0},
    "c": {"jack": 1 / 3, "queen": 0.0, "king": 1.0},
    "b": {"jack": 0.0, "queen": 1 / 3, "king": 1.0},
    "cb": {"jack": 0.0, "queen": 2 / 3, "king": 1.0},
}
UNIFORM: Strategy = {history: dict.fromkeys(CARDS, 0.5) for history in LEGAL}
STRATEGIES = {"optimal": EQUILIBRIUM, "random": UNIFORM}
RULES = (
    "Kuhn poker. Cards: jack, queen, king; the higher card wins. Each player antes 1 and gets one "
    "card. Answer check or bet when nobody has bet, call or fold after a bet. A bet or a call adds "
    "1 to the pot; a showdown or a fold decides who gets it. Any other answer folds."
)
OPPONENTS = {
    "optimal": " Your opponent plays a Nash equilibrium.",
    "random": " Your opponent answers at random.",
}
"""What the agent is told about the opponents whose play decides the optimum."""


class KuhnPoker(TextEnv):
    """One hand of Kuhn poker against an opponent.

    State: both cards (of three, dealt uniformly), the seat, what was said. Observation: the own
    card and what the opponent said. Action: check, bet, call or fold; an invalid one folds, also
    where nobody has bet. Reward at the end: chips won or lost (1 or 2). Optimum: the exact best
    response to the opponent; the game's value is -1/18 for the first seat.

    Args:
        opponent: "optimal" (a Nash equilibrium), "random", or a function from the conversation as
            the opponent sees it (system, user and assistant messages) to its reply: a snapshot of
            the agent, for self-play.
        seat: "first", "second", or "random" (drawn at each reset).
    """

    max_turns = 2

    items = "One of six deals, all of them in training too."

    def __init__(
        self,
        opponent: Opponent = "optimal",
        seat: str = "random",
        *,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(opponent, str):
            check_choice("opponent", opponent, tuple(STRATEGIES))
        check_choice("seat", seat, (*SEATS, "random"))
        super().__init__(render_mode=render_mode)
        self.opponent, self.seat = opponent, seat
        self.system_prompt = RULES + (OPPONENTS[opponent] if isinstance(opponent, str) else "")
        self._begin("first", CARDS[0], CARDS[1])

    def _begin(self, seat: str, mine: str, theirs: str) -> None:
        self._seat, self._mine, self._theirs, self._history = seat, mine, theirs, ""
        self._their_view: Conversation = [{"role": "system", "content": RULES}]
        self._heard = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        seat = self.seat if self.seat != "random" else SEATS[int(self.np_random.integers(2))]
        self._begin(seat, *DEALS[int(self.np_random.integers(len(DEALS)))])
        text = f"You hold the {self._mine}."
        if seat == "second":
            text += f" {self._opponent_moves()}"
        return self.opening(f"{text} {' or '.join(LEGAL[self._history])}?")

    def step(self, action: str) -> Step:
        word = plain(action)
        valid = word in LEGAL[self._history]
        reason = "" if valid else f"not {' or '.join(LEGAL[self._history])}"
        word = word if valid else "fold"
        self._history += word[0]
        self._heard = f"Your opponent says {word}."
        text = ""
        if payoff(self._history) is None:
            text = self._opponent_moves()
        chips = payoff(self._history)
        if chips is None:
            text = f"{text} {' or '.join(LEGAL[self._history])}?"
            return self.turn(text, 0.0, False, valid=valid, reason=reason)
        won = _gain(self._history, self._seat, self._mine, self._theirs)
        text = f"{text} You held the {self._mine}, your opponent the {self._theirs}.".strip()
        return self.turn(text, won, True, success=won > 0, valid=valid, reason=reason)

    def _opponent_moves(self) -> str:
        """Let the opponent speak; returns what the agent hears."""
        legal = LEGAL[self._history]
        if isinstance(self.opponent, str):
            brave = STRATEGIES[self.opponent][self._history][self._theirs]
            word = _brave(legal) if self.np_random.random() < brave else _meek(legal)
        else:
            word = self._ask_opponent(legal)
        self._history += word[0]
        return f"Your opponent says {word}."

    def _ask_opponent(self, legal: tuple[str, ...]) -> str:
        assert callable(self.opponent)
        first = f"You hold the {self._theirs}." if len(self._their_view) == 1 else ""
        text = f"{first} {self._heard} {' or '.join(legal)}?"
        self._their_view.append({"role": "user", "content": " ".join(text.split())})
        word = self.opponent([dict(message) for message in self._their_view])
        self._their_view.append({"role": "assistant", "content": word})
        return plain(word) if plain(word) in legal else "fold"

    def legal_actions(self) -> list[str]:
        return list(LEGAL.get(self._history, LEGAL[""]))

    def action_values(self) -> dict[str, float]:
        strategy = self._strategy()
        others = [card for card in CARDS if card != self._mine]
        # How likely each card is to have spoken as the opponent did.
        weights = {card: _reach(self._history, self._seat, card, strategy) for card in others}
        total = sum(weights.values())
        return {
            word: _respond(
                self._history + word[0], self._seat, self._mine, weights, strategy, _best
            )
            / total
            for word in self.legal_actions()
        }

    def optimal_value(self) -> float:
        return self._mean_over_deals(_best)

    def random_value(self) -> float:
        return self._mean_over_deals(_following(UNIFORM))

    def reference_values(self) -> dict[str, float]:
        """`equilibrium`: playing the Nash strategy against this opponent."""
        return {"equilibrium": self._mean_over_deals(_following(EQUILIBRIUM))}

    def _strategy(self) -> Strategy:
        if not isinstance(self.opponent, str):
            raise UserError("values are known against 'optimal' and 'random', not a function")
        return STRATEGIES[self.opponent]

    def _mean_over_deals(self, choose: Choice) -> float:
        strategy = self._strategy()
        seats = SEATS if self.seat == "random" else (self.seat,)
        values = [
            _respond("", seat, mine, dict.fromkeys(set(CARDS) - {mine}, 0.5), strategy, choose)
            for seat in seats
            for mine in CARDS
        ]
        return sum(values) / len(values)


def payoff(history: str) -> tuple[str, int] | None:
    """At the end of a hand, who wins (`showdown`, `first` or `second`) and how many chips."""
    if history.endswith("f"):
        return SEATS[len(history) % 2], 1
    return {"cc": ("showdown", 1), "bc": ("showdown", 2), "cbc": ("showdown", 2)}.get(history)


def _gain(history: str, seat: str, mine: str, theirs: str) -> float:
    """Chips that the player in `seat` wins (or loses, below 0) at the end of a hand."""
    end = payoff(history)
    assert end is not None
    winner, chips = end
    if winner == "showdown":
        return float(chips if CARDS.index(mine) > CARDS.index(theirs) else -chips)
    return float(chips if winner == seat else -chips)


def _brave(legal: tuple[str, ...]) -> str:
    return "bet" if "bet" in legal else "call"


def _meek(legal: tuple[str, ...]) -> str:
    return "check" if "check" in legal else "fold"


def _best(history: str, card: str, values: dict[str, float]) -> float:
    return max(values.values())


def _following(strategy: Strategy) -> Choice:
    """The value of playing a strategy, from the values of its actions."""

    def mean(history: str, card: str, values: dict[str, float]) -> float:
        brave, legal = strategy[history][card], LEGAL[history]
        return brave * values[_brave(legal)] + (1 - brave) * values[_meek(legal)]

    return mean


def _chance(history: str, word: str, card: str, strategy: Strategy) -> float:
    """Probability that a strategy says `word` with this card."""
    brave = strategy[history][card]
    return brave if word == _brave(LEGAL[history]) else 1 - brave


def _reach(history: str, seat: str, card: str, strategy: Strategy) -> float:
    """Probability that the player who is not in `seat` speaks as in `history`, holding `card`."""
    chance = 1.0
    for i, letter in enumerate(history):
        if SEATS[i % 2] != seat:
            (word,) = (word for word in LEGAL[history[:i]] if word[0] == letter)
            chance *= _chance(history[:i], word, card, strategy)
    return chance


def _respond(
    history: str,
    seat: str,
    mine: str,
    weights: dict[str, float],
    strategy: Strategy,
    choose: Choice,
) -> float:
    """Chips to come, summed over the opponent's possible cards with these weights.

    The agent's choice may depend on its card and the history only, so it is made for the weighted
    sum, not card by card: with `_best` this is the exact best response.
    """
    if payoff(history) is not None:
        return sum(w * _gain(history, seat, mine, card) for card, w in weights.items())
    values = {}
    mine_to_speak = SEATS[len(history) % 2] == seat
    for word in LEGAL[history]:
        after = weights
        if not mine_to_speak:
            after = {c: w * _chance(history, word, c, strategy) for c, w in weights.items()}
        values[word] = _respond(history + word[0], seat, mine, after, strategy, choose)
    return choose(history, mine, values) if mine_to_speak else sum(values.values())
