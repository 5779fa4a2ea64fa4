"""Seeded sweeps of mutated input: no traceback, no hang, no unknown key accepted.

The whole: ``python -m pytest -m sweep tests/fuzz``; ``--draw TEXT/N`` selects about one chunk in N.
A failure prints its seed and adds its case to the corpus.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.cli.table import COMMANDS
from tests.fuzz.configurations import (
    BASES,
    UNKNOWN,
    check_configuration,
    check_text,
    mutated_configuration,
    mutated_text,
)
from tests.fuzz.corpus_files import check_case
from tests.fuzz.replies import (
    KINDS,
    check_game,
    check_reply,
    check_template,
    mutated_game,
    mutated_reply,
    mutated_template,
)
from tests.fuzz.rows import KINDS as DATA_KINDS
from tests.fuzz.rows import ROWS, check_rows, mutated_rows
from tests.fuzz.running import check_run, mutated_run

Make = Callable[[random.Random], Any]
Check = Callable[[Any], object]

SWEEPS: dict[str, tuple[Make, Check, int, int]] = {
    "configuration": (mutated_configuration, check_configuration, 40, 500),
    "text": (mutated_text, check_text, 20, 500),
    "rows": (mutated_rows, check_rows, 40, 1700),
    "reply": (mutated_reply, check_reply, 20, 500),
    "game": (mutated_game, check_game, 20, 500),
    "template": (mutated_template, check_template, 20, 100),
    "run": (mutated_run, check_run, 100, 10),
}
"""Target -> the maker of a case, its check, the number of chunks, and of cases in a chunk.

A case of rows has 3 rows on average."""

CHUNKS = [(target, chunk) for target, row in SWEEPS.items() for chunk in range(row[2])]


@pytest.mark.sweep
@pytest.mark.parametrize(("target", "chunk"), CHUNKS)
def test_mutated_input_is_accepted_or_refused_in_one_line(target, chunk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, check, _, size = SWEEPS[target]
    for number in range(size):
        seed = f"{target}/{chunk}/{number}"
        check_case(target, check, make(random.Random(seed)), seed)


@pytest.mark.parametrize("target", [name for name in SWEEPS if name != "run"])
def test_a_small_part_of_each_sweep(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, check, _, size = SWEEPS[target]
    for number in range(size // 10):
        seed = f"{target}/small/{number}"
        check_case(target, check, make(random.Random(seed)), seed)


def test_every_command_has_a_configuration_that_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(BASES) == set(COMMANDS)
    for command, trees in BASES.items():
        if command == "tune":  # reads the manifest of a benchmark
            continue
        for tree in trees:
            case = {"command": command, "tree": tree, "unknown": False}
            assert check_configuration(case) is not None, command


@pytest.mark.parametrize("command", BASES)
def test_an_unknown_key_is_refused_in_every_command(command):
    tree = {**BASES[command][0], UNKNOWN: 1}
    assert check_configuration({"command": command, "tree": tree, "unknown": True}) is None


def test_the_rows_reach_every_kind_and_the_replies_every_rule():
    accepted = {"sft", "preference", "label", "prompt", "text", "classification", "ranking"}
    cases = [{"kind": k, "spec": {}, "rows": [row]} for k in DATA_KINDS for row in ROWS]
    assert sum(check_rows(case) for case in cases) == len(cases)
    assert accepted <= set(DATA_KINDS)
    assert {"exact_match", "number", "math", "regex", "format", "length"} <= KINDS
