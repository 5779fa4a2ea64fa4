"""Read the tests of a program, and refuse tests that every program passes."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache

from rlhf.reward_models.core import Unscorable

_DISCARDED = (ast.Compare, ast.BoolOp, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set)


def join_and_check_tests(parts: Sequence[str]) -> str:
    """Check tests and join them to one Python source.

    A part can be the JSON text of a list of tests, as in the cells of a CSV file.

    Raises:
        Unscorable: The tests are not Python source, or cannot fail.
    """
    source = "\n".join(test for part in parts for test in _tests_in(part))
    if reason := why_tests_cannot_fail(source):
        raise Unscorable(reason)
    return source


def _tests_in(text: str) -> list[str]:
    """Return the tests in the JSON text of a list; any other text is itself the only test."""
    if text.lstrip()[:1] == "[":
        try:
            tests = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            return [text]
        if tests and all(isinstance(test, str) for test in tests):
            return tests
    return [text]


@lru_cache(maxsize=4096)
def why_tests_cannot_fail(source: str) -> str:
    """Return why tests are not Python source or cannot fail; an empty string if they can fail.

    Tests can fail if they execute an ``assert``, a ``raise`` or a call. The bodies of functions and
    methods are not executed unless a call follows. Comparisons without ``assert`` and the calls in
    them are results that are thrown away, and so are calls of ``print``.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are not Python source ({type(error).__name__})"
    executed = list(_executed_nodes(tree.body))
    if any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in executed):
        return ""
    functions = [n.name for n in executed if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = [node.name for node in executed if isinstance(node, ast.ClassDef)]
    if uncalled := functions or classes:
        return f"the tests define {uncalled[0]}, but do not call it"
    return "the tests have no assert, so every program passes them"


def _executed_nodes(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes that are executed with a body, without those that cannot fail."""
    stack = list(body)
    while stack:
        node = stack.pop()
        if _is_discarded(node):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        stack += ast.iter_child_nodes(node)


def _is_discarded(node: ast.AST) -> bool:
    """Return whether a node is an assertion that cannot fail, or a result that is thrown away."""
    if isinstance(node, ast.Assert):
        is_filled_tuple = isinstance(node.test, ast.Tuple) and bool(node.test.elts)
        return is_filled_tuple or (isinstance(node.test, ast.Constant) and bool(node.test.value))
    if not isinstance(node, ast.Expr):
        return False
    value = node.value
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Name):
            return value.func.id == "print"
        return any(  # `unittest.main(exit=False)` returns a result, which is thrown away
            word.arg == "exit" and isinstance(word.value, ast.Constant) and not word.value.value
            for word in value.keywords
        )
    return isinstance(value, _DISCARDED)
