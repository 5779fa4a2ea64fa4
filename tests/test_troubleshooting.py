"""docs/troubleshooting.md: the code prints every message in it, and no alarm is missing."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rlhf.algorithms.metrics import MetricSums
from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from rlhf.runs.alarms import ALARMS, Halt
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.training.numeric_checks import (
    check_losses_are_finite,
    check_parameters_are_trained,
    check_ratios_before_first_update,
    check_scores_and_rewards_are_finite,
)
from tests.helpers.alarm_faults import FAULTS
from tests.helpers.user_code_mistakes import KINDS

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ALARM_ROWS = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| ", PAGE, re.MULTILINE))
"""Alarm -> message."""
MESSAGES = re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", PAGE, re.MULTILINE)
"""Messages of the other tables."""


def is_printed(message: str, text: str) -> bool:
    """Whether a text contains a message, in which "…" stands for any text."""
    return bool(re.search(".*".join(map(re.escape, message.split("…"))), text, re.DOTALL))


def frozen() -> None:
    weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    check_parameters_are_trained(torch.optim.SGD([weight]), [weight])


HALTS: dict[str, Callable[[], Any]] = {
    "not_finite": lambda: check_losses_are_finite(
        MetricSums(sums={"policy/loss": torch.tensor(math.nan)}),
        learning_rate_key="optimizer.learning_rate",
    ),
    "first_ratio": lambda: check_ratios_before_first_update(torch.ones(2), torch.float32),
    "frozen": frozen,
    "nothing_scored": lambda: check_scores_and_rewards_are_finite([math.nan], [[math.nan]], {}),
}
"""Alarm before an update -> a check that raises it."""


def sentences(columns: dict[str, list[float]], folder: Path) -> list[str]:
    """The warnings of a run with these metrics."""
    monitor = TrainingMonitor(folder, {})
    length = len(next(iter(columns.values())))
    found = [
        sentence
        for row in range(length)
        for sentence in monitor.update(row, {key: values[row] for key, values in columns.items()})
    ]
    return found + monitor.finish(length)


@pytest.mark.parametrize("name", ALARMS)
def test_the_message_of_an_alarm(name: str, tmp_path: Path) -> None:
    if name in HALTS:
        with pytest.raises(Halt) as halt:
            HALTS[name]()
        printed = str(halt.value)
    else:
        columns = {"train/updates": [0.0] * 3} if name == "no_updates" else FAULTS[name][0]
        (printed,) = sentences(columns, tmp_path)
    assert is_printed(ALARM_ROWS[name], printed), printed


def existing_directory(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").touch()
    return split_command(folder)


def dangling_link(folder: Path) -> list[str]:
    (folder / "out").symlink_to(folder / "nowhere")
    return split_command(folder)


def repeated_key(folder: Path) -> list[str]:
    words = split_command(folder)
    (folder / "rows.jsonl").write_text('{"text": "a", "text": "b"}\n')
    return words


def full_disk(folder: Path) -> list[str]:
    return split_command(folder)


def split_command(folder: Path) -> list[str]:
    write_jsonl(folder / "rows.jsonl", [{"text": f"row {number}"} for number in range(8)])
    config = {
        "output_dir": str(folder / "out"),
        "kind": "text",
        "data": [{"path": str(folder / "rows.jsonl")}],
    }
    (folder / "split.yaml").write_text(yaml.safe_dump(config))
    return ["split", "--config", str(folder / "split.yaml")]


COMMANDS = {
    "exists already": existing_directory,
    "symbolic link": dangling_link,
    "occurs twice": repeated_key,
    "disk is full": full_disk,
}
"""Part of a message -> function that prepares a folder and returns the command that prints it."""


def fail_writes(patch: pytest.MonkeyPatch) -> None:
    """Let the disk be full when the first data file is opened for writing."""
    open_path = Path.open

    def fails(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and "train.jsonl" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open_path(path, mode, *args, **kwargs)

    patch.setattr(Path, "open", fails)


@pytest.mark.parametrize("part", COMMANDS)
def test_the_message_of_a_command(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (message,) = [message for message in MESSAGES if part in message]
    words = COMMANDS[part](tmp_path)
    if part == "disk is full":
        fail_writes(monkeypatch)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert is_printed(message, error.splitlines()[-1]), error


def test_the_page_has_no_other_message() -> None:
    """The messages about code are printed in tests/test_user_code.py."""
    cases = [case for _, _, cases in KINDS.values() for case in cases.values()]
    printed = {case.message.replace("LINE", "…") for case in cases}
    assert printed <= set(MESSAGES), printed - set(MESSAGES)
    others = [message for message in MESSAGES if message not in printed]
    assert len(others) == len(COMMANDS), others
    assert list(ALARM_ROWS) == list(ALARMS)


def test_the_page_names_metrics_that_exist() -> None:
    metrics = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:\w+/)+\w+)`", PAGE))
    assert len(names) > 20
    missing = {name for name in names if f"`{name}`" not in metrics}
    assert missing <= {"eval/gold", "reward/gold"}
