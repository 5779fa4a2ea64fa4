"""Run the tests of a program in a separate process, and determine whether the program passes.

The program runs in another process. In the process of the tests, which runs this module, the names
of the program refer to `RemoteObject` objects or plain data. The program receives the arguments of
its calls, but never the values with which the tests compare its results.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import os
import sys
import traceback
import types
from collections import deque
from typing import Any, NoReturn

from .channel import BINARY, KEYED, PROGRAM_ENDED, UNARY, Channel
from .confinement import read_task_and_confine
from .plain import decode, encode
from .program_text import ExecutionGuard, contains_text

_TESTS = "<tests>"
"""File name of the code of the tests."""
_ITERATOR_METHODS = frozenset({"__next__", "send", "throw"})
_MEMORY_ATTRIBUTES = frozenset({"__array_interface__", "__array_struct__"})
"""Attributes with an address in memory, which numpy would read in the process of the tests."""
_NOT_REDEFINED = frozenset(
    [
        *("__import__", "breakpoint", "compile", "eval", "exec", "exit", "getattr", "globals"),
        *("isinstance", "locals", "open", "print", "quit", "setattr", "vars"),
    ]
)
"""Builtins that a program cannot replace, because it could prevent the tests from running."""
_MODULES = {name: name for name in (*sys.stdlib_module_names, "numpy")} | {"np": "numpy"}


class ProgramProxy:
    """Proxy of the program's process for the tests.

    The process of the tests ends if the program ends, or if the program sends a message that
    `ProgramObjectServer` cannot have sent. No exception is raised in these cases, because the tests
    could catch it.

    Args:
        channel: Connection to the program.
    """

    def __init__(self, channel: Channel):
        self.channel = channel
        self.remotes: dict[int, Any] = {}
        self.callbacks: list[Any] = []
        self.has_sent_text = False
        self.stand_ins: dict[type[BaseException], type[BaseException]] = {}
        """Builtin exception class -> its replacement, a subclass, in the tests.

        The classes are those that the program has sent as values, their bases, and, after the
        first of them, those of the exceptions that it raised; see `_stand_in_class`.
        """
        self.iterator_methods: set[int] = set()
        """Handles of the methods of iterators and generators that may end with StopIteration."""
        if self._receive() != {"ready": True}:
            _end_as_failed("the program sent a malformed message")

    def perform(self, operation: str, *args: Any, **keywords: Any) -> Any:
        """Perform an operation in the program's process.

        Arguments that the operation changes in place are updated.

        Args:
            operation: "global", which looks up a global name, or the name of a special method.
            *args: The name for "global"; for a special method, the object and the arguments.
            **keywords: Keyword arguments.

        Returns:
            The result of the operation.

        Raises:
            TypeError: An argument cannot be passed to the program.
            RuntimeError: The operation raised StopIteration outside of an iteration, or IndexError
                in a method ``__getitem__`` of the tests.
            BaseException: Any other exception that the operation raised.
        """
        self._send(
            {
                "operation": operation,
                "arguments": [self._encode(item) for item in args],
                "keywords": {name: self._encode(item) for name, item in keywords.items()},
            }
        )
        while "callback" in (reply := self._receive()):
            self._send(self._run_callback(reply))
        try:
            error = self._decode_exception(reply) if "raise" in reply else None
            result = None if error else self._decode(reply["value"])
            values = [*args, *keywords.values()]
            for i, content in reply.get("changed", []):
                _update_argument(values[i], self._decode(content))
        except Exception:
            _end_as_failed("the program sent a malformed message")
        if error is None:
            is_method = operation == "__getattr__" and args[1] in _ITERATOR_METHODS
            if is_method and isinstance(result, RemoteObject):
                self.iterator_methods.add(_handle_of(result))
            return result
        # StopIteration would end a `map` or `zip` of the tests without an error. IndexError would
        # end the iteration over an object of the tests with `__getitem__` and without `__iter__`.
        iterates = operation == "__next__" or (
            operation == "__call__" and _handle_of(args[0]) in self.iterator_methods
        )
        error.__raised_by_program__ = True  # type: ignore[attr-defined]
        if isinstance(error, StopIteration | StopAsyncIteration) and not iterates:
            is_async = isinstance(error, StopAsyncIteration)
            raise RuntimeError(f"the program raised Stop{'Async' * is_async}Iteration")
        if isinstance(error, IndexError) and _is_in_method_of_tests("__getitem__"):
            raise RuntimeError("the program raised IndexError in __getitem__ of the tests")
        raise error

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except OSError:
            _end_as_failed("the program ended before its tests", status=PROGRAM_ENDED)

    def _receive(self) -> dict[str, Any]:
        try:
            return self.channel.receive()
        except (EOFError, ConnectionError):
            _end_as_failed("the program ended before its tests", status=PROGRAM_ENDED)
        except (ValueError, RecursionError, MemoryError, OSError):
            _end_as_failed("the program sent a malformed message")

    def _run_callback(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the tests that the program requests; return the response.

        An exception of the function is sent as its most derived builtin base class and its text.
        """
        try:
            function = self.callbacks[request["callback"]]
            args = [self._decode(item) for item in request["arguments"]]
            keywords = {name: self._decode(item) for name, item in request["keywords"].items()}
        except Exception:
            _end_as_failed("the program sent a malformed message")
        try:
            return {"value": self._encode(function(*args, **keywords))}
        except Exception as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
            return {"raise": {"builtin exception": kind.__name__}, "arguments": [str(error)]}

    def _decode_exception(self, reply: dict[str, Any]) -> BaseException:
        """Return the exception that the program's response describes."""
        kind = self._decode_exception_class(reply["raise"])
        args = self._decode(reply["arguments"])
        try:
            return kind(*args)
        except TypeError:  # the arguments of the constructor differ from the exception's `args`
            error = kind.__new__(kind)
            error.args = tuple(args)
            return error

    def _decode_exception_class(self, data: dict[str, Any]) -> Any:
        """Return the described class: that of a raised exception, or one of its bases.

        Builtin classes are returned unchanged until the program has sent a builtin exception class
        as a value; afterwards, their stand-ins are returned, see `_stand_in_class`.
        """
        builtin = data.get("builtin exception")
        if builtin is None or self.stand_ins:
            return self._decode(data)
        return _checked_exception_class(getattr(builtins, builtin))

    def _encode(self, value: Any) -> Any:
        return encode(value, self._reference_to)

    def _decode(self, data: Any) -> Any:
        self.has_sent_text = self.has_sent_text or contains_text(data)
        return decode(data, self._value_of_reference)

    def _reference_to(self, value: Any) -> dict[str, Any]:
        """Return the reference of a value that is not plain; see `encode`.

        A function of the tests, or another callable object, is added to ``callbacks``.

        Raises:
            TypeError: The value cannot be passed to the program.
        """
        if isinstance(value, RemoteObject):
            return {"object": _handle_of(value)}
        if isinstance(value, type) and issubclass(value, BaseException):
            builtin = getattr(builtins, value.__name__, value)
            if value in (builtin, self.stand_ins.get(builtin)) and hasattr(
                builtins, value.__name__
            ):
                return {"builtin exception": value.__name__}
        if not callable(value):
            raise TypeError(f"a {type(value).__name__} cannot be passed to the program")
        self.callbacks.append(value)
        return {"callback": len(self.callbacks) - 1}

    def _value_of_reference(self, kind: str, content: Any) -> Any:
        """Return the value of a reference; see `decode`.

        The same object of the program always has the same `RemoteObject` or class.

        Raises:
            ValueError: The kind or the content is invalid.
        """
        if kind == "object":
            return self.remotes.setdefault(int(content), RemoteObject(self, int(content)))
        if kind == "callback":
            return self.callbacks[content]
        if kind == "builtin exception":
            return self._stand_in_class(_checked_exception_class(getattr(builtins, content)))
        if kind == "exception":
            handle, name, base = content
            kind_of_base = _checked_exception_class(self._decode_exception_class(base))
            return self.remotes.setdefault(int(handle), type(name, (kind_of_base,), {}))
        raise ValueError(f"unknown kind {kind!r}")

    def _stand_in_class(self, kind: type[BaseException]) -> type[BaseException]:
        """Return the subclass that replaces a builtin exception class which the program has sent.

        Otherwise, with ``MyError = Exception`` in the program, ``except MyError`` in the tests
        would also catch the AssertionError of a failed test. While an exception of the program is
        handled, ``kind`` itself is returned. The stand-ins have the hierarchy of the builtin
        exceptions. From the first one on, the exceptions that the program raises are instances of
        stand-ins.
        """
        if getattr(sys.exception(), "__raised_by_program__", False):  # its `except` clause
            return kind
        if kind not in self.stand_ins:
            bases = (self._stand_in_class(base) for base in kind.__bases__ if base is not object)
            self.stand_ins[kind] = type(kind.__name__, (kind, *bases), {"__module__": "builtins"})
        return self.stand_ins[kind]


def _checked_exception_class(value: Any) -> type[BaseException]:
    """Return ``value``; raise ValueError if it is not an exception class."""
    if not (isinstance(value, type) and issubclass(value, BaseException)):
        raise ValueError("not an exception")
    return value


def _is_in_method_of_tests(name: str) -> bool:
    """Return whether the innermost function of the tests that is running has this name."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _TESTS:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == name


def _update_argument(argument: Any, content: Any) -> None:
    """Replace the content of a mutable argument by the content of the program's copy.

    Args:
        argument: A list, deque, bytearray, dict, set or array, or an instance of a subclass.
        content: The new content, of the same class or of its base class.

    Raises:
        ValueError: The types or the shapes of arrays differ, or the argument is immutable.
    """
    if not isinstance(argument, type(content)):
        raise ValueError("the content has another type than the argument")
    if isinstance(argument, list | bytearray):
        argument[:] = content
    elif isinstance(argument, dict | set | deque):
        argument.clear()
        if isinstance(argument, dict):
            for key, value in content.items():
                argument[key] = value
        elif isinstance(argument, set):
            argument.update(content)
        else:
            argument.extend(content)
    elif type(content).__name__ == "ndarray" and argument.shape == content.shape:
        argument[...] = content
    else:
        raise ValueError("the argument is immutable")


def _end_as_failed(reason: str, status: int = 1) -> NoReturn:
    """Write the reason to stdout and end this process with an exit status that is not 0."""
    sys.stdout.flush()
    os.write(1, f"{reason}\n".encode(errors="backslashreplace"))
    os._exit(status)


class RemoteObject:
    """An object of the program that is not plain data.

    Attributes, calls and operators of the object are evaluated in the program's process. This does
    not hold for binary operators whose other operand is plain data: ``==`` is False, and ``<``
    raises TypeError. Otherwise, the program would receive the expected value, and it could claim
    that its object is equal.
    """

    __slots__ = ("_handle", "_program")
    __hash__ = object.__hash__

    def __init__(self, program: ProgramProxy, handle: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_handle", handle)


def _handle_of(remote: RemoteObject) -> int:
    return object.__getattribute__(remote, "_handle")


def _make_remote_method(name: str, needs_remote: bool) -> Any:
    """Return a special method for `RemoteObject` that calls the object's method in the program.

    Args:
        name: Name of the special method.
        needs_remote: Whether the first argument must be a `RemoteObject`. For other arguments, the
            program is not called.
    """

    def method(self: RemoteObject, *args: Any, **keywords: Any) -> Any:
        if needs_remote and not isinstance(args[0], RemoteObject):
            return False if name == "__instancecheck__" else NotImplemented
        if name == "__getattr__" and args[0] in _MEMORY_ATTRIBUTES:
            raise AttributeError(args[0])
        program = object.__getattribute__(self, "_program")
        return program.perform(name, self, *args, **keywords)

    return method


for _name in UNARY | KEYED | BINARY:
    setattr(RemoteObject, _name, _make_remote_method(_name, needs_remote=_name in BINARY))


class BuiltinsOfTests(dict[str, Any]):
    """Builtins of the tests; a name that the tests do not define is looked up in the program.

    There are two exceptions. Modules such as ``math`` in ``math.isclose`` are imported in this
    process. A builtin is looked up in the program only if the tests use no other name of the
    program (``builtin_redefined_by_program``). ``program.sum`` is always the program's ``sum``.

    Args:
        program: The program.
        tests: Syntax tree of the tests.
    """

    def __init__(self, program: ProgramProxy, tests: ast.Module):
        super().__init__(vars(builtins))
        self._program = program
        self.pop(builtin_redefined_by_program(tests) or "", None)
        for node in ast.walk(tests):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self._define_if_program_or_module(node.value.id)

    def _define_if_program_or_module(self, name: str) -> None:
        """Define a name that the tests use as ``name.attribute``.

        Only ``program``, modules of the standard library and numpy are defined.
        """
        if name == "program":
            self[name] = _ProgramGlobals(self._program)
        elif name in _MODULES:
            with contextlib.suppress(ImportError):
                self[name] = importlib.import_module(_MODULES[name])

    def __missing__(self, name: str) -> Any:
        return self._program.perform("global", name)


def builtin_redefined_by_program(tests: ast.Module) -> str | None:
    """Return the name of the builtin that the program must have redefined; None if there is none.

    An example is ``assert sum(10, 15) == 6`` in MBPP 126. If a builtin is the only undefined name
    of the tests besides exceptions and modules, and is not in `_NOT_REDEFINED`, it must be a
    function of the program. Otherwise, the tests would not test the program.
    """
    names = [node for node in ast.walk(tests) if isinstance(node, ast.Name)]
    defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    defined |= {node.arg for node in ast.walk(tests) if isinstance(node, ast.arg)}
    for node in ast.walk(tests):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
    modules = {
        node.value.id
        for node in ast.walk(tests)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & _MODULES.keys()
    used = {node.id for node in names} - defined - modules
    exceptions = {
        name
        for name in used
        if isinstance(getattr(builtins, name, None), type)
        and issubclass(getattr(builtins, name), BaseException)
    }
    [name, *others] = sorted(used - exceptions) or [""]
    redefined = not others and hasattr(builtins, name) and name not in _NOT_REDEFINED
    return name if redefined else None


class _ProgramGlobals(types.SimpleNamespace):
    """The global names of the program as attributes, including those that shadow a builtin.

    A name that the program does not define raises KeyError.
    """

    def __init__(self, program: ProgramProxy):
        super().__init__(_program=program)

    def __getattr__(self, name: str) -> Any:
        return self._program.perform("global", name)


def main() -> None:
    """Run the tests of the task and end the process; the exit status is 0 if the tests pass."""
    status = 1
    try:
        task = read_task_and_confine()
        program = ProgramProxy(Channel(task["channel"]))
        status = _run_tests(task["tests"], program)
        sys.stdout.flush()
    finally:  # an exception of the program, such as SystemExit(0), must not determine the status
        os._exit(status)


def _run_tests(tests: str, program: ProgramProxy) -> int:
    """Run the tests as the module ``__main__``, which `unittest.main` examines.

    Returns:
        0 if the tests end without an exception, or with the successful end of `unittest.main`. If
        they fail, the process ends with the exit status 1.
    """
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    names = module.__dict__["__builtins__"] = BuiltinsOfTests(program, ast.parse(tests))
    ExecutionGuard(tests, names, lambda: program.has_sent_text)
    try:
        exec(compile(tests, _TESTS, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        if not _is_successful_end_of_unittest(error):
            _end_as_failed(_traceback_text())
    return 0


def _is_successful_end_of_unittest(error: BaseException) -> bool:
    """Return whether `unittest.main` ended with an exception after tests that all passed.

    An exception of the program is raised in this module, so it is never such an end.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_frame.f_globals.get("__name__") != "unittest.main":
        return False
    ended = getattr(place.tb_frame.f_locals.get("self"), "result", None)
    return isinstance(error, SystemExit) and not error.code and getattr(ended, "testsRun", 0) > 0


def _traceback_text() -> str:
    """Return the traceback of the current exception.

    The text of an exception of the program can come from the program, which can also raise an
    exception in place of a text. A fixed text is then returned.
    """
    try:
        return traceback.format_exc(limit=3)
    except BaseException:
        return "the tests ended with an exception that cannot be shown"
