"""Tic-tac-toe against a random, a perfect or a given opponent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rlhf.envs.core import Conversation, Step, TextEnv, check_choice, plain
from rlhf.errors import UserError

Opponent = str | Callable[[Conversation], str]
LINES = (
    (0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6),
)  # fmt: skip
EMPTY = "." * 9
SEATS = ("first", "second")
CELLS = {str(i + 1): i for i in range(9)}
RULES = (
    "Tic-tac-toe on cells 1 to 9, by rows: three in a row wins (1; a draw 0, a loss -1). Answer "
    "with the number of a free cell; any other answer loses the turn, and after 9 turns it is a "
    "draw."
)
OPPONENTS = {
    "optimal": " Your opponent plays perfectly.",
    "random": " Your opponent plays at random.",
}
"""What the agent is told about the opponents whose play decides the optimum."""


class TicTacToe(TextEnv):
    """Three in a row on nine cells.

    State: the board, the seat. Observation: the opponent's move and the board. Action: a cell, 1 to
    9 by rows; an invalid one loses the turn. Reward at the end: 1 for a win, 0 for a draw, -1 for a
    loss. Optimum: expectimax against "random", minimax (0) against "optimal".

    Args:
        opponent: "optimal" (minimax, uniform among equally good moves), "random", or a function
            from the conversation as the opponent sees it to its reply: a snapshot of the agent, for
            self-play. A function's invalid reply loses its turn.
        seat: "first" (plays x), "second" (plays o), or "random" (drawn at each reset).
    """

    max_turns = 9

    items = "One game, the same in training."

    def __init__(
        self,
        opponent: Opponent = "random",
        seat: str = "random",
        *,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(opponent, str):
            check_choice("opponent", opponent, ("random", "optimal"))
        check_choice("seat", seat, (*SEATS, "random"))
        super().__init__(render_mode=render_mode)
        self.opponent, self.seat = opponent, seat
        self.system_prompt = RULES + (OPPONENTS[opponent] if isinstance(opponent, str) else "")
        self._begin("first")

    def _begin(self, seat: str) -> None:
        self._board, self._turns = EMPTY, 0
        self._mark, self._other = ("x", "o") if seat == "first" else ("o", "x")
        self._their_view: Conversation = [{"role": "system", "content": RULES}]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin(self.seat if self.seat != "random" else SEATS[self.np_random.integers(2)])
        text = f"You are {self._mark}."
        if self._mark == "o":
            text += f" {self._opponent_moves('You are x.')}"
        return self.opening(f"{text}\n{show(self._board)}")

    def step(self, action: str) -> Step:
        cell = CELLS.get(plain(action))
        valid = cell is not None and self._board[cell] == "."
        self._turns += 1
        heard = "Your opponent loses a turn."
        if valid and cell is not None:
            self._board = place(self._board, cell, self._mark)
            heard = f"Your opponent plays {cell + 1}."
        text = "" if finished(self._board) else self._opponent_moves(heard)
        reason = "" if valid else "not a free cell"
        done = finished(self._board) or self._turns == self.max_turns
        text = f"{text}\n{show(self._board)}".strip()
        won = result(self._board, self._mark) if done else 0.0
        return self.turn(text, won, done, success=won > 0, valid=valid, reason=reason)

    def _opponent_moves(self, heard: str) -> str:
        """Let the opponent move, having heard of the agent's move; returns what the agent hears."""
        cell = self._opponent_cell(heard)
        if cell is None:
            return "Your opponent loses a turn."
        self._board = place(self._board, cell, self._other)
        return f"Your opponent plays {cell + 1}."

    def _opponent_cell(self, heard: str) -> int | None:
        if isinstance(self.opponent, str):
            choices = replies(self._board, self._other, self.opponent)
            return choices[int(self.np_random.integers(len(choices)))]
        text = f"{heard}\n{show(self._board)}"
        self._their_view.append({"role": "user", "content": text})
        reply = self.opponent([dict(message) for message in self._their_view])
        self._their_view.append({"role": "assistant", "content": reply})
        cell = CELLS.get(plain(reply))
        return cell if cell is not None and self._board[cell] == "." else None

    def legal_actions(self) -> list[str]:
        return [str(cell + 1) for cell in free(self._board)] or list(CELLS)

    def action_values(self) -> dict[str, float]:
        opponent = self._known_opponent()
        return {
            str(cell + 1): _after_move(self._board, cell, self._mark, opponent, "best")
            for cell in free(self._board)
        }

    def optimal_value(self) -> float:
        return self._mean_over_seats("best")

    def random_value(self) -> float:
        return self._mean_over_seats("mean")

    def _known_opponent(self) -> str:
        if not isinstance(self.opponent, str):
            raise UserError("values are known against 'optimal' and 'random', not a function")
        return self.opponent

    def _mean_over_seats(self, policy: str) -> float:
        opponent = self._known_opponent()
        values = {
            "first": lambda: _value(EMPTY, "x", opponent, policy),
            "second": lambda: _opponent_value(EMPTY, "o", opponent, policy),
        }
        seats = SEATS if self.seat == "random" else (self.seat,)
        return sum(values[seat]() for seat in seats) / len(seats)


def show(board: str) -> str:
    """The board in three lines; free cells show their number."""
    shown = [str(i + 1) if mark == "." else mark for i, mark in enumerate(board)]
    return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))


def free(board: str) -> list[int]:
    """The free cells."""
    return [i for i, mark in enumerate(board) if mark == "."]


def place(board: str, cell: int, mark: str) -> str:
    """The board after a move."""
    return board[:cell] + mark + board[cell + 1 :]


def winner(board: str) -> str | None:
    """The mark that has three in a row."""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return None


def finished(board: str) -> bool:
    """Somebody won, or the board is full."""
    return "." not in board or winner(board) is not None


def result(board: str, mark: str) -> float:
    """1 for a win of `mark`, -1 for its loss, 0 otherwise."""
    won = winner(board)
    return 0.0 if won is None else 1.0 if won == mark else -1.0


@cache
def minimax(board: str, mark: str) -> float:
    """Value of the board for `mark`, who is to move, when both play perfectly."""
    if finished(board):
        return result(board, mark)
    other = "o" if mark == "x" else "x"
    return max(-minimax(place(board, cell, mark), other) for cell in free(board))


@cache
def replies(board: str, mark: str, opponent: str) -> tuple[int, ...]:
    """The cells among which an opponent of this kind, who is to move as `mark`, draws uniformly."""
    if opponent == "random":
        return tuple(free(board))
    other = "o" if mark == "x" else "x"
    scores = {cell: -minimax(place(board, cell, mark), other) for cell in free(board)}
    return tuple(cell for cell, score in scores.items() if score == max(scores.values()))


def _after_move(board: str, cell: int, mark: str, opponent: str, policy: str) -> float:
    return _opponent_value(place(board, cell, mark), mark, opponent, policy)


@cache
def _value(board: str, mark: str, opponent: str, policy: str) -> float:
    """The agent's value when it is to move; `policy` "best" maximises, "mean" plays uniformly."""
    if finished(board):
        return result(board, mark)
    values = [_after_move(board, cell, mark, opponent, policy) for cell in free(board)]
    return max(values) if policy == "best" else sum(values) / len(values)


@cache
def _opponent_value(board: str, mark: str, opponent: str, policy: str) -> float:
    """The agent's value when the opponent is to move."""
    if finished(board):
        return result(board, mark)
    other = "o" if mark == "x" else "x"
    cells = replies(board, other, opponent)
    return sum(_value(place(board, c, other), mark, opponent, policy) for c in cells) / len(cells)
