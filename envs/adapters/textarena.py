"""TextArena: games for one or several players (needs the extra `textarena`)."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlhf.envs.adapters import PrivateGenerators, require
from rlhf.envs.core import Conversation, Step, TextEnv, check_range
from rlhf.errors import UserError

Opponent = str | Callable[[Conversation], str]

_SOLO = """2048 Bandit Blackjack Countdown Crosswords Cryptarithm FifteenPuzzle FrozenLake
    GuessTheNumber LightsOut LogicPuzzle Mastermind Minesweeper PegJump Secretary Set
    Slitherlink Sokoban Sudoku ThreeCardMonte TowerOfHanoi"""
_DUEL = """Alquerque Battleship Breakthrough Briscola Chopsticks ColonelBlotto ConnectFour Crusade
    GameOfPureStrategy GermanWhist Golf HighSociety IndianPoker IteratedMatchingPennies
    IteratedPrisonersDilemma IteratedRockPaperScissors IteratedTwoThirdsAverage
    IteratedUltimatumGame KuhnPoker LiarsDice LinesOfAction MarketEntryGame MemoryGame NewRecruit
    Nim Othello PigDice Poker QuantumTicTacToe SantoriniBaseFixed
    SimpleBlindAuction SimpleNegotiation SimpleTak Snake SpiteAndMalice Stratego Surround Tak
    TicTacToe TruthAndDeception TwoDollar UltimateTicTacToe WildTicTacToe"""
GAMES: dict[str, int] = {
    **dict.fromkeys(_SOLO.split(), 1),
    **dict.fromkeys(_DUEL.split(), 2),
    **{"ThreePlayerGOPS": 3, "ThreePlayerIPD": 3, "ThreePlayerTicTacToe": 3},
    **{"SettlersOfCatan": 4, "Taboo": 4, "SecretMafia": 6},
}
"""Games on offer, and how many play."""

_WORDS = "downloads word lists when it starts"
_KEY = "asks a paid service for its replies"
_FILES = "needs files that its package leaves out"
_SYNTAX = "is not valid Python 3.11"
QUARANTINE: dict[str, str] = {
    **dict.fromkeys(("Hangman", "Wordle", "WordLadder", "WordSearch", "WordChains"), _WORDS),
    **dict.fromkeys(("SpellingBee", "LetterAuction", "DontSayIt", "Codenames"), _WORDS),
    **dict.fromkeys(("GuessWho", "TwentyQuestions", "Debate", "ScenarioPlanning"), _KEY),
    **dict.fromkeys(("UsedCar", "UsedCarNegotiation", "ScorableGames"), _FILES),
    **dict.fromkeys(("Checkers", "Chess", "IteratedStagHunt", "Klondike"), _SYNTAX),
    **dict.fromkeys(("ReverseTicTacToe", "UltimateTexasHoldem"), _SYNTAX),
    "RushHour": "may search for minutes for a puzzle",
    "PublicGoodsGame": "can ask one player without end",
    "CharacterConclave": "is talk without moves, decided by votes among the players",
}
"""Games that are not offered, and why (textarena 0.7)."""

_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")
_MAX_OPPONENT_MOVES = 100
_MAX_DEALS = 20


LOSS = -1.0
"""What the loser of a game for several gets."""


def games() -> list[str]:
    """The names of all games on offer."""
    require("textarena", "textarena")
    return sorted(GAMES)


class TextArena(TextEnv):
    """One game of TextArena, seen by one player.

    State: the game's, and the seat, drawn at reset. Observation: what the game told this player
    since its last move. Action: a move, mostly in square brackets. Reward: 0.0 until the game ends,
    then what the game gives this player (as a rule 1 for a win, 0 for a draw, -1 for a loss; a
    share in [0, 1] in games for one). Success: 1 or more. A game that raises on a move ends with
    reward -1.0, as does a game for several that names no reward: to break a game is not better
    than to lose it. A game that takes longer than `max_turns` moves ends without reward.

    TextArena draws from the global generators; they are lent to it while it runs, so that episodes
    are reproducible and do not disturb each other, nor the user.

    Args:
        game: A name from `games()`, or one with its variant, such as `Nim-v0-large`.
        opponent: "random" (one of the bracketed words it was shown), or a function from the
            conversation as that player sees it to its move.
        max_turns: The longest episode.

    Raises:
        UserError: an unknown or quarantined game.
    """

    best_score = None
    system_prompt = "You play a game. Answer with your move in the form that the game asks for."

    items = "A deal of one game; deals have seeds of their own, small games repeat."

    def __init__(
        self,
        game: str = "TicTacToe",
        *,
        opponent: Opponent = "random",
        max_turns: int = 50,
        render_mode: str | None = None,
    ) -> None:
        check_range("max_turns", max_turns, 1, 10_000)
        if isinstance(opponent, str) and opponent != "random":
            raise UserError(f"opponent must be 'random' or a function, got {opponent!r}")
        super().__init__(render_mode=render_mode)
        self.game, self.opponent, self.max_turns = game, opponent, max_turns
        self._id, self._players = _find(game)
        self._library = require("textarena", "textarena")
        if self._id not in self._library.envs.registration.ENV_REGISTRY:
            raise UserError(f"textarena has no game {game!r} ({self._id} is not registered)")
        self._generators = PrivateGenerators()
        self._game: Any = None
        self._seat, self._turns, self._text = 0, 0, ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._generators.seed(int(self.np_random.integers(2**31)))
        self._turns = 0
        # Opponents that move first may end a game by themselves; then there is nothing to play.
        for _ in range(_MAX_DEALS):
            self._seat = int(self.np_random.integers(self._players))
            self._views: dict[int, Conversation] = {}
            with self._running():
                self._game = self._library.make(self._id)
                deal = int(self.np_random.integers(2**31))
                self._game.reset(num_players=self._players, seed=deal)
                self._text, ended = self._until_my_turn()
            if not ended:
                return self.opening(self._text, seat=self._seat)
        raise RuntimeError(f"{self.game}: {_MAX_DEALS} games ended before the agent's first move")

    def step(self, action: str) -> Step:
        self._turns += 1
        with self._running():
            try:
                done, _ = self._game.step(action)
                self._text, ended = ("", True) if done else self._until_my_turn()
            except Exception as error:
                # Foreign games raise all sorts of errors on odd moves.
                reason = f"the game raised {type(error).__name__}"
                return self._turn(LOSS, True, valid=False, reason=reason)
            if not ended:
                invalid = "attempted an invalid move" in self._text
                reason = "the game calls it invalid" if invalid else ""
                last = self._turns == self.max_turns
                return self._turn(0.0, last, valid=not invalid, reason=reason)
            rewards, outcome = self._game.close()
        mine = outcome.get(self._seat, {})
        invalid, reason = bool(mine.get("invalid_move", False)), str(mine.get("reason", ""))
        self._text = reason
        return self._turn(
            _number(rewards, self._seat, self._players), True, valid=not invalid, reason=reason
        )

    def _turn(self, reward: float, done: bool, **info: Any) -> Step:
        return self.turn(
            self._text, reward, done, success=done and reward >= 1.0, seat=self._seat, **info
        )

    def _until_my_turn(self) -> tuple[str, bool]:
        """Let the others move; returns what this player is told, and whether the game ended."""
        for _ in range(_MAX_OPPONENT_MOVES):
            player, messages = self._game.get_observation()
            text = "\n".join(_line(message) for message in messages if message[0] != player)
            if player == self._seat:
                return text, False
            done, _ = self._game.step(self._opponent_move(player, text))
            if done:
                return "", True
        return "", True

    def _opponent_move(self, player: int, text: str) -> str:
        if isinstance(self.opponent, str):
            return _some_move(text, self.np_random)
        start: Conversation = [{"role": "system", "content": str(self.system_prompt)}]
        view = self._views.setdefault(player, start)
        view.append({"role": "user", "content": text})
        move = self.opponent([dict(message) for message in view])
        view.append({"role": "assistant", "content": move})
        return move

    @contextmanager
    def _running(self) -> Iterator[None]:
        """While the game runs: its own generators, and nothing printed (some games do)."""
        with self._generators.active(), contextlib.redirect_stdout(io.StringIO()):
            yield

    def sample_action(self, rng: np.random.Generator) -> str:
        """One of the bracketed words last shown: rules do not list legal moves in general."""
        return _some_move(self._text, rng)


def _find(game: str) -> tuple[str, int]:
    """TextArena's id of the plain (unwrapped) game, and how many play."""
    name, version, variant = game.partition("-v0")
    if name in QUARANTINE:
        raise UserError(f"{name} is not offered: it {QUARANTINE[name]}")
    if name not in GAMES:
        near = ", ".join(difflib.get_close_matches(name, GAMES)) or "see games()"
        raise UserError(f"textarena has no game {name!r}; did you mean {near}?")
    return f"{name}{version or '-v0'}{variant.removesuffix('-raw')}-raw", GAMES[name]


def _line(message: Any) -> str:
    """A message with its sender: the game speaks without a name."""
    sender, text = message[0], str(message[1]).strip()
    return text if sender == -1 else f"Player {sender}: {text}"


def _some_move(text: str, rng: np.random.Generator) -> str:
    moves = _MOVE.findall(text)
    return moves[int(rng.integers(len(moves)))] if moves else "[0]"


def _number(rewards: Any, seat: int, players: int) -> float:
    """This player's reward; some games put an error message in its place, which is no share of a
    game for one, and a loss among several."""
    reward = rewards.get(seat) if isinstance(rewards, dict) else None
    if isinstance(reward, int | float) and math.isfinite(reward):
        return float(reward)
    return 0.0 if players == 1 else LOSS
