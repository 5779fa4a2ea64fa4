"""The limits of functions and files that CONTRIBUTING.md states."""

import ast

from tests.test_imports import MODULES

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def lines_without_docstring(node):
    """Number of lines of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    return lines - (node.body[0].end_lineno - node.body[0].lineno + 1)


def test_functions_have_at_most_60_lines():
    lengths = {
        f"{module}:{node.name}": lines_without_docstring(node)
        for module, text in TEXTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_files_have_at_most_800_lines():
    lengths = {module: len(text.splitlines()) for module, text in TEXTS.items()}
    assert {module: lines for module, lines in lengths.items() if lines > 800} == {}
