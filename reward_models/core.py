"""One protocol for every reward: learned models, rules, judges, functions, and their mixtures.

A reward maps conversations (Hugging Face chat format) to :class:`Scores`: one float, or None for
"could not be scored", per conversation. None travels through every composition and is counted
with its reason; it never turns into a silent zero.

    reward = build([{"kind": "learned", "path": "runs/reward/final"}, {"kind": "repetition"}])
    reward = 0.5 * helpful + brief.clip(0, 1)
    reward = helpful.gate(is_safe, at_least=0.5, otherwise=-1.0)

Facts that only a rule may see, such as the right answer, travel on the messages: a message may
carry keys beside ``role`` and ``content``: ``{"role": ..., "content": ..., "answer": "42"}``.
Rules read them; text shown to a model never contains them.
"""

from __future__ import annotations

import math
import os
import sysconfig
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.reward_models.learned import LearnedReward

Conversation = list[dict[str, str]]
Score = float | None
_MESSAGE = 160
"""Characters of an exception's message that are kept."""
_STDLIB = sysconfig.get_paths()["stdlib"]


class Unscorable(Exception):
    """Raised by a scorer of one conversation that has no score; its message is counted."""


class SetupError(UserError):
    """A reward that can score nothing on this machine, such as one whose package is missing."""


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and the file and line that raised it.

    The line is the deepest one outside installed packages, which is where a user can mend it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    place = ""
    if frames:
        frame = (own or frames)[-1]
        place = f" ({os.path.basename(frame.filename)}:{frame.lineno})"
    message = " ".join(str(error).split())
    message = f": {message[:_MESSAGE]}" if message else ""
    return f"{type(error).__name__}{message}{place}"


def _is_installed(path: str) -> bool:
    folder = os.path.dirname(os.path.abspath(path))
    return "site-packages" in path or path.startswith("<") or folder.startswith(_STDLIB)


@dataclass(frozen=True)
class Scores:
    """What a reward says about N conversations.

    Values that are not finite become None: a NaN in an advantage destroys a run quietly.
    """

    values: list[Score]
    """[N] the reward, or None where there is none."""
    components: dict[str, list[Score]] = field(default_factory=dict)
    """Name -> [N]: the raw score of every leaf of the composition, before weights and clips."""
    counts: Counter[str] = field(default_factory=Counter)
    """Named events, such as truncated texts and the reasons behind each None."""
    reasons: list[str | None] = field(default_factory=list)
    """[N] why there is no reward, None where there is one. Left out, a None says "no score"."""

    def __post_init__(self) -> None:
        raw = self.values
        object.__setattr__(self, "values", [_finite(value) for value in raw])
        given = self.reasons or [None] * len(raw)
        if len(given) != len(raw):
            raise UserError(f"{len(given)} reasons for {len(raw)} scores")
        reasons = [
            None if kept is not None else reason or ("no score" if value is None else "not finite")
            for value, kept, reason in zip(raw, self.values, given, strict=True)
        ]
        object.__setattr__(self, "reasons", reasons)
        for name, column in self.components.items():
            if len(column) != len(self.values):
                raise UserError(
                    f"component {name!r} has {len(column)} scores, the reward {len(self.values)}"
                )
        columns = {name: [_finite(v) for v in column] for name, column in self.components.items()}
        object.__setattr__(self, "components", columns)

    @property
    def unscored(self) -> int:
        """How many conversations have no reward."""
        return sum(value is None for value in self.values)


def _finite(value: Score) -> Score:
    return None if value is None or not math.isfinite(value) else float(value)


class Reward(ABC):
    """Anything that scores conversations. Subclasses set ``name`` and define :meth:`score`."""

    name: str = "reward"
    temperature: float = 1.0
    """Score difference that counts as one unit of log-odds in :meth:`prefer`."""
    moments: tuple[float, float] | None = None
    """Mean and standard deviation on samples of the reference policy, where known."""

    @abstractmethod
    def score(self, conversations: Sequence[Conversation]) -> Scores:
        """Scores for ``conversations``, in their order."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[Score]:
        """The values alone: the plain callable that environment wrappers take."""
        return self.score(conversations).values

    def leaves(self) -> tuple[Reward, ...]:
        """The rewards at the bottom of this composition, in order."""
        return (self,)

    def checkpoints(self) -> tuple[LearnedReward, ...]:
        """Every learned reward that has a part in the score."""
        below = (leaf for leaf in self.leaves() if leaf is not self)
        return tuple(found for leaf in below for found in leaf.checkpoints())

    def prefer(self, first: Sequence[Conversation], second: Sequence[Conversation]) -> list[Score]:
        """P(first is better) = sigmoid((score(first) - score(second)) / temperature), [pairs]."""
        if len(first) != len(second):
            raise UserError(
                f"prefer compares pairs, got {len(first)} and {len(second)} conversations"
            )
        values = self.score([*first, *second]).values
        pairs = zip(values[: len(first)], values[len(first) :], strict=True)
        return [
            None if a is None or b is None else _sigmoid((a - b) / self.temperature)
            for a, b in pairs
        ]

    def __add__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            return Combined("+", self, other)
        return Mapped(self, lambda value: value + other)

    def __mul__(self, other: Reward | float) -> Reward:
        if isinstance(other, Reward):
            return Combined("*", self, other)
        return Mapped(self, lambda value: value * other)

    def __radd__(self, other: float) -> Reward:
        return self + other

    def __rmul__(self, other: float) -> Reward:
        return self * other

    def __neg__(self) -> Reward:
        return self * -1.0

    def __sub__(self, other: Reward | float) -> Reward:
        return self + -other

    def __rsub__(self, other: float) -> Reward:
        return -self + other

    def clip(self, low: float, high: float) -> Reward:
        """Values limited to [low, high]."""
        if not low < high:
            raise UserError(f"clip needs low < high, got low={low}, high={high}")
        return Mapped(self, lambda value: min(max(value, low), high))

    def threshold(self, at_least: float, *, above: float = 1.0, below: float = 0.0) -> Reward:
        """``above`` where the value reaches ``at_least``, else ``below``."""
        return Mapped(self, lambda value: above if value >= at_least else below)

    def normalise(self, mean: float | None = None, std: float | None = None) -> Reward:
        """(value - mean) / std, by default with the reward's own ``moments``.

        Statistics of samples of the *reference policy* let one KL coefficient keep its meaning
        across reward models (Ziegler et al. 2019).
        """
        if mean is None or std is None:
            if self.moments is None:
                raise UserError(f"reward {self.name!r} carries no mean and std; give both")
            mean, std = self.moments
        if not std > 0:
            raise UserError(f"normalise needs std > 0, got {std}")
        return Mapped(self, lambda value: (value - mean) / std)

    def gate(self, condition: Reward, *, at_least: float = 0.5, otherwise: float = 0.0) -> Reward:
        """This reward where ``condition`` scores ``at_least``, the constant ``otherwise`` else.

        Conversations behind a closed gate are not scored at all, so a cheap rule can guard an
        expensive judge. Where the condition has no score, there is no reward.
        """
        return Gated(self, condition, at_least=at_least, otherwise=otherwise)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class Mapped(Reward):
    """A function of another reward's value, None staying None; components stay raw."""

    def __init__(self, inner: Reward, function: Callable[[float], float]):
        self.inner, self.function, self.name = inner, function, inner.name

    def leaves(self) -> tuple[Reward, ...]:
        return self.inner.leaves()

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        inner = self.inner.score(conversations)
        values = [None if v is None else self.function(v) for v in inner.values]
        return Scores(values, inner.components, inner.counts, inner.reasons)


class Combined(Reward):
    """Sum or product of rewards; None if any part is None."""

    def __init__(self, operator: str, *parts: Reward):
        self.operator, self.parts = operator, parts
        self.name = f" {operator} ".join(part.name for part in parts)
        check_names(self.leaves())

    def leaves(self) -> tuple[Reward, ...]:
        return _distinct(leaf for part in self.parts for leaf in part.leaves())

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        results = [part.score(conversations) for part in self.parts]
        fold = sum if self.operator == "+" else math.prod
        values = [
            None if None in row else float(fold(row))  # type: ignore[arg-type]
            for row in zip(*(result.values for result in results), strict=True)
        ]
        components = {k: v for result in results for k, v in result.components.items()}
        counts = sum((result.counts for result in results), Counter())
        return Scores(values, components, counts, first_reasons(results))


def first_reasons(results: Sequence[Scores]) -> list[str | None]:
    """[N] why the first of ``results`` that has no score has none."""
    columns = zip(*(result.reasons for result in results), strict=True)
    return [next((reason for reason in row if reason), None) for row in columns]


class Gated(Reward):
    """See :meth:`Reward.gate`."""

    def __init__(self, inner: Reward, condition: Reward, *, at_least: float, otherwise: float):
        self.inner, self.condition = inner, condition
        self.at_least, self.otherwise = at_least, otherwise
        self.name = f"{inner.name} if {condition.name}"
        check_names(self.leaves())

    def leaves(self) -> tuple[Reward, ...]:
        return _distinct((*self.condition.leaves(), *self.inner.leaves()))

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        condition = self.condition.score(conversations)
        values = [None if v is None else self.otherwise for v in condition.values]
        is_open = [
            i for i, v in enumerate(condition.values) if v is not None and v >= self.at_least
        ]
        inner = self.inner.score([conversations[i] for i in is_open])
        components = dict(condition.components)
        for name, column in inner.components.items():
            components[name] = _scatter(column, is_open, len(conversations))
        reasons = list(condition.reasons)
        for i, value, reason in zip(is_open, inner.values, inner.reasons, strict=True):
            values[i], reasons[i] = value, reason
        return Scores(values, components, condition.counts + inner.counts, reasons)


def _scatter(column: list[Score], rows: list[int], length: int) -> list[Score]:
    full: list[Score] = [None] * length
    for i, value in zip(rows, column, strict=True):
        full[i] = value
    return full


def _distinct(leaves) -> tuple[Reward, ...]:
    return tuple({id(leaf): leaf for leaf in leaves}.values())


def check_names(leaves: Sequence[Reward]) -> None:
    """Refuse two different leaves under one name: their components would hide each other."""
    for name, count in Counter(leaf.name for leaf in leaves).items():
        if count > 1:
            raise UserError(f"{count} rewards are named {name!r}; give each its own `name`")


class EachReward(Reward):
    """A reward computed one conversation at a time by ``function``.

    The function returns a float, or raises :class:`Unscorable` with the reason. Any other
    exception costs this one score, too, and is counted with its message and place; only a
    :class:`SetupError` ends the batch.
    """

    def __init__(self, function: Callable[[Conversation], float], *, name: str):
        self.function, self.name = function, name

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        pairs = [self._attempt(conversation) for conversation in conversations]
        values = [value for value, _ in pairs]
        reasons = [reason for _, reason in pairs]
        counts = Counter(reason for reason in reasons if reason)
        return Scores(values, {self.name: values}, counts, reasons)

    def _attempt(self, conversation: Conversation) -> tuple[Score, str | None]:
        try:
            return float(self.function(conversation)), None
        except SetupError:
            raise
        except Unscorable as reason:
            return None, f"{self.name}: {reason}"
        except Exception as error:  # one bad text never ends the batch
            return None, f"{self.name}: {describe(error)}"


def last_reply(conversation: Conversation) -> str:
    """Text of the last message of the assistant; :class:`Unscorable` if there is none.

    A message without text, such as one that only calls a tool, is an empty reply; text in several
    parts is joined.
    """
    for message in reversed(conversation):
        if message.get("role") == "assistant":
            return _text(message.get("content"))
    raise Unscorable("no assistant message")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text", "") if isinstance(part, Mapping) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    raise Unscorable(f"a message whose content is a {type(content).__name__}")


def fact(conversation: Conversation, key: str) -> Any:
    """The fact ``key`` that travels on a message, the latest one first; None if there is none."""
    return next((m[key] for m in reversed(conversation) if key in m), None)


def with_facts(conversation: Conversation, facts: Mapping[str, str]) -> Conversation:
    """A copy whose first message carries ``facts``."""
    return [{**conversation[0], **facts}, *conversation[1:]]
