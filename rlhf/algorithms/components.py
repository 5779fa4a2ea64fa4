"""Registry of the components of algorithms: advantage estimators, policy losses, KL estimators.

A component is one decorated function. The decorator states the requirements of the function and
the settings that it reads, so a new component requires no other change.

This module does not import torch, because help texts list the settings of an algorithm, and an
import of torch would slow them down. As long as a module of components is not imported, its
decorators are parsed from its source. The arguments of the decorators must therefore be literals.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlhf.algorithms.settings import setting_names
from rlhf.algorithms.user_components import wrap_with_checks
from rlhf.common.names import did_you_mean
from rlhf.common.registry import Registry
from rlhf.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

CRITIC_SETTINGS = ("value_coef", "value_clip")


@dataclass(frozen=True)
class Component:
    """A registered function and its requirements."""

    function: Callable[..., Any]
    summary: str
    reads: frozenset[str] = frozenset()
    """Names of the settings that have an effect with this component."""
    critic: bool = False
    """Whether the function needs the values of a critic."""
    groups: bool = False
    """Whether the function compares several rollouts with the same start state."""
    pairs: bool = False
    """Whether an advantage estimator forms pairs of rollouts, or a loss compares the rollouts of a
    pair."""
    reference: bool = False
    """Whether a loss depends on the reference policy; no other KL term is then added."""
    differentiable: bool = True
    """Whether a KL estimator can be a term of the loss, because its expected gradient is not 0."""


_TABLES: dict[str, Registry[Component]] = {
    "advantages": Registry("advantage estimator"),
    "losses": Registry("policy loss"),
    "kl": Registry("KL estimator"),
}
_parsed_modules: set[str] = set()


def registered_components(kind: str) -> Registry[Component]:
    """Return the registered components of one kind, by name, without importing torch.

    Args:
        kind: Name of the module of this package that defines the components: "advantages",
            "losses" or "kl". The functions of the components can be called only after the named
            module is imported.
    """
    if kind not in _parsed_modules and f"{__package__}.{kind}" not in sys.modules:
        _parsed_modules.add(kind)
        _register_without_import(kind)
    return _TABLES[kind]


def _register_without_import(module: str) -> None:
    """Register the components of a module that is not imported, with a placeholder function."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    decorators = {"advantage": advantage, "policy_loss": policy_loss, "kl_estimator": kl_estimator}
    for node in ast.parse(source).body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                arguments = map(ast.literal_eval, call.args)
                options = {str(key.arg): ast.literal_eval(key.value) for key in call.keywords}
                decorators[call.func.id](*arguments, **options)(_raise_not_imported)


def _raise_not_imported(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the module that defines this component must be imported before the call")


def advantage(
    name: str,
    summary: str,
    *,
    reads: tuple[str, ...] = (),
    critic: bool = False,
    groups: bool = False,
    pairs: bool = False,
) -> Callable[[Function], Function]:
    """Return a decorator for an advantage estimator: `(batch, settings) -> Advantages`.

    Example:
        >>> from rlhf.algorithms.advantages import Advantages
        >>> from rlhf.plugins import register_advantage
        >>> @register_advantage("sign", "sign of the return")
        ... def sign_of_return(batch, settings):
        ...     return Advantages(batch.scores().sign())
        >>> from rlhf.algorithms.registry import configured_algorithm
        >>> configured_algorithm("rloo", advantage="sign").advantage_estimator.summary
        'sign of the return'

    Args:
        name: Value of the setting `advantage`.
        summary: Phrase for the table in the documentation.
        reads: Names of the settings that have an effect with this estimator. A setting that the
            toolkit applies to the result, such as `whiten_advantages`, can be configured only if
            it is named here or by the loss.
        critic: Whether the function needs `batch.values` and `batch.bootstrap`.
        groups: Whether the function needs `batch.groups`.
        pairs: Whether the estimator forms pairs of rows, for losses that compare these rows.

    Raises:
        UserError: See `_registering_decorator`.
    """
    settings = frozenset(reads + (CRITIC_SETTINGS if critic else ()))
    return _registering_decorator("advantages", name, summary, settings, critic, groups, pairs)


def policy_loss(
    name: str,
    summary: str,
    *,
    reads: tuple[str, ...] = (),
    pairs: bool = False,
    reference: bool = False,
) -> Callable[[Function], Function]:
    """Return a decorator for a policy loss.

    The signature of a loss is `(logprobs, batch, settings, *, denominator) -> loss, MetricSums`.

    Example:
        >>> from rlhf.algorithms.metrics import MetricSums
        >>> from rlhf.plugins import Settings, register_algorithm, register_policy_loss
        >>> @register_policy_loss("flat", "a loss without a gradient")
        ... def flat(logprobs, batch, settings, *, denominator):
        ...     return 0.0 * logprobs.sum(), MetricSums()
        >>> _ = register_algorithm("flat", title="No change", loss="flat", settings=Settings())
        >>> from rlhf.algorithms.registry import ALGORITHMS
        >>> ALGORITHMS["flat"].policy_loss.summary
        'a loss without a gradient'

    Args:
        name: Value of `Algorithm.loss`.
        summary: Phrase for the table in the documentation.
        reads: Names of the settings that have an effect with this loss. A setting that the toolkit
            applies, such as `tis_cap`, can be configured only if it is named here or by the
            estimator.
        pairs: Whether the loss compares the two rows of a pair.
        reference: Whether the loss reads `batch.ref_logprobs`. If so, no other KL term is added.

    Raises:
        UserError: See `_registering_decorator`.
    """
    return _registering_decorator(
        "losses", name, summary, frozenset(reads), pairs=pairs, reference=reference
    )


def kl_estimator(
    name: str, summary: str, *, differentiable: bool = True
) -> Callable[[Function], Function]:
    """Return a decorator for an estimator of the KL per token: `(log_ratio) -> Tensor`, [B, T].

    Example:
        >>> from rlhf.plugins import register_kl
        >>> @register_kl("absolute", "absolute value of the log ratio")
        ... def absolute(log_ratio):
        ...     return log_ratio.abs()
        >>> from rlhf.algorithms.registry import configured_algorithm
        >>> configured_algorithm("ppo", kl_estimator="absolute").settings.kl_estimator
        'absolute'

    Args:
        name: Value of the setting `kl_estimator`.
        summary: Phrase for the table in the documentation.
        differentiable: Whether the estimate can be a term of the loss, because its expected
            gradient is not 0.
    """
    return _registering_decorator("kl", name, summary, differentiable=differentiable)


def _registering_decorator(
    kind: str, name: str, *fields: Any, **flags: bool
) -> Callable[[Any], Any]:
    """Return a decorator that registers a function and returns it unchanged.

    Args:
        kind: See `registered_components`.
        name: Name of the component.
        *fields: Fields of `Component` after `function`.
        **flags: Further fields of `Component`.

    Raises:
        UserError: `reads` contains an unknown setting. The decorator raises it if the name is taken
            or the function does not accept the arguments of its kind.
    """
    for key in fields[1] if len(fields) > 1 else ():
        if key not in setting_names():
            hint = did_you_mean(key, setting_names())
            raise UserError(f"{name}: reads: there is no setting {key!r}{hint}")

    def decorate(function: Any) -> Any:
        checked = wrap_with_checks(kind, name, function)
        component = Component(checked, *fields, **flags)
        registered_components(kind).add(name, component, function)
        return function

    return decorate
