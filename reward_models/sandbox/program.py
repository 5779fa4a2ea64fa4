"""Run a submitted program in its own process, and then perform operations for its tests.

The program can change everything in this process. The tests and their expected values are therefore
not sent to the process; it receives only the arguments of one operation at a time.
"""

from __future__ import annotations

import builtins
import sys
import types
from collections import deque
from typing import Any

from .channel import BINARY, KEYED, UNARY, Channel
from .confinement import read_task_and_confine
from .plain import decode, encode

_OPERATIONS = UNARY | KEYED | BINARY


class ProgramObjectServer:
    """Perform operations on the objects of a program.

    Args:
        channel: Connection to the process of the tests.
        namespace: Global names of the program.
    """

    def __init__(self, channel: Channel, namespace: dict[str, Any]):
        self.channel, self.namespace = channel, namespace
        self.objects: list[Any] = []
        self.handles: dict[int, int] = {}

    def serve(self) -> None:
        """Perform operations until the tests end."""
        while True:
            try:
                request = self.channel.receive()
            except EOFError:
                return
            self.channel.send(self._perform_request(request))

    def _perform_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Perform an operation and return the response.

        The response contains the result and the changed arguments, or the raised exception.
        """
        try:
            values = [self.decode(item) for item in request["arguments"]]
            keywords = {name: self.decode(item) for name, item in request["keywords"].items()}
            if request["operation"] == "global":
                result = self.namespace[values[0]]
            else:
                result = _OPERATIONS[request["operation"]](*values, **keywords)
            inputs = request["arguments"] + list(request["keywords"].values())
            return {
                "value": self.encode(result),
                "changed": self._changed_arguments(inputs, [*values, *keywords.values()]),
            }
        except BaseException as error:
            return {
                "raise": self.encode(type(error)),
                "arguments": [self.encode(item) for item in error.args],
            }

    def _changed_arguments(
        self, encoded_before: list[Any], values_after: list[Any]
    ) -> list[list[Any]]:
        """Return [position, new content] of each mutable argument that an operation has changed.

        ``encoded_before`` are the arguments in their JSON form before the operation, and
        ``values_after`` the arguments after it.
        """
        changed = []
        for i, (before, value) in enumerate(zip(encoded_before, values_after, strict=True)):
            is_array = type(value).__name__ == "ndarray"
            if is_array or isinstance(value, list | dict | set | bytearray | deque):
                after = self.encode(value)
                if after != before:
                    changed.append([i, after])
        return changed

    def encode(self, value: Any) -> Any:
        return encode(value, self._reference_to)

    def decode(self, data: Any) -> Any:
        return decode(data, self._value_of_reference)

    def _reference_to(self, value: Any) -> dict[str, Any]:
        """Return the reference of a value that is not plain, see `encode`.

        A value that is sent for the first time is added to ``objects``, so that it stays alive.
        """
        if isinstance(value, TestFunctionProxy):
            return {"callback": value.number}
        is_exception = isinstance(value, type) and issubclass(value, BaseException)
        if is_exception and getattr(builtins, value.__name__, None) is value:
            return {"builtin exception": value.__name__}
        handle = self.handles.setdefault(id(value), len(self.objects))
        if handle == len(self.objects):
            self.objects.append(value)
        if is_exception:
            base = next(base for base in value.__bases__ if issubclass(base, BaseException))
            return {"exception": [handle, value.__name__, self.encode(base)]}
        return {"object": handle}

    def _value_of_reference(self, kind: str, content: Any) -> Any:
        """Return the value of a reference, see `decode`."""
        if kind == "object":
            return self.objects[content]
        if kind == "builtin exception":
            return getattr(builtins, content)
        return TestFunctionProxy(self, content)


class TestFunctionProxy:
    """Proxy of a function of the tests that was passed to the program as an argument."""

    def __init__(self, server: ProgramObjectServer, number: int):
        self.server, self.number = server, number

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        channel, encode = self.server.channel, self.server.encode
        channel.send(
            {
                "callback": self.number,
                "arguments": [encode(item) for item in args],
                "keywords": {name: encode(item) for name, item in keywords.items()},
            }
        )
        # The function may request operations of the program before it returns.
        while "operation" in (reply := channel.receive()):
            channel.send(self.server._perform_request(reply))
        if "raise" in reply:
            raise self.server.decode(reply["raise"])(
                *[self.server.decode(item) for item in reply["arguments"]]
            )
        return self.server.decode(reply["value"])


def main() -> None:
    """Run the program of the task, then perform operations for its tests."""
    task = read_task_and_confine()
    channel = Channel(task["channel"])
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(task["code"], "<program>", "exec", dont_inherit=True), module.__dict__)
    channel.send({"ready": True})
    ProgramObjectServer(channel, module.__dict__).serve()
