"""Word guessing as in Wordle, on a list that is short enough for an exact solution."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files

import numpy as np

from rlhf.envs.core import Step, TextEnv, check_range, normalized

ALL_CORRECT_MARKS = 242
"""The marks `ggggg` of the hidden word as a base-3 number with the digits g = 2, y = 1, - = 0."""


@cache
def word_list() -> tuple[str, ...]:
    """Return the bundled list of common five-letter words."""
    return tuple(files("rlhf.envs").joinpath("words.txt").read_text(encoding="utf-8").split())


def letter_marks(guess: str, hidden: str) -> str:
    """Mark each letter of a guess, which is as long as the hidden word, with g, y or -.

    g: the hidden word has the letter at the same position. y: it has the letter at another
    position. -: the hidden word does not have the letter. Each letter of the hidden word is matched
    at most once.
    """
    marks = ["g" if a == b else "-" for a, b in zip(guess, hidden, strict=True)]
    spare = [b for a, b in zip(guess, hidden, strict=True) if a != b]
    for i, letter in enumerate(guess):
        if marks[i] == "-" and letter in spare:
            spare.remove(letter)
            marks[i] = "y"
    return "".join(marks)


class Wordle(TextEnv):
    """Find a five-letter word from a known list in T guesses.

    State: the hidden word, uniform on the list. Observation: the guess and its marks, see
    `letter_marks`. Action: a word of the list. Reward: 1.0 for the hidden word, which ends the
    episode, else 0.0. An invalid guess uses up a turn. Optimum: the largest fraction of words that
    any strategy finds, by an exact search over the sets of words that are still possible. T is at
    most 3 because of the computational cost of this search.

    Args:
        words: Number of words: the first `words` of the list in a fixed order.
        guesses: Number of guesses, T; 1 to 3.
    """

    items = "All episodes start with the same observation; the hidden words also occur in training."

    def __init__(
        self, words: int = 100, guesses: int = 3, *, render_mode: str | None = None
    ) -> None:
        check_range("words", words, 2, len(word_list()))
        check_range("guesses", guesses, 1, 3)
        super().__init__(max_turns=guesses, render_mode=render_mode)
        # A stride that is coprime to the length permutes the alphabetical list.
        all_words = word_list()
        selected = [all_words[i * 89 % len(all_words)] for i in range(words)]
        self.words = tuple(sorted(selected))
        self._index = {word: i for i, word in enumerate(self.words)}
        self.system_prompt = (
            f"Find the hidden word with at most {guesses} guesses. Marks: g right place, y "
            f"elsewhere in the word, - absent. Answer with one of: {' '.join(self.words)}"
        )
        self._hidden, self._possible = 0, tuple(range(words))

    def start(self) -> str:
        self._hidden = int(self.np_random.integers(len(self.words)))
        self._possible = tuple(range(len(self.words)))
        return f"Guess the word. {self.turns_left} guesses left."

    def step(self, action: str) -> Step:
        guess = self._index.get(normalized(action))
        self.turns_left -= 1
        if guess is None:
            text = f"That word is not on the list. {self.turns_left} guesses left."
            return self.turn(text, 0.0, valid=False, reason="not on the list")
        if guess == self._hidden:
            return self.turn("ggggg", 1.0, True, success=True)
        row = marks_table(self.words)[guess]
        seen = row[self._hidden]
        self._possible = tuple(i for i in self._possible if row[i] == seen)
        shown = letter_marks(self.words[guess], self.words[self._hidden])
        return self.turn(f"{self.words[guess]} {shown}. {self.turns_left} guesses left.", 0.0)

    def legal_actions(self) -> list[str]:
        return list(self.words)

    def action_values(self) -> dict[str, float]:
        wins = _win_counts_by_first_guess(self.words, self._possible, self.turns_left)
        return {word: n / len(self._possible) for word, n in zip(self.words, wins, strict=True)}

    def best_action(self) -> str:
        """Return an optimal guess, preferably one that is still possible."""
        values, possible = self.action_values(), {self.words[i] for i in self._possible}
        return max(values, key=lambda word: (values[word], word in possible))

    def optimal_value(self) -> float:
        return max(
            _win_counts_by_first_guess(self.words, tuple(range(len(self.words))), self.max_turns)
        ) / len(self.words)

    def random_value(self) -> float:
        return 1.0 - (1.0 - 1.0 / len(self.words)) ** self.max_turns

    def reference_values(self) -> dict[str, float]:
        """Return the value of `consistent`, which guesses uniformly among the possible words."""
        possible = np.arange(len(self.words))
        wins = _expected_consistent_guesser_wins(marks_table(self.words), possible, self.max_turns)
        return {"consistent": wins / len(self.words)}


@cache
def marks_table(words: tuple[str, ...]) -> np.ndarray:
    """Compute the marks of each guess for each hidden word, uint8 [guess, hidden word].

    The marks are encoded as base-3 numbers, as in `ALL_CORRECT_MARKS`.
    """
    digits = {"-": 0, "y": 1, "g": 2}
    table = [
        [
            sum(digits[m] * 3**i for i, m in enumerate(letter_marks(guess, hidden)))
            for hidden in words
        ]
        for guess in words
    ]
    return np.array(table, dtype=np.uint8)


@lru_cache(maxsize=1024)
def _win_counts_by_first_guess(
    words: tuple[str, ...], possible: tuple[int, ...], guesses_left: int
) -> list[int]:
    """Return the number of possible words that are found in `guesses_left` guesses, for each first
    guess.

    The guesses after the first one are optimal.
    """
    return _win_counts_by_guess(marks_table(words), np.array(possible), guesses_left).tolist()


def _win_counts_by_guess(table: np.ndarray, possible: np.ndarray, guesses_left: int) -> np.ndarray:
    """Compute `_win_counts_by_first_guess` from the result of `marks_table`, int [first guess]."""
    if guesses_left <= 0:
        return np.zeros(len(table), dtype=int)
    marks = table[:, possible]
    if guesses_left == 1:
        return (marks == ALL_CORRECT_MARKS).sum(axis=1)
    if guesses_left == 2:
        # The last guess finds one word of each group with equal marks.
        ordered = np.sort(marks, axis=1)
        return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return np.array(
        [_win_count_after_guess(table, possible, row, guesses_left - 1) for row in marks]
    )


def _win_count_after_guess(
    table: np.ndarray, possible: np.ndarray, marks: np.ndarray, guesses_left: int
) -> int:
    """Return the number of possible words that are found by a guess and optimal later guesses.

    `marks` are the marks of the guess for each possible word; `guesses_left` is the number of later
    guesses.
    """
    wins = 0
    for seen in np.unique(marks).tolist():
        group = possible[marks == seen]
        if seen == ALL_CORRECT_MARKS or len(group) <= 2:
            # A group of one or two words needs as many guesses as it has words.
            wins += 1 if seen == ALL_CORRECT_MARKS else min(len(group), guesses_left)
        else:
            wins += int(_win_counts_by_guess(table, group, guesses_left).max())
    return wins


def _expected_consistent_guesser_wins(table: np.ndarray, possible: np.ndarray, left: int) -> float:
    """Return the expected number of possible words that are found with `left` random guesses.

    Each guess is drawn uniformly from the words that are still possible.
    """
    if left == 0:
        return 0.0
    if left == 1:
        return 1.0
    total = 0.0
    for guess in possible:
        marks = table[guess, possible]
        for seen in np.unique(marks).tolist():
            group = possible[marks == seen]
            total += (
                1.0
                if seen == ALL_CORRECT_MARKS
                else _expected_consistent_guesser_wins(table, group, left - 1)
            )
    return total / len(possible)
