"""Callbacks: the user's code at steps, evaluations, checkpoints and the end of training.

    class StopWhenGood(Callback):
        def on_evaluation(self, event):
            if event.metrics["eval/return"] > 0.9:
                event.stop()

A run with several processes calls them in the first process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat, cast

from rlhf.common.foreign import describe_exception, restored_process_state
from rlhf.common.guards import is_mapping
from rlhf.common.imports import import_object
from rlhf.common.names import did_you_mean
from rlhf.common.numbers import is_number
from rlhf.common.plugins import short_name
from rlhf.common.registry import Registry
from rlhf.common.user_code import (
    check_accepts_arguments,
    definition_location_text,
    guarded_call,
    warn_if_argument_changed,
)
from rlhf.errors import UserError
from rlhf.runs.directory import Run


@dataclass(frozen=True)
class TrainingEvent:
    """The argument of a callback.

    Example:
        >>> def count_down(event):
        ...     event.log({"mine/steps_left": event.num_steps - event.step})
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.rloo(
        ...     model=scratch, env="text/Echo-v0", num_steps=1, callbacks=count_down
        ... )
        >>> run.metrics["mine/steps_left"].tolist()
        [0.0]
    """

    run: Run
    """The run; ``run.directory`` is its directory."""
    step: int
    """Number of training steps that are done."""
    num_steps: int
    """Number of training steps of the run."""
    model: Any
    """The model in training."""
    tokenizer: Any
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Metrics of the step, as in metrics.jsonl; empty if the step is not logged, and in
    ``on_checkpoint`` and ``on_end``."""
    folder: Path | None = None
    """Folder of the checkpoint, or of the final model at the end."""
    _callbacks: Callbacks | None = None

    def log(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write further metrics of this step to metrics.jsonl and to the trackers.

        Args:
            metrics: Name -> number, also of numpy or a tensor of one element. The names must differ
                from those of the metrics of the event.

        Raises:
            ValueError: The metrics are not a mapping, or a name or a value is not valid.
        """
        if not is_mapping(metrics):
            raise ValueError(f"event.log: give a mapping, got {type(metrics).__name__}")
        numbers = {name: self._number(name, metrics[name]) for name in metrics}
        self.run.log(self.step, numbers)

    def _number(self, name: str, value: Any) -> float:
        """Return a value of `log` as a plain number.

        Raises:
            ValueError: The name is not valid, or the value is not a number.
        """
        if not isinstance(name, str) or not name:  # type: ignore[redundant-expr]
            raise ValueError(f"event.log: the name of a metric must be a text, got {name!r}")
        if name in self.metrics or name in ("step", "time"):
            raise ValueError(f"event.log: {name!r} is a metric of the run: choose another name")
        if not isinstance(value, str | bytes):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                return value if is_number(value) else float(value)
        raise ValueError(f"event.log: {name} must be a number, got {type(value).__name__}")

    def stop(self) -> None:
        """End training after this step. The final model is saved and evaluated as usual.

        The checkpoint of the step records the end, so that a resumed run takes no further step.
        """
        if self._callbacks is not None:
            self._callbacks.stopped = True


class Callback:
    """Base class of callbacks. A subclass overrides the methods that it needs.

    If it also overrides ``state_dict`` and ``load_state_dict``, its state is part of checkpoints.

    Example:
        >>> class StopEarly(rlhf.Callback):
        ...     def on_step(self, event):
        ...         event.stop()
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.rloo(
        ...     model=scratch, env="text/Echo-v0", num_steps=3, callbacks=[StopEarly()]
        ... )
        >>> len(run.metrics)
        1
    """

    def on_step(self, event: TrainingEvent) -> None:
        """Called after every training step. The metrics of a logged step are written before."""

    def on_evaluation(self, event: TrainingEvent) -> None:
        """Called after every evaluation during training, with its metrics ``eval/...``."""

    def on_checkpoint(self, event: TrainingEvent) -> None:
        """Called after a checkpoint is written to ``event.folder``."""

    def on_end(self, event: TrainingEvent) -> None:
        """Called when the trained model is saved in ``event.folder`` and evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the callback as plain data, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""


CALLBACK_METHODS = ("on_step", "on_evaluation", "on_checkpoint", "on_end")
"""Names of the methods of `Callback` that are called during training."""

CALLBACKS: Registry[Any] = Registry("callback")
"""Name -> subclass of `Callback`, or function of a `TrainingEvent`.
`rlhf.plugins.register_callback` adds a callback."""


class FunctionCallback(Callback):
    """Calls a function after every training step.

    Args:
        function: Function of a `TrainingEvent`.
    """

    def __init__(self, function: Callable[[TrainingEvent], Any]) -> None:
        self.on_step = function  # type: ignore[method-assign,assignment]


class Callbacks:
    """The callbacks of a run.

    Args:
        entries: ``callbacks`` of the configuration; see `make_callback`.
    """

    def __init__(self, entries: Sequence[Any] = ()) -> None:
        self.members = [make_callback(entry) for entry in entries]
        self.names = [_name_of(entry) for entry in entries]
        self.stopped = False
        """Whether a callback ended training."""

    def __bool__(self) -> bool:
        return bool(self.members)

    def notify(self, method: str, run: Run, **fields: Any) -> None:
        """Call a method of every callback, in the process that writes the run directory.

        Args:
            method: One of `CALLBACK_METHODS`.
            run: The run.
            fields: Other fields of the `TrainingEvent`.

        Raises:
            UserError: A callback raised an exception.
        """
        if not run.writes:
            return
        for name, callback in zip(self.names, self.members, strict=True):
            metrics = fields.get("metrics", {})
            event_fields: dict[str, Any] = {**fields, "metrics": dict(metrics)}
            event = TrainingEvent(run, **event_fields, _callbacks=self)
            call = getattr(callback, method)
            with _callback_call(call, name, f"in {method} at step {event.step}"):
                call(event)
            what, argument = f"callback {name}", "event.metrics"
            warn_if_argument_changed(
                metrics, event.metrics, what=what, code=call, argument=argument
            )

    def state_dict(self) -> dict[str, Any]:
        """Return index -> state of the callbacks that have a state, and whether one ended training.

        Raises:
            UserError: A state is not plain data.
        """
        states: dict[str, Any] = {"stopped": True} if self.stopped else {}
        for index, (name, member) in enumerate(zip(self.names, self.members, strict=True)):
            with _callback_call(member.state_dict, name, "in state_dict"):
                state = member.state_dict()
            if state:
                _check_state(state, name, member.state_dict)
                states[str(index)] = state
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self.stopped = state.get("stopped", False)
        for index, member_state in state.items():
            if index == "stopped":
                continue
            load = self.members[int(index)].load_state_dict
            with _callback_call(load, self.names[int(index)], "in load_state_dict"):
                load(member_state)


@contextlib.contextmanager
def _callback_call(code: Any, name: str, where: str) -> Generator[None]:
    """Return a context manager for a call of a callback.

    Raises:
        UserError: The callback raised an exception.
    """
    advice = "move slow work to another process"
    try:
        with guarded_call(code, what=f"callback {name}", advice=advice), restored_process_state():
            yield
    except Exception as error:
        raise UserError(
            f"callback {name} failed {where}: {describe_exception(error)}; correct the callback"
        ) from error


def _check_state(state: Any, name: str, state_dict: Any) -> None:
    """Check that a checkpoint, which is JSON, returns the state of a callback as it is.

    Raises:
        UserError: The state is not plain data.
    """
    reason = (
        _reason_not_plain_data(state) if is_mapping(state) else f"it is a {type(state).__name__}"
    )
    if reason:
        raise UserError(
            f"callback {name}: state_dict{definition_location_text(state_dict)} returned a state "
            f"that cannot be saved ({reason}): return numbers, texts, lists and dictionaries"
        )


def _reason_not_plain_data(value: Any) -> str | None:
    """Return the reason why a value in a state is not plain data; None if it is."""
    if is_mapping(value):
        if other := [key for key in value if not isinstance(key, str)]:
            return f"the key {other[0]!r} is not a text"
        return next(filter(None, map(_reason_not_plain_data, value.values())), None)
    if isinstance(value, list):
        return next(filter(None, map(_reason_not_plain_data, cast("list[Any]", value))), None)
    if value is None or isinstance(value, str | int | float):
        return None
    return f"a value is of type {type(value).__name__}"


def make_callback(entry: Any) -> Callback:
    """Return the callback of an entry of ``callbacks``.

    Args:
        entry: The name of a registered callback, ``file.py:name`` or ``module:name``; or a mapping
            with this text as ``callback`` and with keyword arguments.

    Raises:
        UserError: The entry is invalid, or the callback cannot be made.
    """
    arguments: dict[str, Any] = dict(entry) if is_mapping(entry) else {}
    reference: Any = arguments.pop("callback", None) if is_mapping(entry) else entry
    if not isinstance(reference, str):
        raise UserError(
            f"callbacks: expected a name, file.py:name or {{callback: file.py:name, ...}}, got "
            f"{entry!r}"
        )
    if reference not in CALLBACKS and ":" not in reference:
        CALLBACKS.require(reference)
    target = CALLBACKS.get(reference) or import_object(reference, what="callbacks")
    try:
        with guarded_call(target, what=f"callback {_name_of(entry)}"):
            callback = target(**arguments) if isinstance(target, type) else target
    except Exception as error:
        raise UserError(
            f"callbacks: {_name_of(entry)} cannot be made: {describe_exception(error)}"
        ) from error
    if isinstance(callback, Callback):
        _check_methods(callback, reference)
        return callback
    if isinstance(target, type) or not callable(callback):
        raise UserError(
            f"callbacks: {_name_of(entry)} must be a function, or a subclass of rlhf.Callback"
        )
    function = functools.partial(callback, **arguments)
    what = f"callbacks: {_name_of(entry)}"
    check_accepts_arguments(function, (None,), what=what, required_signature="callback(event)")
    return FunctionCallback(function)


def _check_methods(callback: Callback, reference: str) -> None:
    """Check the names of the methods ``on_...`` and the arguments of all called methods.

    Raises:
        UserError: A method ``on_...`` is never called, or a method has other arguments.
    """
    arguments = {"state_dict": "self", "load_state_dict": "self, state"}
    for name in dir(callback):
        if name in CALLBACK_METHODS or name in arguments:
            signature = arguments.get(name, "self, event")
            check_accepts_arguments(
                getattr(callback, name),
                (None,) * signature.count(","),
                what=f"callbacks: {short_name(reference)}: {name}",
                required_signature=f"{name}({signature})",
            )
        elif name.startswith("on_"):
            listed = f"; the methods are {', '.join(CALLBACK_METHODS)}"
            hint = did_you_mean(name, CALLBACK_METHODS) or listed
            raise UserError(
                f"callbacks: {reference} has a method {name}, which is never called{hint}"
            )


def _name_of(entry: Any) -> str:
    """Return the name of a callback for messages, without the folder of its file."""
    return short_name(str(entry.get("callback") if is_mapping(entry) else entry))
