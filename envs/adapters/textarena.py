"""Adapter for TextArena: single-player and multiplayer games (extra `textarena`)."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlhf.common.conversation import Conversation
from rlhf.envs.adapters import PrivateGenerators, check_task_is_offered, import_from_extra
from rlhf.envs.core import Step, TextEnv, check_range
from rlhf.envs.two_player import Opponent, append_opponent_reply
from rlhf.errors import UserError

_ONE_PLAYER = """2048 Bandit Blackjack Countdown Crosswords Cryptarithm FifteenPuzzle FrozenLake
    GuessTheNumber LightsOut LogicPuzzle Mastermind Minesweeper PegJump Secretary Set
    Slitherlink Sokoban Sudoku ThreeCardMonte TowerOfHanoi"""
_TWO_PLAYERS = """Alquerque Battleship Breakthrough Briscola Chopsticks ColonelBlotto ConnectFour
    Crusade GameOfPureStrategy GermanWhist Golf HighSociety IndianPoker IteratedMatchingPennies
    IteratedPrisonersDilemma IteratedRockPaperScissors IteratedTwoThirdsAverage
    IteratedUltimatumGame KuhnPoker LiarsDice LinesOfAction MarketEntryGame MemoryGame NewRecruit
    Nim Othello PigDice Poker QuantumTicTacToe SantoriniBaseFixed
    SimpleBlindAuction SimpleNegotiation SimpleTak Snake SpiteAndMalice Stratego Surround Tak
    TicTacToe TruthAndDeception TwoDollar UltimateTicTacToe WildTicTacToe"""
GAMES: dict[str, int] = {
    **dict.fromkeys(_ONE_PLAYER.split(), 1),
    **dict.fromkeys(_TWO_PLAYERS.split(), 2),
    **{"ThreePlayerGOPS": 3, "ThreePlayerIPD": 3, "ThreePlayerTicTacToe": 3},
    **{"SettlersOfCatan": 4, "Taboo": 4, "SecretMafia": 6},
}
"""Available game -> number of players."""

_DOWNLOADS = "downloads word lists when it starts"
_PAID_SERVICE = "calls a paid service"
_MISSING_FILES = "needs files that its package does not contain"
_SYNTAX_ERROR = "is not valid Python 3.11"
NOT_OFFERED: dict[str, str] = {
    **dict.fromkeys(("Hangman", "Wordle", "WordLadder", "WordSearch", "WordChains"), _DOWNLOADS),
    **dict.fromkeys(("SpellingBee", "LetterAuction", "DontSayIt", "Codenames"), _DOWNLOADS),
    **dict.fromkeys(("GuessWho", "TwentyQuestions", "Debate", "ScenarioPlanning"), _PAID_SERVICE),
    **dict.fromkeys(("UsedCar", "UsedCarNegotiation", "ScorableGames"), _MISSING_FILES),
    **dict.fromkeys(("Checkers", "Chess", "IteratedStagHunt", "Klondike"), _SYNTAX_ERROR),
    **dict.fromkeys(("ReverseTicTacToe", "UltimateTexasHoldem"), _SYNTAX_ERROR),
    "RushHour": "may search for minutes for a puzzle",
    "PublicGoodsGame": "can give one player turns without end",
    "CharacterConclave": "is talk without moves, decided by votes among the players",
}
"""Game that is not offered -> reason (textarena 0.7)."""

_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")
_MAX_OPPONENT_MOVES = 100
_MAX_DEALS = 20
LOSS = -1.0
"""Reward for losing a multiplayer game."""


def games() -> list[str]:
    """Return the names of the available games."""
    import_from_extra("textarena", "textarena")
    return sorted(GAMES)


class TextArena(TextEnv):
    """Play one game of TextArena as one of its players.

    State: the state of the game, and the agent's seat, which is drawn at reset. Observation: the
    game's messages to the agent since its last move. Action: a move, usually in square brackets.
    Reward: 0.0 until the game ends, then the game's reward for the agent (usually 1 for a win, 0
    for a draw, -1 for a loss; in single-player games a fraction in [0, 1]). Success: a reward of
    at least 1. If the game raises an exception, or a multiplayer game returns no reward, the reward
    is -1.0, so that causing an error is never better than losing the game. A game that is not over
    after `max_turns` moves ends without reward.

    TextArena draws from the global random generators. The adapter replaces their state during calls
    of the game, so that episodes are reproducible and do not change the global state.

    Args:
        game: A name from `games()`, with or without a variant, such as `Nim-v0-large`.
        opponent: "random" (plays a random word in square brackets from its observation), or a
            function from the opponent's conversation to its move.
        max_turns: Maximum number of moves in an episode.

    Raises:
        UserError: The game is unknown or not offered, or another argument is invalid.
    """

    best_score = None
    system_prompt = "You play a game. Answer with your move in the form that the game asks for."
    items = "A deal of one game; each episode has a new seed, but small games repeat."

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
        super().__init__(max_turns=max_turns, render_mode=render_mode)
        self.game, self.opponent = game, opponent
        self._id, self._players = _id_and_num_players(game)
        self._library = import_from_extra("textarena", "textarena")
        if self._id not in self._library.envs.registration.ENV_REGISTRY:
            raise UserError(f"textarena has no game {game!r} ({self._id} is not registered)")
        self._generators = PrivateGenerators()
        self._game: Any = None
        self._seat, self._text = 0, ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._generators.seed(int(self.np_random.integers(2**31)))
        # Opponents that move first may end the game before the agent's first move. In this case,
        # a new game is drawn.
        for _ in range(_MAX_DEALS):
            self._seat = int(self.np_random.integers(self._players))
            self._opponent_conversations: dict[int, Conversation] = {}
            with self._isolated_library_calls():
                self._game = self._library.make(self._id)
                deal = int(self.np_random.integers(2**31))
                self._game.reset(num_players=self._players, seed=deal)
                self._text, ended = self._play_opponents()
            if not ended:
                return self.opening(self._text, seat=self._seat)
        raise RuntimeError(f"{self.game}: {_MAX_DEALS} games ended before the agent's first move")

    def step(self, action: str) -> Step:
        self.turns_left -= 1
        with self._isolated_library_calls():
            try:
                done, _ = self._game.step(action)
                self._text, ended = ("", True) if done else self._play_opponents()
            except Exception as error:
                # Third-party games raise many types of errors on malformed moves.
                reason = f"the game raised {type(error).__name__}"
                return self._step_result(LOSS, True, valid=False, reason=reason)
            if not ended:
                invalid = "attempted an invalid move" in self._text
                reason = "the game calls it invalid" if invalid else ""
                return self._step_result(0.0, False, valid=not invalid, reason=reason)
            rewards, outcome = self._game.close()
        result = outcome.get(self._seat, {})
        invalid, reason = bool(result.get("invalid_move", False)), str(result.get("reason", ""))
        self._text = reason
        reward = _reward_of(rewards, self._seat, self._players)
        return self._step_result(reward, True, valid=not invalid, reason=reason)

    def _step_result(self, reward: float, done: bool, **info: Any) -> Step:
        return self.turn(self._text, reward, done, success=reward >= 1.0, seat=self._seat, **info)

    def _play_opponents(self) -> tuple[str, bool]:
        """Make the opponents' moves until it is the agent's turn.

        Returns:
            The agent's observation, and whether the game has ended. A game in which the opponents
            make `_MAX_OPPONENT_MOVES` consecutive moves counts as ended.
        """
        for _ in range(_MAX_OPPONENT_MOVES):
            player, messages = self._game.get_observation()
            text = "\n".join(_message_text(message) for message in messages if message[0] != player)
            if player == self._seat:
                return text, False
            done, _ = self._game.step(self._opponent_move(player, text))
            if done:
                return "", True
        return "", True

    def _opponent_move(self, player: int, text: str) -> str:
        if isinstance(self.opponent, str):
            return _random_bracketed_word(text, self.np_random)
        start: Conversation = [{"role": "system", "content": str(self.system_prompt)}]
        conversation = self._opponent_conversations.setdefault(player, start)
        return append_opponent_reply(self.opponent, conversation, text)

    @contextmanager
    def _isolated_library_calls(self) -> Iterator[None]:
        """Return a context manager that calls a game with private generators and without output."""
        with self._generators.active(), contextlib.redirect_stdout(io.StringIO()):
            yield

    def sample_action(self, rng: np.random.Generator) -> str:
        """Draw a bracketed word from the last observation, because games do not list legal
        moves."""
        return _random_bracketed_word(self._text, rng)


def _id_and_num_players(game: str) -> tuple[str, int]:
    """Return TextArena's id of the game and the number of players.

    The id ends with `-raw`, which selects the game without observation wrappers.
    """
    name, version, variant = game.partition("-v0")
    check_task_is_offered(name, GAMES, NOT_OFFERED, "textarena has no game", "games()")
    return f"{name}{version or '-v0'}{variant.removesuffix('-raw')}-raw", GAMES[name]


def _message_text(message: Any) -> str:
    """Format a message with its sender; messages from the game have no sender."""
    sender, text = message[0], str(message[1]).strip()
    return text if sender == -1 else f"Player {sender}: {text}"


def _random_bracketed_word(text: str, rng: np.random.Generator) -> str:
    """Draw one of the bracketed words in a text; "[0]" if there is none."""
    moves = _MOVE.findall(text)
    return moves[int(rng.integers(len(moves)))] if moves else "[0]"


def _reward_of(rewards: Any, seat: int, num_players: int) -> float:
    """Return the reward of the player in `seat`.

    Some games return an error message instead of rewards. The reward is then 0.0 in a single-player
    game and -1.0 in a multiplayer game.
    """
    reward = rewards.get(seat) if isinstance(rewards, dict) else None
    if isinstance(reward, int | float) and math.isfinite(reward):
        return float(reward)
    return 0.0 if num_players == 1 else LOSS
