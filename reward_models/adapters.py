"""Doors in and out: plain functions become rewards, rewards become TRL reward functions.

Every :class:`~rlhf.reward_models.core.Reward` is itself the plain callable that an environment
wrapper takes (``reward(conversations) -> [float | None]``), so that direction needs no adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Reward, Score, Scores, describe, with_facts

PlainReward = Callable[[list[Conversation]], Sequence[Score]]


class FunctionReward(Reward):
    """Somebody's own function: list of conversations -> one float or None per conversation.

    A function that crashes on a batch is asked again one conversation at a time, so that a single
    bad text costs one score; each crash is a None counted under its error, with the file and line
    that raised it. This is the one place
    where every exception is caught, because the code is not ours and a run of hours hangs on it.
    """

    def __init__(self, function: PlainReward, *, name: str | None = None):
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        batch = list(conversations)
        if not batch:
            return Scores([], {self.name: []})
        values, crash = self._attempt(batch)
        if crash is None:
            return Scores(values, {self.name: values}, reasons=self._of_none(values))
        singles = [self._attempt([conversation]) for conversation in batch]
        values = [None if crash else single[0] for single, crash in singles]
        crashes = [crash for _, crash in singles]
        reasons = [a or b for a, b in zip(crashes, self._of_none(values), strict=True)]
        counts = Counter(crash for crash in crashes if crash)
        return Scores(values, {self.name: values}, counts, reasons)

    def _of_none(self, values: Sequence[Score]) -> list[str | None]:
        return [f"{self.name}: returned None" if value is None else None for value in values]

    def _attempt(self, batch: list[Conversation]) -> tuple[list[Score], str | None]:
        try:
            values = [None if v is None else float(v) for v in self.function(batch)]
        except Exception as error:
            return [], f"{self.name}: {describe(error)}"
        if len(values) != len(batch):
            raise UserError(
                f"reward function {self.name!r} returned {len(values)} scores "
                f"for {len(batch)} conversations"
            )
        return values, None


def as_reward(reward: Reward | PlainReward, *, name: str | None = None) -> Reward:
    """``reward`` itself, or a plain function wrapped as a :class:`FunctionReward`."""
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        return FunctionReward(reward, name=name)
    raise UserError(
        f"a reward is a Reward or a function of conversations, got {type(reward).__name__}"
    )


def as_trl(reward: Reward) -> Callable[..., list[Score]]:
    """``reward`` as a TRL reward function ``(prompts, completions, **columns)``.

    Text, numbers and lists of them in the data set's other columns (``answer``, ...) travel as
    facts on the first message. TRL names its metrics after ``__name__`` and leaves rows whose
    reward is None out.
    """

    def trl_reward(prompts: list, completions: list, **columns: Any) -> list[Score]:
        conversations = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            conversation = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
            conversations.append(with_facts(conversation, _row_facts(columns, i, len(prompts))))
        return reward(conversations)

    trl_reward.__name__ = reward.name
    return trl_reward


def _messages(text: str | Conversation, role: str) -> Conversation:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _row_facts(columns: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != rows:
            continue
        value = column[row]
        if isinstance(value, str | int | float):
            facts[name] = str(value)
        elif isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
            facts[name] = value
    return facts
