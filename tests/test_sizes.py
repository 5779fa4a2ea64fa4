"""The limits of functions and files that CONTRIBUTING.md states."""

import ast

from tests.test_imports import MODULES

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def test_functions_have_at_most_60_lines():
    long = {
        f"{module}:{node.name}": node.end_lineno - node.lineno + 1
        for module, text in TEXTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    }
    assert long == {}


def test_files_have_at_most_800_lines():
    lengths = {module: len(text.splitlines()) for module, text in TEXTS.items()}
    assert {module: lines for module, lines in lengths.items() if lines > 800} == {}
