"""Prevent the tests from executing harmful text or bytes that the program returned.

A test such as ``assert eval(f(24)) == 24`` evaluates text of the program in the process whose exit
status is the result. The text ``__import__("os")._exit(0)`` would pass this test.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Set
from typing import Any

_SAFE_NODES = (
    *(ast.Expression, ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.Name, ast.expr_context),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.operator, ast.unaryop),
    *(ast.boolop, ast.cmpop, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Subscript, ast.Slice),
    *(ast.Call, ast.keyword, ast.Starred, ast.Lambda, ast.arguments, ast.arg, ast.ListComp),
    *(ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Attribute),
)
_SAFE_FUNCTIONS = frozenset(
    [
        *("abs", "all", "any", "bool", "complex", "dict", "divmod", "enumerate", "float"),
        *("frozenset", "int", "len", "list", "max", "min", "pow", "range", "reversed", "round"),
        *("set", "sorted", "str", "sum", "tuple", "zip"),
    ]
)
_SAFE_PICKLES = frozenset(
    [
        *("builtins.complex", "builtins.bytearray", "builtins.frozenset", "builtins.range"),
        *("builtins.xrange", "builtins.bytes"),
        *("builtins.set", "builtins.slice", "collections.Counter", "collections.OrderedDict"),
        *("collections.defaultdict", "collections.deque", "_codecs.encode"),
        *("copyreg._reconstructor", "builtins.object", "builtins.list", "builtins.dict"),
        *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta"),
        *("datetime.timezone", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
        *("numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct"),
        *("numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer"),
    ]
)
"""Names in pickles that create plain data."""


class ProgramTextError(Exception):
    """Error for tests that execute text or bytes of the program."""


class ExecutionGuard:
    """Replaces ``compile``, ``eval`` and ``exec`` of the tests; harmful text is rejected.

    A text is executed if it is a constant in the source of the tests that is not a single name, or
    if it is an expression of plain operators and of functions of numbers and collections. Before
    the program has returned any text, every text is executed.

    Args:
        tests: Source of the tests.
        builtins_of_tests: Builtins of the tests, to which the guarded functions are added.
        program_sent_text: Function that returns whether the program has returned a text or bytes.
    """

    def __init__(
        self, tests: str, builtins_of_tests: dict[str, Any], program_sent_text: Callable[[], bool]
    ) -> None:
        constants = (n for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Constant))
        texts = (node.value.split() for node in constants if isinstance(node.value, str))
        # The program could return a name of the tests, such as the one of the expected value.
        self._texts = [
            words for words in texts if not (len(words) == 1 and words[0].isidentifier())
        ]
        self._program_sent_text = program_sent_text
        self._builtins = builtins_of_tests
        builtins_of_tests["compile"] = self._compile
        builtins_of_tests["eval"] = self._guarded_function(eval)
        builtins_of_tests["exec"] = self._guarded_function(exec)
        sys.addaudithook(_check_loaded_bytes)

    def _compile(self, source: Any, *args: Any, **keywords: Any) -> Any:
        self._require_harmless_source(source, None)
        return compile(source, *args, **keywords)

    def _guarded_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the guarded version of ``eval`` or ``exec``.

        Like the builtin, it uses the variables of the calling code if no ``globals`` are given.
        """

        def guarded(
            source: Any,
            globals: dict[str, Any] | None = None,
            locals: Any = None,
            **keywords: Any,
        ) -> Any:
            self._require_harmless_source(source, globals)
            if globals is None:
                frame = sys._getframe(1)
                globals = frame.f_globals
                if locals is None and frame.f_locals is not globals:
                    locals = frame.f_locals
            globals.setdefault("__builtins__", self._builtins)
            return function(source, globals, locals, **keywords)

        return guarded

    def _require_harmless_source(self, source: Any, variables: Any) -> None:
        """Raise ProgramTextError if a source may be from the program and is not harmless.

        ``variables`` are the globals that the caller gives for the source, or None.
        """
        if not self._program_sent_text() or not isinstance(
            source, str | bytes | bytearray | memoryview
        ):
            return
        text = source if isinstance(source, str) else bytes(source).decode(errors="replace")
        if text.split() in self._texts:
            return
        names = variables.keys() if type(variables) is dict and "__name__" not in variables else ()
        if not _is_harmless(text, {str(name) for name in names}):
            raise ProgramTextError("the tests execute text that the program returned")


def _is_harmless(text: str, variables: set[str]) -> bool:
    """Return whether a text is an expression that uses only ``variables`` and safe functions."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if bound & (_SAFE_FUNCTIONS | {"math"}):
        return False
    known = _SAFE_FUNCTIONS | bound | (variables - {"__builtins__"})
    return all(_is_harmless_node(node, known | {"math"}) for node in nodes)


def _is_harmless_node(node: ast.AST, names: Set[str]) -> bool:
    """Return whether a node of an expression is harmless.

    Its name must be one of ``names``, an attribute must be one of ``math``, and a called function
    must be safe or one of ``math``.
    """
    if isinstance(node, ast.Attribute):
        is_math = isinstance(node.value, ast.Name) and node.value.id == "math"
        return is_math and not node.attr.startswith("_")
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in _SAFE_FUNCTIONS
    is_other_call = isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute)
    return isinstance(node, _SAFE_NODES) and not is_other_call


def _check_loaded_bytes(event: str, values: tuple[Any, ...]) -> None:
    """Audit hook: raise ProgramTextError if the tests load code from bytes.

    Pickles may name only plain data and classes of the tests. Only imports may load marshaled data.
    """
    if event == "pickle.find_class":
        module, name = values
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        kind = getattr(sys.modules["__main__"], name, None) if module == "__main__" else None
        is_class_of_tests = isinstance(kind, type) and kind.__module__ == "__main__"
        if f"{module}.{name}" not in _SAFE_PICKLES and not is_class_of_tests:
            raise ProgramTextError(f"the tests load {module}.{name} from bytes")
    if event in ("marshal.loads", "marshal.load"):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith(("importlib.", "_frozen_importlib", "zipimport")):
            raise ProgramTextError("the tests load code from bytes")


def contains_text(data: Any) -> bool:
    """Return whether the JSON form of a value contains a text or bytes (see `plain.encode`)."""
    if isinstance(data, str):
        return True
    if isinstance(data, Mapping):
        [(kind, content)] = data.items()
        is_text = kind not in ("object", "int", "array", "callback", "builtin exception")
        return is_text and contains_text(content)
    return isinstance(data, list) and any(map(contains_text, data))
