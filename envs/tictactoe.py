"""Tic-tac-toe against a random opponent, an optimal opponent or a function."""

from __future__ import annotations

from functools import cache

from rlhf.envs.core import Step, normalized
from rlhf.envs.two_player import Opponent, TwoPlayerEnv, append_opponent_reply

WINNING_LINES = (
    (0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6),
)  # fmt: skip
EMPTY = "." * 9
OTHER_MARK = {"x": "o", "o": "x"}
"""Mark of a player -> mark of the other player."""
CELL_BY_NUMBER = {str(i + 1): i for i in range(9)}
RULES = (
    "Tic-tac-toe on cells 1 to 9, by rows: three in a row wins (1; a draw 0, a loss -1). Answer "
    "with the number of a free cell; any other answer loses the turn, and after 9 turns it is a "
    "draw."
)


class TicTacToe(TwoPlayerEnv):
    """Play tic-tac-toe against an opponent.

    State: the board and the seat. Observation: the opponent's move and the board. Action: the
    number of a cell, 1 to 9 by rows; an invalid action loses the turn. Reward at the end: 1 for a
    win, 0 for a draw, -1 for a loss. Optimum: against "random", the expectimax value; against
    "optimal", the minimax value, which is 0.

    Args:
        opponent: "optimal" (minimax, uniform among equally good moves), "random", or a function
            from the opponent's conversation to its reply, such as a snapshot of the agent for
            self-play. If a reply of the function is invalid, the opponent loses its turn.
        seat: "first" (plays x), "second" (plays o), or "random" (drawn at each reset).
    """

    max_turns = 9
    items = "A single game; training and evaluation use the same one."
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
        self._begin_episode("first")

    def _begin_episode(self, seat: str) -> None:
        """Start an episode with an empty board; the agent has this seat."""
        self._board = EMPTY
        self._mark = "x" if seat == "first" else "o"
        self._restart_opponent_conversation()

    def start(self) -> str:
        self._begin_episode(self._draw_seat())
        text = f"You are {self._mark}."
        if self._mark == "o":
            text += f" {self._play_opponent_move('You are x.')}"
        return f"{text}\n{board_text(self._board)}"

    def step(self, action: str) -> Step:
        cell = self._free_cell(action)
        self.turns_left -= 1
        message = "Your opponent loses a turn."
        if cell is not None:
            self._board = with_mark(self._board, cell, self._mark)
            message = f"Your opponent plays {cell + 1}."
        text = "" if is_finished(self._board) else self._play_opponent_move(message)
        done = is_finished(self._board) or self.turns_left == 0
        text = f"{text}\n{board_text(self._board)}".strip()
        won = result_for_mark(self._board, self._mark) if done else 0.0
        valid, reason = (True, "") if cell is not None else (False, "not a free cell")
        return self.turn(text, won, done, success=won > 0, valid=valid, reason=reason)

    def _free_cell(self, reply: str) -> int | None:
        """Return the index of the free cell whose number is the reply, or None."""
        cell = CELL_BY_NUMBER.get(normalized(reply))
        return cell if cell is not None and self._board[cell] == "." else None

    def _play_opponent_move(self, message: str) -> str:
        """Make the opponent's move and return its description for the agent.

        `message` describes the agent's move to an opponent that is a function.
        """
        cell = self._choose_opponent_cell(message)
        if cell is None:
            return "Your opponent loses a turn."
        self._board = with_mark(self._board, cell, OTHER_MARK[self._mark])
        return f"Your opponent plays {cell + 1}."

    def _choose_opponent_cell(self, message: str) -> int | None:
        """Choose the opponent's cell; return None if the opponent function's reply is invalid."""
        if isinstance(self.opponent, str):
            choices = opponent_candidate_cells(self._board, OTHER_MARK[self._mark], self.opponent)
            return choices[int(self.np_random.integers(len(choices)))]
        text = f"{message}\n{board_text(self._board)}"
        return self._free_cell(append_opponent_reply(self.opponent, self._opponent_view, text))

    def legal_actions(self) -> list[str]:
        return [str(cell + 1) for cell in free_cells(self._board)] or list(CELL_BY_NUMBER)

    def action_values(self) -> dict[str, float]:
        opponent, mark = self._require_built_in_opponent(), self._mark
        after = {cell: with_mark(self._board, cell, mark) for cell in free_cells(self._board)}
        return {
            str(cell + 1): _expected_result(board, OTHER_MARK[mark], mark, opponent, "best")
            for cell, board in after.items()
        }

    def optimal_value(self) -> float:
        return self._mean_result_over_seats("best")

    def random_value(self) -> float:
        return self._mean_result_over_seats("mean")

    def _mean_result_over_seats(self, agent_policy: str) -> float:
        """Return the mean of `_expected_result` of the empty board over the possible seats."""
        opponent, seats = self._require_built_in_opponent(), self._possible_agent_seats
        marks = ["x" if seat == "first" else "o" for seat in seats]
        return sum(
            _expected_result(EMPTY, "x", mark, opponent, agent_policy) for mark in marks
        ) / len(seats)


def board_text(board: str) -> str:
    """Format the board as three lines; a free cell is shown as its number."""
    shown = [str(i + 1) if mark == "." else mark for i, mark in enumerate(board)]
    return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))


def free_cells(board: str) -> list[int]:
    """List the indices of the free cells, 0 to 8."""
    return [i for i, mark in enumerate(board) if mark == "."]


def with_mark(board: str, cell: int, mark: str) -> str:
    """Return the board after a player with this mark moves to `cell`."""
    return board[:cell] + mark + board[cell + 1 :]


def winning_mark(board: str) -> str | None:
    """Return the mark that has three in a row, or None."""
    for a, b, c in WINNING_LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return None


def is_finished(board: str) -> bool:
    """Return whether a player has won or the board is full."""
    return "." not in board or winning_mark(board) is not None


def result_for_mark(board: str, mark: str) -> float:
    """Return 1.0 if the player with `mark` has won, -1.0 if that player has lost, else 0.0."""
    won = winning_mark(board)
    return 0.0 if won is None else 1.0 if won == mark else -1.0


@cache
def opponent_candidate_cells(board: str, opponent_mark: str, opponent: str) -> tuple[int, ...]:
    """Return the cells among which a built-in opponent with this mark chooses uniformly."""
    cells, other = free_cells(board), OTHER_MARK[opponent_mark]
    if opponent == "random":
        return tuple(cells)
    # With opponent="optimal", `_expected_result` assumes optimal play by both players, so it is the
    # minimax value.
    losses = {
        cell: _expected_result(with_mark(board, cell, opponent_mark), other, other, opponent)
        for cell in cells
    }
    return tuple(cell for cell, loss in losses.items() if loss == min(losses.values()))


@cache
def _expected_result(
    board: str, mover: str, agent_mark: str, opponent: str, agent_policy: str = "best"
) -> float:
    """Return the agent's expected result from a board.

    Args:
        board: Nine characters: x, o or a period.
        mover: Mark of the player that moves next.
        agent_mark: Mark of the agent.
        opponent: "optimal" or "random".
        agent_policy: "best" if the agent plays optimally, "mean" if it plays uniformly at random.
    """
    if is_finished(board):
        return result_for_mark(board, agent_mark)
    cells = (
        free_cells(board)
        if mover == agent_mark
        else opponent_candidate_cells(board, mover, opponent)
    )
    boards = [with_mark(board, cell, mover) for cell in cells]
    values = [
        _expected_result(after, OTHER_MARK[mover], agent_mark, opponent, agent_policy)
        for after in boards
    ]
    return (
        max(values) if mover == agent_mark and agent_policy == "best" else sum(values) / len(values)
    )
