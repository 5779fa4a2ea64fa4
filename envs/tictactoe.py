"""Tic-tac-toe against a random opponent, a perfect one or a function."""

from __future__ import annotations

from functools import cache

from rlhf.envs.core import Step, normalized
from rlhf.envs.two_player import SEATS, Opponent, TwoPlayerEnv

LINES = (
    (0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6),
)  # fmt: skip
EMPTY = "." * 9
CELLS = {str(i + 1): i for i in range(9)}
RULES = (
    "Tic-tac-toe on cells 1 to 9, by rows: three in a row wins (1; a draw 0, a loss -1). Answer "
    "with the number of a free cell; any other answer loses the turn, and after 9 turns it is a "
    "draw."
)


class TicTacToe(TwoPlayerEnv):
    """Three in a row on nine cells.

    State: the board and the seat. Observation: the opponent's move and the board. Action: a cell, 1
    to 9 by rows; an invalid action loses the turn. Reward at the end: 1 for a win, 0 for a draw, -1
    for a loss. Optimum: expectimax against "random", minimax (0) against "optimal".

    Args:
        opponent: "optimal" (minimax, uniform among equally good moves), "random", or a function
            from the opponent's conversation to its reply, such as a snapshot of the agent for
            self-play. An invalid reply of a function loses its turn.
        seat: "first" (plays x), "second" (plays o), or "random" (drawn at each reset).
    """

    max_turns = 9
    items = "One game, the same in training."
    rules = RULES
    opponents = {  # noqa: RUF012
        "optimal": " Your opponent plays perfectly.",
        "random": " Your opponent plays at random.",
    }

    def __init__(
        self,
        opponent: Opponent = "random",
        seat: str = "random",
        *,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(opponent, seat, render_mode=render_mode)
        self._begin("first")

    def _begin(self, seat: str) -> None:
        self._board = EMPTY
        self._mark, self._other = ("x", "o") if seat == "first" else ("o", "x")
        self._clear_opponent_view()

    def start(self) -> str:
        self._begin(self._draw_seat())
        text = f"You are {self._mark}."
        if self._mark == "o":
            text += f" {self._opponent_moves('You are x.')}"
        return f"{text}\n{show(self._board)}"

    def step(self, action: str) -> Step:
        cell = CELLS.get(normalized(action))
        valid = cell is not None and self._board[cell] == "."
        self.turns_left -= 1
        message = "Your opponent loses a turn."
        if valid and cell is not None:
            self._board = place(self._board, cell, self._mark)
            message = f"Your opponent plays {cell + 1}."
        text = "" if finished(self._board) else self._opponent_moves(message)
        reason = "" if valid else "not a free cell"
        done = finished(self._board) or self.turns_left == 0
        text = f"{text}\n{show(self._board)}".strip()
        won = result(self._board, self._mark) if done else 0.0
        return self.turn(text, won, done, success=won > 0, valid=valid, reason=reason)

    def _opponent_moves(self, message: str) -> str:
        """Make the opponent's move and return the observation of it.

        `message` informs the opponent of the agent's move.
        """
        cell = self._opponent_cell(message)
        if cell is None:
            return "Your opponent loses a turn."
        self._board = place(self._board, cell, self._other)
        return f"Your opponent plays {cell + 1}."

    def _opponent_cell(self, message: str) -> int | None:
        if isinstance(self.opponent, str):
            choices = replies(self._board, self._other, self.opponent)
            return choices[int(self.np_random.integers(len(choices)))]
        reply = self._ask_opponent(f"{message}\n{show(self._board)}")
        cell = CELLS.get(normalized(reply))
        return cell if cell is not None and self._board[cell] == "." else None

    def legal_actions(self) -> list[str]:
        return [str(cell + 1) for cell in free(self._board)] or list(CELLS)

    def action_values(self) -> dict[str, float]:
        opponent = self._built_in_opponent()
        return {
            str(cell + 1): _after_move(self._board, cell, self._mark, opponent, "best")
            for cell in free(self._board)
        }

    def optimal_value(self) -> float:
        return self._mean_over_seats("best")

    def random_value(self) -> float:
        return self._mean_over_seats("mean")

    def _mean_over_seats(self, policy: str) -> float:
        opponent = self._built_in_opponent()
        values = {
            "first": lambda: _value(EMPTY, "x", opponent, policy),
            "second": lambda: _opponent_value(EMPTY, "o", opponent, policy),
        }
        seats = SEATS if self.seat == "random" else (self.seat,)
        return sum(values[seat]() for seat in seats) / len(seats)


def show(board: str) -> str:
    """The board as three lines; free cells show their number."""
    shown = [str(i + 1) if mark == "." else mark for i, mark in enumerate(board)]
    return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))


def free(board: str) -> list[int]:
    """The free cells."""
    return [i for i, mark in enumerate(board) if mark == "."]


def place(board: str, cell: int, mark: str) -> str:
    """The board after a move."""
    return board[:cell] + mark + board[cell + 1 :]


def winner(board: str) -> str | None:
    """The mark that has three in a row, or None."""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return None


def finished(board: str) -> bool:
    """Whether a player has won or the board is full."""
    return "." not in board or winner(board) is not None


def result(board: str, mark: str) -> float:
    """1 for a win of `mark`, -1 for its loss, 0 otherwise."""
    won = winner(board)
    return 0.0 if won is None else 1.0 if won == mark else -1.0


@cache
def minimax(board: str, mark: str) -> float:
    """Value of the board for `mark`, the player to move, under perfect play by both."""
    if finished(board):
        return result(board, mark)
    other = "o" if mark == "x" else "x"
    return max(-minimax(place(board, cell, mark), other) for cell in free(board))


@cache
def replies(board: str, mark: str, opponent: str) -> tuple[int, ...]:
    """Cells from which a built-in opponent, to move as `mark`, draws uniformly."""
    if opponent == "random":
        return tuple(free(board))
    other = "o" if mark == "x" else "x"
    scores = {cell: -minimax(place(board, cell, mark), other) for cell in free(board)}
    return tuple(cell for cell, score in scores.items() if score == max(scores.values()))


def _after_move(board: str, cell: int, mark: str, opponent: str, policy: str) -> float:
    return _opponent_value(place(board, cell, mark), mark, opponent, policy)


@cache
def _value(board: str, mark: str, opponent: str, policy: str) -> float:
    """The agent's value when it is to move; `policy` "best" maximizes, "mean" plays uniformly."""
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
