"""Echo, the simplest task: repeat a word. Every algorithm must make progress on it."""

from __future__ import annotations

from rlhf.envs.core import Step, TextEnv, check_range

WORDS = (
    "apple", "river", "stone", "cloud", "piano", "tiger", "lemon", "ocean",
    "candle", "garden", "window", "rocket", "silver", "bridge", "forest", "puzzle",
)  # fmt: skip


class Echo(TextEnv):
    """Repeat the word in the observation, in a single turn.

    State: the word. Observation: "Repeat: " and the word. Action: a word. Reward: 1.0 if the reply,
    without surrounding white space, equals the word, else 0.0. This task is a text version of the
    identity environment that reinforcement-learning libraries use in their tests.

    Args:
        num_words: Number of different words (difficulty).
    """

    system_prompt = "Repeat the word you are given, and nothing else."
    items = "Words from a fixed list, all of which also occur in training."

    def __init__(self, num_words: int = 16, *, render_mode: str | None = None) -> None:
        check_range("num_words", num_words, 2, len(WORDS))
        super().__init__(render_mode=render_mode)
        self.words = WORDS[:num_words]
        self._word = self.words[0]

    def start(self) -> str:
        self._word = self.words[int(self.np_random.integers(len(self.words)))]
        return f"Repeat: {self._word}"

    def step(self, action: str) -> Step:
        reply = action.strip()
        success = reply == self._word
        valid = reply in self.words
        reason = "" if valid else "not one of the words"
        return self.turn("", float(success), True, success=success, valid=valid, reason=reason)

    def legal_actions(self) -> list[str]:
        return list(self.words)

    def action_values(self) -> dict[str, float]:
        return {word: float(word == self._word) for word in self.words}

    def optimal_value(self) -> float:
        return 1.0

    def random_value(self) -> float:
        return 1.0 / len(self.words)

    @staticmethod
    def tokenizer_texts() -> list[str]:
        """Return every prompt and reply, for training a tokenizer."""
        return [str(Echo.system_prompt), *(f"Repeat: {word}" for word in WORDS), *WORDS]
