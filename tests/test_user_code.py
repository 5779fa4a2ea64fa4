"""Twelve mistakes in rewards, environments and plug-ins: a message with file, line and advice.

Each case is a file and a run from the command line. The line that the message must name has the
comment "here". docs/troubleshooting.md has the messages of all cases.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

from rlhf.cli.main import main
from rlhf.common import user_code
from rlhf.common.foreign import describe_exception, user_code_location
from rlhf.common.user_code import (
    add_location_to_errors,
    definition_location,
    user_code_location_of_thread,
)
from rlhf.config.load import merge_trees
from tests.helpers.part_mistakes import PARTS, RUNS
from tests.helpers.training import offline_tree, online_tree, pair_rows, write_rows
from tests.helpers.user_code_mistakes import KINDS, MISTAKES, Case, pattern_of


def check_message(
    case: Case,
    command: str,
    tree: dict[str, Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Run a command with the mistake of a case, and check its exit code and its message."""
    (folder / "mine.py").write_text(case.code)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    code = main([command, "--config", str(folder / "c.yaml")])
    output = capsys.readouterr().err + caplog.text
    (line,) = [n for n, text in enumerate(case.code.splitlines(), 1) if "# here" in text]
    assert code == (0 if case.succeeds else 2), output
    assert re.search(pattern_of(case.message, line), output), output
    assert "Traceback" not in output


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_message_names_file_line_reason_and_what_to_do(
    kind: str,
    mistake: str,
    tmp_path: Path,
    echo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command, keys, cases = KINDS[kind]
    case = cases[mistake]
    monkeypatch.setattr(user_code, "SLOW_SECONDS", 0.3)
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, episodes_per_step=4, **keys)
    tree = merge_trees(tree, {"rollout": {"parallel": 1}, "evaluation": {"episodes": 1}})
    check_message(case, command, merge_trees(tree, case.keys), tmp_path, capsys, caplog)


def run_of(kind: str, folder: Path, model: Path) -> tuple[str, dict[str, Any]]:
    """Command and configuration of a run with a plug-in of a kind in the file mine.py."""
    if kind == "command":
        return "mine", {"plugins": ["mine.py"]}
    if kind in RUNS:
        tree = online_tree(folder / "run", model, num_steps=1, episodes_per_step=4)
        return "rloo", merge_trees(tree, {"plugins": ["mine.py"], **RUNS[kind]})
    exam = [{"task": f"Say {number}", "gold": str(number)} for number in range(32)]
    rows = write_rows(folder / "rows.jsonl", exam if kind == "data_format" else pair_rows())
    keys = {"trainer": {"max_steps": 1}, "evaluations": 1, "plugins": ["mine.py"]}
    if kind == "data_format":
        return "sft", offline_tree(folder / "run", model, rows, **keys)
    return "reward", offline_tree(folder / "run", model, rows, kind="mine", **keys)


@pytest.mark.parametrize(
    ("kind", "mistake"), [(kind, mistake) for kind, cases in PARTS.items() for mistake in cases]
)
def test_a_mistake_in_another_kind_of_plugin_is_named(
    kind: str,
    mistake: str,
    tmp_path: Path,
    echo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = PARTS[kind][mistake]
    monkeypatch.setattr(user_code, "SLOW_SECONDS", 0.3)
    command, tree = run_of(kind, tmp_path, echo_model)
    check_message(case, command, tree, tmp_path, capsys, caplog)


# Locations


class Callable_:
    def __call__(self) -> None: ...


def function() -> None: ...


@functools.wraps(function)
def wrapper() -> None: ...


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (function, function),
        (functools.partial(function), function),
        (wrapper, function),
        (Callable_(), Callable_.__call__),
        (Callable_().__call__, Callable_.__call__),
        (lambda: None, None),
        (len, False),
        (functools.partial(len), False),
        (gym.make, False),  # an installed package
        (describe_exception, False),  # this toolkit
        (3, False),
    ],
)
def test_the_location_of_a_definition(code: Any, expected: Any) -> None:
    place = definition_location(code)
    if expected is False:
        assert place is None
        return
    assert place is not None
    assert place[0] == __file__
    if expected is not None:
        assert place[1] == expected.__code__.co_firstlineno


def test_the_location_of_a_class_is_its_first_line() -> None:
    place = definition_location(Callable_)
    assert place is not None
    assert Path(__file__).read_text().splitlines()[place[1] - 1] == "class Callable_:"


def raised_by(call: Callable[[], Any], *codes: Any) -> Exception:
    with pytest.raises(Exception) as caught, add_location_to_errors(*codes):
        call()
    return caught.value


def test_a_line_in_the_traceback_comes_before_the_definition() -> None:
    error = raised_by(lambda: function(1), len, function)  # type: ignore[call-arg]
    place = user_code_location(error)
    assert place is not None
    assert place[1] != function.__code__.co_firstlineno


def test_the_line_of_a_thread() -> None:
    import threading

    place = user_code_location_of_thread(threading.get_ident())
    assert place is not None
    assert place[0] == __file__
    assert user_code_location_of_thread(None) is None
