"""Send messages between a program and its tests, one JSON object per line."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20
PROGRAM_ENDED = 2
"""Exit status of the tests' process if the program ended before the tests."""

UNARY: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__bool__": bool,
    "__str__": str,
    "__repr__": repr,
    "__iter__": iter,
    "__next__": next,
    "__neg__": operator.neg,
    "__abs__": abs,
    "__enter__": lambda value: type(value).__enter__(value),
}
"""Special methods without arguments."""
KEYED: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__call__": lambda value, *args, **keywords: value(*args, **keywords),
    "__exit__": lambda value, *error: type(value).__exit__(value, *error),
}
"""Special methods whose arguments are keys or inputs; the arguments are sent to the program."""
_OPERATORS = "eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor"
BINARY: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__") for name in _OPERATORS.split()
} | {"__instancecheck__": lambda kind, value: isinstance(value, kind)}
"""Special methods whose argument may be an expected value. The argument is sent to the program only
if it is an object of the program."""


class Channel:
    """A connected socket to the other process.

    Args:
        descriptor: File descriptor of the socket.
    """

    def __init__(self, descriptor: int):
        self._reader = os.fdopen(descriptor, "rb")
        self._writer = os.fdopen(descriptor, "wb", closefd=False)

    def send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()

    def receive(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            EOFError: The other process has ended.
            ValueError: The message is too long or not a JSON object.
            RecursionError: The message is nested too deeply.
        """
        line = self._reader.readline(MAX_MESSAGE_BYTES)
        if not line:
            raise EOFError("the other process has ended")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a message is not a JSON object")
        return message
