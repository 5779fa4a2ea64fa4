"""Check the results of advantage estimators, policy losses and KL estimators that users write.

Without these checks, a mistake in such a function would cause an error in a later line of the
toolkit, or a wrong gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

from rlhf.common.user_code import (
    check_accepts_arguments,
    definition_location,
    definition_location_text,
    guarded_call,
    warn_once,
)
from rlhf.errors import UserError

_SIGNATURES: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "advantages": ("advantage(batch, settings)", 2, ()),
    "losses": ("loss(logprobs, batch, settings, *, denominator)", 3, ("denominator",)),
    "kl": ("kl(log_ratio)", 1, ()),
}
"""Kind of component -> signature as text, number of positional arguments, keyword arguments."""
_TENSOR_ARGUMENTS = {
    "advantages": ("batch",),
    "losses": ("logprobs", "batch"),
    "kl": ("log_ratio",),
}
"""Kind of component -> names of its first arguments, which are tensors or contain tensors."""
_ADVANTAGES_FIELDS = ("advantages", "returns", "included", "pair_ids")
"""Fields of `Advantages`. Its module cannot be imported here, because it imports this module."""
_TITLES = {"advantages": "advantage estimator", "losses": "policy loss", "kl": "KL estimator"}


def wrap_with_checks(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a user's function with checks of its result and for in-place changes of its arguments.

    A function of the toolkit or of an installed package is returned unchanged.

    Args:
        kind: Kind of the component: "advantages", "losses" or "kl".
        name: Name of the component.
        function: The function.

    Raises:
        UserError: The function does not accept the arguments of its kind.
    """
    if definition_location(function) is None:
        return function
    title = f"{_TITLES[kind]} {name!r}"
    signature, count, keys = _SIGNATURES[kind]
    check_accepts_arguments(
        function, (None,) * count, what=title, required_signature=signature, **dict.fromkeys(keys)
    )
    what = f"{title}{definition_location_text(function)}"
    check = {
        "advantages": _check_advantages_result,
        "losses": _check_loss_result,
        "kl": _check_kl_result,
    }[kind]

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        versions = _in_place_change_counts(kind, arguments)
        advice = "simplify it, or use tensor operations instead of loops"
        with guarded_call(function, what=title, advice=advice):
            result = function(*arguments, **options)
        if changed := [
            name
            for name, number in _in_place_change_counts(kind, arguments).items()
            if versions[name] != number
        ]:
            raise UserError(
                f"{what} changed {changed[0]} in place, but other computations use this tensor: "
                f"change a copy, such as {changed[0]}.clone()"
            )
        check(what, result, arguments)
        return result

    return checked


def _in_place_change_counts(kind: str, arguments: tuple[Any, ...]) -> dict[str, int]:
    """Return tensor name -> number of in-place changes, for the arguments of a component.

    Fields of a batch are named `batch.FIELD`. None and inference tensors are omitted.
    """
    tensors: dict[str, Any] = {}
    for name, value in zip(_TENSOR_ARGUMENTS[kind], arguments, strict=False):
        if name == "batch":
            tensors |= {f"batch.{f.name}": getattr(value, f.name) for f in fields(value)}
        else:
            tensors[name] = value
    return {
        name: tensor._version
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_inference()
    }


def _check_loss_result(what: str, result: Any, arguments: tuple[Any, ...]) -> None:
    """Raise UserError if a loss did not return a scalar tensor and `MetricSums`."""
    import torch

    from rlhf.algorithms.metrics import MetricSums

    advice = "return the loss, a scalar tensor, and MetricSums"
    is_tuple = isinstance(result, tuple)
    values = cast("tuple[Any, ...]", result) if is_tuple else ()
    if len(values) != 2:
        size = f" of {len(values)} values" if is_tuple else ""
        raise UserError(f"{what} returned a {type(result).__name__}{size}: {advice}")
    loss, metrics = values
    if not isinstance(loss, torch.Tensor) or not isinstance(metrics, MetricSums):
        found = f"({type(loss).__name__}, {type(metrics).__name__})"
        raise UserError(f"{what} returned {found}: {advice}")
    if loss.dim():
        raise UserError(
            f"{what} returned a loss of shape {list(loss.shape)}: {advice}, such as "
            "aggregate(per_token, mask, ...)"
        )
    _warn_if_not_finite(what, "loss", loss)


def _warn_if_not_finite(what: str, name: str, values: Any) -> None:
    """Warn once if a value is not finite; the alarm that ends the run names no function."""
    wrong = values[~values.isfinite()]
    if wrong.numel():
        warn_once(
            f"{what} returned the {name} {wrong[0].item()}: check its divisions, logarithms and "
            "exponentials, and the values outside the mask"
        )


def _check_advantages_result(what: str, result: Any, arguments: tuple[Any, ...]) -> None:
    """Raise UserError if an estimator did not return `Advantages` with the shapes of the batch."""
    if not all(hasattr(result, name) for name in _ADVANTAGES_FIELDS):
        raise UserError(f"{what} returned a {type(result).__name__}: return Advantages(advantages)")
    batch = arguments[0]
    rows, width = batch.tokens.shape
    for name, shapes in (
        ("advantages", ([rows], [rows, width])),
        ("returns", ([rows, width],)),
        ("included", ([rows],)),
        ("pair_ids", ([rows],)),
    ):
        tensor = getattr(result, name)
        shape = list(getattr(tensor, "shape", ()))
        if tensor is not None and shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise UserError(
                f"{what} returned {name} of type {type(tensor).__name__} and shape {shape}: "
                f"return a tensor of shape {expected}"
            )
    used = batch.action_mask & ~batch.scores().isnan()[:, None]
    if result.included is not None:
        used = used & result.included[:, None]
    for name in ("advantages", "returns"):
        if (tensor := getattr(result, name)) is not None:
            tokens = tensor if tensor.dim() == 2 else tensor[:, None].expand_as(used)
            _warn_if_not_finite(what, name, tokens[used])


def _check_kl_result(what: str, result: Any, arguments: tuple[Any, ...]) -> None:
    """Raise UserError if a KL estimator did not return a tensor of the shape of its argument."""
    import torch

    expected, shape = list(arguments[0].shape), list(getattr(result, "shape", ()))
    if shape != expected or not isinstance(result, torch.Tensor):
        raise UserError(
            f"{what} returned a {type(result).__name__} of shape {shape}: return a tensor of shape "
            f"{expected}"
        )
    _warn_if_not_finite(what, "KL", result[arguments[0].isfinite()])
