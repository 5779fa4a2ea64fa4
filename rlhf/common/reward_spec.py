"""`RewardSpec`, the entry of a reward in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict  # pydantic needs this class before Python 3.12

from rlhf.common.numbers import is_number
from rlhf.common.ranges import OTHER_KEYS_ALLOWED, Condition, Finite


def _is_interval(value: Any) -> bool:
    """Return whether a value is a list or a tuple of two numbers in ascending order."""
    numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
    return numbers and len(value) == 2 and value[0] < value[1]


def _is_normalization(value: Any) -> bool:
    """Return whether a value is True, an empty mapping, or a mean and a standard deviation."""
    if not isinstance(value, Mapping):
        return value is True
    numbers = all(map(is_number, value.values()))
    return not value or (set(value) == {"mean", "std"} and numbers and value["std"] > 0)


class RewardSpec(TypedDict, total=False):
    """A reward of a configuration: its kind, and how its score is transformed.

    The other keys of an entry are the settings of its kind. `rlhf.reward_models.build` checks them,
    because plug-ins can define kinds. The score is transformed by ``normalize``, ``clip``,
    ``threshold`` and ``weight``, in this order.
    """

    __pydantic_config__ = OTHER_KEYS_ALLOWED  # type: ignore[misc]

    kind: Required[str]
    """Kind of the reward, which has settings of its own; docs/rewards.md lists the kinds."""
    name: str
    """Name of the reward in metrics and transcripts; by default, that of the kind."""
    normalize: Annotated[
        Literal[True] | dict[str, float],
        Condition("true or {mean: NUMBER, std: NUMBER > 0}", _is_normalization),
    ]
    """{mean: M, std: S}: subtract M and divide by S; true: with the mean and the standard deviation
    that are stored in the checkpoint."""
    clip: Annotated[list[float], Condition("[LOW, HIGH] with LOW < HIGH", _is_interval)]
    """[LOW, HIGH]: limits of the score."""
    threshold: Finite
    """The score becomes 1 if it is at least this number, and 0 otherwise."""
    weight: Finite
    """Factor of the score in the sum of the rewards; by default 1."""
