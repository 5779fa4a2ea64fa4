"""The reward interface, and compositions of rewards.

A reward maps conversations (Hugging Face chat format) to :class:`Scores`. The score of a
conversation is a float, or None if it could not be scored. Every composition propagates None with
its reason and counts the reasons; None is never replaced by zero.

    reward = build([{"kind": "learned", "path": "runs/reward/final"}, {"kind": "repetition"}])
    reward = 0.5 * helpful + brief.clip(0, 1)
    reward = helpful.gate(is_safe, at_least=0.5, otherwise=-1.0)

Facts for rules, such as the reference answer, are additional keys of a message:
``{"role": ..., "content": ..., "answer": "42"}``. Models never receive these keys.
"""

from __future__ import annotations

import copy
import math
import numbers
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf.common.conversation import Conversation, Score, check_conversations
from rlhf.common.foreign import describe_exception, limit_side_effects
from rlhf.common.text import mask_secrets
from rlhf.common.user_code import add_location_to_errors, definition_location_text
from rlhf.errors import UserError

IGNORED = -100
"""Label of tokens and texts that do not contribute to the loss, as in torch's cross entropy."""

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound="Reward")


class Unscorable(Exception):
    """Raised if a conversation cannot be scored; the message is the reason."""


class SetupError(UserError):
    """Error for a reward that cannot work on this machine, e.g. because a package is missing."""


@dataclass(frozen=True)
class Scores:
    """Rewards of N conversations.

    Values and component scores that are not finite numbers are replaced by None, because a NaN in
    an advantage would ruin a run.

    Raises:
        ValueError: The values, the reasons and the components have different lengths.
    """

    values: list[Score]
    """Reward of each conversation, or None if it has none, [N]."""
    components: dict[str, list[Score]] = field(default_factory=dict)
    """Name of each leaf of the composition, or of a part of a leaf such as ``cost.unsafe`` -> its
    raw scores [N], before weighting and clipping."""
    counts: Counter[str] = field(default_factory=Counter)
    """Event, such as a truncated text or the reason of a missing score -> number of occurrences."""
    reasons: list[str | None] = field(default_factory=list)
    """Reason why the reward of each conversation is missing, or None if the reward is not missing,
    [N]. A reason that the argument lacks is "no score" for a value of None, "not finite", or the
    type of a value that is not a number."""

    def __post_init__(self) -> None:
        raw = self.values
        object.__setattr__(self, "values", [_finite_or_none(value) for value in raw])
        reasons = self.reasons or [None] * len(raw)
        if len(reasons) != len(raw):
            raise ValueError(f"{len(reasons)} reasons for {len(raw)} scores")
        reasons = [
            None if value is not None else reason or _reason_for_missing_score(score)
            for score, value, reason in zip(raw, self.values, reasons, strict=True)
        ]
        object.__setattr__(self, "reasons", reasons)
        for name, column in self.components.items():
            if len(column) != len(self.values):
                raise ValueError(
                    f"component {name!r} has {len(column)} scores, the reward {len(self.values)}"
                )
        columns = {
            name: [_finite_or_none(v) for v in column] for name, column in self.components.items()
        }
        object.__setattr__(self, "components", columns)

    @property
    def unscored(self) -> int:
        """Number of conversations without a reward."""
        return sum(value is None for value in self.values)


def score_each(
    function: Callable[[T], R | None], items: Sequence[T], *, name: str
) -> tuple[list[R | None], list[str | None], Counter[str]]:
    """Apply ``function`` to each of N items; if it raises :class:`Unscorable`, the result is None.

    Returns:
        - The results, [N].
        - For each :class:`Unscorable`, ``name`` and the message with secrets masked; None for the
          other items, [N].
        - The number of occurrences of each reason.
    """
    results: list[R | None] = []
    reasons: list[str | None] = []
    for item in items:
        result, reason = None, None
        try:
            result = function(item)
        except Unscorable as error:
            reason = mask_secrets(f"{name}: {error}")  # an error of a server may contain its key
        results.append(result)
        reasons.append(reason)
    return results, reasons, Counter(reason for reason in reasons if reason)


def scatter_scores(scores: Iterable[Score], indices: Iterable[int], length: int) -> list[Score]:
    """Return ``length`` scores: ``scores`` at ``indices``, and None at other indices."""
    known = dict(zip(indices, scores, strict=True))
    return [known.get(index) for index in range(length)]


def merged_components_counts_reasons(
    results: Sequence[Scores],
) -> tuple[dict[str, list[Score]], Counter[str], list[str | None]]:
    """Merge the components, counts and reasons of several rewards on the same N conversations.

    Returns:
        All components, the sums of the counts, and for each conversation the first reason for a
        missing score (None if there is none), [N].
    """
    components = {name: column for result in results for name, column in result.components.items()}
    counts = sum((result.counts for result in results), Counter())
    columns = zip(*(result.reasons for result in results), strict=True)
    return components, counts, [next(filter(None, row), None) for row in columns]


def _finite_or_none(value: Any) -> Score:
    """Return a value as a float; None if it is not a finite number."""
    try:
        number = as_score(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or not math.isfinite(number) else number


def _reason_for_missing_score(value: Any) -> str:
    """Return the reason why a value that `_finite_or_none` converts to None is not a score."""
    if value is None:
        return "no score"
    is_real = isinstance(value, numbers.Number) and not isinstance(value, complex)
    return "not finite" if is_real else f"a score is of type {type(value).__name__}"


def as_score(value: Any) -> Score:
    """Convert a user function's result to a float, which may be infinite or nan; None remains None.

    Raises:
        TypeError: The result is a string or bytes, or cannot be converted to a number.
        OverflowError: The result is an integer beyond the range of floats.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"a score is of type {type(value).__name__}")
    try:
        return None if value is None else float(value)
    except TypeError:
        raise TypeError(f"a score is of type {type(value).__name__}") from None


def score_copies(reward: Reward, conversations: Sequence[Conversation]) -> Scores:
    """Score copies of conversations, so that one reward cannot change the input of the next.

    Raises:
        UserError: The reward does not return one score for each conversation.
    """
    with limit_side_effects():
        scores = reward.score(copy.deepcopy(list(conversations)))
    if not isinstance(scores, Scores) or len(scores.values) != len(conversations):
        kind = type(scores).__name__
        size = f" of {len(scores.values)}" if isinstance(scores, Scores) else ""
        raise UserError(
            f"reward {reward.name!r} returned {kind}{size} for {len(conversations)} conversations; "
            "it must return Scores with one value for each conversation"
        )
    return scores


class Reward(ABC):
    """Base class of all rewards. Subclasses set ``name`` and define :meth:`score`."""

    name: str = "reward"
    temperature: float = 1.0
    """Score difference that corresponds to one unit of log-odds in :meth:`prefer`."""
    moments: tuple[float, float] | None = None
    """Mean and standard deviation of the scores on samples of the reference policy, if known."""
    outcomes: tuple[float, float] | None = None
    """The two possible scores, the smaller first, if there are only two, such as (0.0, 1.0). The
    mean of these scores then has the exact interval of a proportion."""
    independent: bool = False
    """Whether the score of a conversation depends only on this conversation, to the last bit, and
    can be computed in any thread. It is False for models, whose batches change the last bits, and
    for functions that may compare the conversations of a call."""
    waits: bool = False
    """Whether scoring waits for a server or another process. While other episodes are still played,
    training computes the independent rewards that wait."""
    inner_rewards: Sequence[Reward] = ()
    """The rewards from whose scores this reward computes its scores."""

    @abstractmethod
    def score(self, conversations: Sequence[Conversation]) -> Scores:
        """Score N conversations."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Return the values of :meth:`score`, [N]; environment wrappers call rewards this way.

        Raises:
            UserError: The argument is not a list of conversations.
        """
        check_conversations(conversations, "a reward")
        return self.score(conversations).values

    def leaves(self) -> tuple[Reward, ...]:
        """Return the distinct leaves of this composition, in order; by default, this reward."""
        return (self,)

    def terms(self) -> tuple[Reward, ...]:
        """Return the rewards whose sum this reward is; a reward that is not a sum has one term."""
        return (self,)

    def value_from_leaf_scores(self, leaf_scores: Mapping[str, Score]) -> Score:
        """Return the value of a conversation, computed from the raw scores of the leaves.

        Args:
            leaf_scores: Name of a leaf -> its score of the conversation.

        Returns:
            The value; None if a score that it depends on is missing.
        """
        return leaf_scores.get(self.name)

    def learned_rewards(self) -> tuple[Any, ...]:
        """Return all `LearnedReward` objects on which the scores of this reward depend."""
        return _unique_objects(c for inner in self.inner_rewards for c in inner.learned_rewards())

    def prefer(self, first: Sequence[Conversation], second: Sequence[Conversation]) -> list[Score]:
        """Return P(first is better) for N pairs of conversations, [N].

        The probability is sigmoid((score(first) - score(second)) / temperature). It is None if one
        of the two scores is missing.

        Raises:
            UserError: ``first`` and ``second`` have different lengths.
        """
        if len(first) != len(second):
            raise UserError(
                f"prefer compares pairs, got {len(first)} and {len(second)} conversations"
            )
        values = self.score([*first, *second]).values
        pairs = zip(values[: len(first)], values[len(first) :], strict=True)
        return [
            None if a is None or b is None else sigmoid((a - b) / self.temperature)
            for a, b in pairs
        ]

    def __add__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            return CombinedReward("+", self, other)
        return MappedReward(self, lambda value: value + other)

    def __mul__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            return CombinedReward("*", self, other)
        return MappedReward(self, lambda value: value * other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Reward:
        return self * -1.0

    def __sub__(self, other: Reward | float) -> Reward:
        return self + -other

    def __rsub__(self, other: float) -> Reward:
        return -self + other

    def clip(self, low: float, high: float) -> Reward:
        """Return this reward clipped to [low, high].

        Raises:
            UserError: ``low`` is not below ``high``.
        """
        if not low < high:
            raise UserError(f"clip needs low < high, got low={low}, high={high}")
        return MappedReward(self, lambda value: min(max(value, low), high))

    def threshold(self, at_least: float, *, above: float = 1.0, below: float = 0.0) -> Reward:
        """Return a reward of ``above`` if the value is at least ``at_least``, else ``below``."""
        return MappedReward(self, lambda value: above if value >= at_least else below)

    def normalize(self, mean: float | None = None, std: float | None = None) -> Reward:
        """Return the reward (value - mean) / std.

        By default, ``mean`` and ``std`` are this reward's ``moments``.

        If the mean and the standard deviation are those on samples of the *reference policy*, a KL
        coefficient has the same effect for all reward models (Ziegler et al. 2019).

        Raises:
            UserError: Only one of ``mean`` and ``std`` is given, the reward has no ``moments`` and
                none is given, or ``std`` is not positive.
        """
        if (mean is None) != (std is None):
            raise UserError("normalize: give both mean and std, or neither")
        if mean is None or std is None:
            if self.moments is None:
                raise UserError(
                    f"reward {self.name!r} has no stored mean and std: give them to normalize"
                )
            mean, std = self.moments
        if not std > 0:
            raise UserError(f"normalize: std must be > 0, got {std}")
        return MappedReward(self, lambda value: (value - mean) / std)

    def gate(self, condition: Reward, *, at_least: float = 0.5, otherwise: float = 0.0) -> Reward:
        """Return a reward that equals this reward if ``condition`` scores at least ``at_least``.

        If the condition scores less, the value is ``otherwise``. If the condition has no score, the
        value is None. Conversations that do not meet the condition are not scored by this reward,
        so a cheap rule can save calls of an expensive judge.
        """
        return GatedReward(self, condition, at_least=at_least, otherwise=otherwise)


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class Composition(Reward):
    """A reward whose components are those of its ``inner_rewards``.

    Raises:
        UserError: Two leaves have the same name.
    """

    def __init__(self, name: str, *inner_rewards: Reward):
        self.name, self.inner_rewards = name, inner_rewards
        self.independent = all(inner.independent for inner in inner_rewards)
        self.waits = any(inner.waits for inner in inner_rewards)
        check_unique_names(self.leaves())

    def leaves(self) -> tuple[Reward, ...]:
        return _unique_objects(leaf for inner in self.inner_rewards for leaf in inner.leaves())


class MappedReward(Composition):
    """A reward whose value is a function of another reward's value.

    None remains None, and the components are those of the other reward.
    """

    def __init__(self, inner: Reward, function: Callable[[float], float]):
        super().__init__(inner.name, inner)
        self.function = function

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        inner = self.inner_rewards[0].score(conversations)
        values = [None if v is None else self.function(v) for v in inner.values]
        return Scores(values, inner.components, inner.counts, inner.reasons)

    def value_from_leaf_scores(self, leaf_scores: Mapping[str, Score]) -> Score:
        value = self.inner_rewards[0].value_from_leaf_scores(leaf_scores)
        return None if value is None else self.function(value)


class CombinedReward(Composition):
    """Sum ("+") or product ("*") of rewards; the value is None if a reward has the value None."""

    def __init__(self, operator: str, *inner_rewards: Reward):
        super().__init__(f" {operator} ".join(r.name for r in inner_rewards), *inner_rewards)
        self.operator = operator

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        results = [score_copies(inner, conversations) for inner in self.inner_rewards]
        rows = zip(*(result.values for result in results), strict=True)
        return Scores(
            [self._sum_or_product(row) for row in rows], *merged_components_counts_reasons(results)
        )

    def terms(self) -> tuple[Reward, ...]:
        if self.operator != "+":
            return (self,)
        return tuple(term for inner in self.inner_rewards for term in inner.terms())

    def value_from_leaf_scores(self, leaf_scores: Mapping[str, Score]) -> Score:
        return self._sum_or_product(
            [inner.value_from_leaf_scores(leaf_scores) for inner in self.inner_rewards]
        )

    def _sum_or_product(self, values: Sequence[Score]) -> Score:
        """Return the sum or the product of values; None if one of them is None."""
        fold = sum if self.operator == "+" else math.prod
        return None if None in values else float(fold(values))  # type: ignore[arg-type]


class GatedReward(Composition):
    """A reward that is computed only if a condition holds; see :meth:`Reward.gate`."""

    def __init__(self, inner: Reward, condition: Reward, *, at_least: float, otherwise: float):
        super().__init__(f"{inner.name} if {condition.name}", condition, inner)
        self.inner, self.condition = inner, condition
        self.at_least, self.otherwise = at_least, otherwise

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        condition = score_copies(self.condition, conversations)
        values = [None if v is None else self.otherwise for v in condition.values]
        rows = [i for i, v in enumerate(condition.values) if v is not None and v >= self.at_least]
        inner = self.inner.score([conversations[i] for i in rows])
        components = condition.components | {
            name: scatter_scores(column, rows, len(conversations))
            for name, column in inner.components.items()
        }
        reasons = list(condition.reasons)
        for i, value, reason in zip(rows, inner.values, inner.reasons, strict=True):
            values[i], reasons[i] = value, reason
        return Scores(values, components, condition.counts + inner.counts, reasons)

    def value_from_leaf_scores(self, leaf_scores: Mapping[str, Score]) -> Score:
        condition = self.condition.value_from_leaf_scores(leaf_scores)
        if condition is None or condition < self.at_least:
            return None if condition is None else self.otherwise
        return self.inner.value_from_leaf_scores(leaf_scores)


def _unique_objects(rewards: Iterable[S]) -> tuple[S, ...]:
    """Return the rewards in order, without objects that occur earlier."""
    return tuple({id(reward): reward for reward in rewards}.values())


def components_with_value(
    reward: Reward, scores: Scores, name: str, *, always: bool = False
) -> dict[str, list[Score]]:
    """Return the components of scores, and the values of the reward as the component ``name``.

    By default, the values are omitted if the reward is a leaf with one component, because this
    component then has the same values.

    Args:
        reward: The reward.
        scores: Its scores.
        name: Name of the component with the values of the reward.
        always: Whether to add the values in any case.
    """
    plain = len(scores.components) == 1 and reward.leaves() == (reward,)
    if plain and not always:
        return scores.components
    return {**scores.components, name: scores.values}


def binary_outcomes_by_name(rewards: Iterable[Reward]) -> dict[str, tuple[float, float]]:
    """Return name -> `outcomes` of each leaf of the rewards that has `outcomes`."""
    leaves = [leaf for reward in rewards for leaf in reward.leaves()]
    return {leaf.name: leaf.outcomes for leaf in leaves if leaf.outcomes}


def check_unique_names(leaves: Sequence[Reward]) -> None:
    """Raise a UserError if two leaves have the same name, because their components would mix."""
    for name, count in Counter(leaf.name for leaf in leaves).items():
        if count > 1:
            raise UserError(f"{count} rewards are named {name!r}; give each its own `name`")


class PerConversationReward(Reward):
    """A reward that ``function`` computes for one conversation at a time.

    The function returns a float, or raises :class:`Unscorable` with the reason why there is no
    score. None and values that are not finite are no scores either. A :class:`SetupError` is raised
    to the caller. After any other exception, the conversation has no score, and the exception is
    counted with its message and location.

    Args:
        function: The function.
        name: Name of the component.
        outcomes: See `Reward.outcomes`.
        waits: See `Reward.waits`.
        code: The function of the user whose definition is the location of a wrong result; by
            default ``function``.
    """

    independent = True

    def __init__(
        self,
        function: Callable[[Conversation], float],
        *,
        name: str,
        outcomes: tuple[float, float] | None = None,
        waits: bool = False,
        code: Callable[..., Any] | None = None,
    ):
        self.function, self.name, self.outcomes = function, name, outcomes
        self.waits, self._code = waits, code or function

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        values, reasons, counts = score_each(self._score_one, conversations, name=self.name)
        return Scores(values, {self.name: values}, counts, reasons)

    def _score_one(self, conversation: Conversation) -> float:
        try:
            with add_location_to_errors(self._code), limit_side_effects():
                value = as_score(self.function(copy.deepcopy(conversation)))
            if value is None or not math.isfinite(value):
                problem = "returned None" if value is None else "a score is not finite"
                raise Unscorable(f"{problem}{definition_location_text(self._code)}")
            return value
        except (SetupError, Unscorable):
            raise
        except Exception as error:  # a single bad text must not end the batch
            raise Unscorable(describe_exception(error)) from error


def last_reply(conversation: Conversation) -> str:
    """Return the text of the last assistant message.

    If the content is a list of parts, their texts are joined. The text is empty if the message has
    no content, as in a message that only calls a tool.

    Raises:
        Unscorable: There is no assistant message, or its content is not text.
    """
    for message in reversed(conversation):
        if message.get("role") == "assistant":
            return content_text(message.get("content"))
    raise Unscorable("no assistant message")


def content_text(content: Any) -> str:
    """Return the text of a message's content; see `last_reply`.

    Raises:
        Unscorable: The content is neither text, nor a list, nor None.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text", "") if isinstance(part, Mapping) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    raise Unscorable(f"the content of a message is a {type(content).__name__}, not text")


def as_messages(value: str | Conversation, role: str) -> Conversation:
    """Convert a text to a list of one message with this role; copy a list of messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def last_value_of_key(conversation: Conversation, key: str) -> Any:
    """Return the value of ``key`` in the last message that has it; None if there is none."""
    return next((m[key] for m in reversed(conversation) if key in m), None)


def with_facts(conversation: Conversation, facts: Mapping[str, Any]) -> Conversation:
    """Return a copy of a conversation with ``facts`` as further keys of the last user message.

    Without a user message, they are keys of the first message.
    """
    users = [i for i, message in enumerate(conversation) if message["role"] == "user"]
    at = users[-1] if users else 0
    return [{**m, **facts} if i == at else m for i, m in enumerate(conversation)]
