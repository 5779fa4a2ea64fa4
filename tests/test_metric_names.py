"""docs/metrics.md describes each metric whose key is written in the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.runs.renamed import RENAMED_METRICS
from rlhf.training.trl.callback import RunCallback

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DOCUMENTED = set(re.findall(r"`((?:\w+/)+\w+)`", PAGE))
NAMESPACES = {key.partition("/")[0] for key in DOCUMENTED}
KEY = re.compile(rf"(?:{'|'.join(NAMESPACES)})(?:/\w+)+")
# Rows `eval/NAME` and `reward/NAME` of the page: the names that the first of them lists, and `env`.
HELD_OUT = {f"eval/{name}" for name in ("return", "success", "cost", "turns", "invalid", "env")}
# Keys that are read but are not metrics of this version.
OTHERS = {key for key in RunCallback.METRIC_NAMES if "/" in key} | RENAMED_METRICS.keys()


def keys_in(tree: ast.AST) -> Iterator[str]:
    """Literal metric keys, and the constant beginnings of those that end with a variable.

    The metrics of a name without a namespace in `MetricSums` are ``train/NAME`` and ``eval/NAME``.
    """
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= set(map(id, node.values))
            if isinstance(begin := node.values[0], ast.Constant):
                words = str(begin.value).split(" ")
                namespace, _, name = words[0].partition("/")
                if namespace in NAMESPACES and name:
                    yield words[0] + ("*" if len(words) == 1 else "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in parts and KEY.fullmatch(node.value):
                yield node.value + ("*" if node.value.endswith("_") else "")
        elif isinstance(node, ast.FunctionDef):
            yield from (f"train/{name}" for name in names_of_sums(node))


def names_of_sums(function: ast.FunctionDef) -> Iterator[str]:
    """Keys of the dictionaries that a function gives to `MetricSums`, directly or in a variable."""
    nodes = list(ast.walk(function))
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "MetricSums"]
    arguments = [node for call in calls for node in ast.walk(call)]
    variables = {node.id for node in arguments if isinstance(node, ast.Name)}
    assigned = [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in variables
    ]
    for node in arguments + assigned:
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            yield from (key for key in keys if re.fullmatch(r"\w+", key))


def is_documented(key: str) -> bool:
    if key.endswith("*"):
        return any(known.startswith(key[:-1]) for known in DOCUMENTED)
    return key in DOCUMENTED | HELD_OUT


FILES = sorted(
    path for package in ("rlhf", "envs", "reward_models") for path in (ROOT / package).rglob("*.py")
)


def test_each_metric_is_documented():
    missing = {}
    for path in FILES:
        for key in keys_in(ast.parse(path.read_text(encoding="utf-8"))):
            if key not in OTHERS and not is_documented(key):
                missing[key] = path.name
    assert missing == {}


def test_each_held_out_metric_of_trl_is_documented():
    """TRL's trainers compute the same metrics on both splits, except those of the optimizer."""
    names = set(RunCallback.METRIC_NAMES.values()) - {"learning_rate", "grad_norm"}
    assert {f"eval/{name}" for name in names} - DOCUMENTED == set()


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        ('row["policy/new"] = 1.0', ["policy/new"]),
        ('row[f"policy/new_{sign}"] = 1.0', ["policy/new_*"]),
        ('row[f"policy/{name}"] = 1.0', []),
        ('text = f"policy/new fell from {value}"', ["policy/new"]),
        ('path = "rollout/chat_format.py"', []),
        ('key = name.replace("time/", "time/new_")', ["time/new_*"]),
        ('def f():\n  return MetricSums(means={"new": 1}), {"old": 2}', ["train/new"]),
        ('def f():\n  new = {"new": 1}\n  return MetricSums(means=new)', ["train/new"]),
    ],
)
def test_keys_are_found(code, keys):
    assert list(keys_in(ast.parse(code))) == keys
