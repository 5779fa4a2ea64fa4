"""Convert plain functions to rewards, and rewards to TRL reward functions."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from rlhf.common.conversation import RESERVED_KEYS, Conversation, RewardFunction, Score
from rlhf.common.foreign import describe_exception, limit_side_effects
from rlhf.common.user_code import (
    add_location_to_errors,
    check_accepts_arguments,
    definition_location_text,
    warn_if_argument_changed,
    warn_if_slow,
)
from rlhf.errors import UserError
from rlhf.reward_models.core import (
    Reward,
    Scores,
    as_messages,
    as_score,
    with_facts,
)


class FunctionReward(Reward):
    """Reward that calls a user's function, which returns a float or None for each conversation.

    If the function raises an exception for a batch, or does not return a list of scores, it is
    called again for each conversation, so that one text affects only its own score. If this fails
    again for a conversation, the score is None, and the exception is counted with its type,
    message, file and line. Exceptions are not raised to the caller, because a bug in the function
    should not end a long run.

    Args:
        function: Function from a list of conversations to a list of scores.
        name: Name of the component; by default the name of the function or of its class.

    An attribute ``outcomes`` of the function becomes that of the reward. The attribute
    ``independent = True`` declares that the score of a conversation depends only on this
    conversation. Training then calls the function in a thread while other episodes are still
    played.

    Raises:
        UserError: The function is a class, or does not accept one argument. The method `score`
            raises it if the function returns a wrong number of scores.
    """

    def __init__(self, function: RewardFunction, *, name: str | None = None):
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        if isinstance(function, type):
            raise UserError(
                f"reward {self.name!r} is a class{definition_location_text(function)}: give an "
                f"object of it, such as {function.__name__}(), or in a file the name of an object"
            )
        check_accepts_arguments(
            function,
            ([],),
            what=f"reward function {self.name!r}",
            required_signature="score(conversations), with one argument: a list of conversations",
        )
        self.outcomes = getattr(function, "outcomes", None)
        self.independent = self.waits = bool(getattr(function, "independent", False))

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        batch = list(conversations)
        if not batch:
            return Scores([], {self.name: []})
        values, error = self._call_function(batch)
        errors = [error] * len(batch)
        if error:
            singles = [self._call_function([conversation]) for conversation in batch]
            values = [value for [value], _ in singles]
            errors = [error for _, error in singles]
        counts = Counter(error for error in errors if error)
        location = definition_location_text(self.function)
        reasons = [
            error or _why_value_is_not_a_score(self.name, value, location)
            for value, error in zip(values, errors, strict=True)
        ]
        return Scores(values, {self.name: values}, counts, reasons)

    def _call_function(self, batch: list[Conversation]) -> tuple[list[Score], str | None]:
        """Call the function on a batch.

        Returns:
            The scores and None. If the function raises, None for each conversation and a
            description of the exception.

        Raises:
            UserError: The number of scores differs from the number of conversations.
        """
        what, location = f"reward function {self.name!r}", definition_location_text(self.function)
        advice = "to limit its time, set timeout in its entry of rewards"
        copied_batch = copy.deepcopy(batch)
        try:
            with (
                add_location_to_errors(self.function),
                warn_if_slow(f"{what}{location}", advice),
                limit_side_effects(),
            ):
                values = [as_score(v) for v in _require_score_list(self.function(copied_batch))]
        except Exception as error:
            return [None] * len(batch), f"{self.name}: {describe_exception(error)}"
        warn_if_argument_changed(
            batch, copied_batch, what=what, code=self.function, argument="conversations"
        )
        if len(values) != len(batch):
            raise UserError(
                f"{what}{location} returned {len(values)} scores for {len(batch)} conversations: "
                "return one number, or None, for each of them"
            )
        return values, None


def _why_value_is_not_a_score(name: str, value: Score, location: str) -> str | None:
    """Return the reason why the value of a user's function is not a score; None if it is one."""
    if value is None:
        return f"{name}: returned None{location}"
    return None if math.isfinite(value) else f"{name}: a score is not finite{location}"


def _require_score_list(values: Any) -> Iterable[Any]:
    """Return the result of a user's function.

    Raises:
        TypeError: The result is text, a mapping, a set or not iterable.
    """
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise TypeError(f"the function returned a {type(values).__name__}, not a list of scores")
    return values


def as_reward(reward: Reward | RewardFunction, *, name: str | None = None) -> Reward:
    """Convert a plain function to a :class:`FunctionReward`; return a ``Reward`` unchanged.

    Raises:
        UserError: ``reward`` is neither a function that `FunctionReward` accepts nor a ``Reward``.
    """
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        return FunctionReward(reward, name=name)
    raise UserError(
        f"a reward must be a Reward or a function of conversations, got {type(reward).__name__}"
    )


def as_trl(reward: Reward) -> Callable[..., list[Score]]:
    """Return ``reward`` as a TRL reward function ``(prompts, completions, **columns)``.

    Other columns of the dataset, such as ``answer``, become keys of the last user message of the
    prompt, like the ``reward_columns`` of a configuration. Rules read the keys of messages. TRL
    names the metrics after the function's ``__name__``, and ignores completions whose reward is
    None.
    """

    def trl_reward(prompts: list, completions: list, **columns: Any) -> list[Score]:
        conversations = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            facts = _facts_of_row(columns, i, len(prompts))
            start = with_facts(as_messages(prompt, "user"), facts)
            conversations.append([*start, *as_messages(completion, "assistant")])
        return reward(conversations)

    trl_reward.__name__ = reward.name
    return trl_reward


def _facts_of_row(columns: Mapping[str, Any], row_index: int, num_rows: int) -> dict[str, Any]:
    """Return column -> value of one row, for the keys of a message.

    Arguments of TRL that are not columns are omitted: those that are not lists of length
    ``num_rows``, values of types that JSON does not have, and the ids of the completions. Columns
    whose name is in ``RESERVED_KEYS`` are also omitted, except for the answer and the tests.
    """
    omitted = (RESERVED_KEYS - {"answer", "tests"}) | {"completion_ids"}
    return {
        name: column[row_index]
        for name, column in columns.items()
        if isinstance(column, list)
        and len(column) == num_rows
        and name not in omitted
        and _is_json(column[row_index])
    }


def _is_json(value: Any) -> bool:
    """Return whether a value consists of the types of JSON."""
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)
