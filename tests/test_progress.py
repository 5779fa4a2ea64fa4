"""The live view at several widths, the numbers it chooses, and its lines where no terminal is."""

import errno
import io
import logging
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rlhf.runs.progress import (
    OFFLINE_DISPLAYED_METRICS,
    DisplayedMetrics,
    ProgressDisplay,
    metric_key_by_displayed_name,
    online_displayed_metrics,
)

ROW = {
    "reward/mean": 0.76661,
    "reward/env": 0.76661,
    "policy/kl": -0.0012341,
    "policy/entropy": 1.23571,
    "rollout/tokens": 41.25,
    "policy/clip_fraction": 0.104,
    "train/grad_norm": 1.5,
}
BANDIT = {"env": {"id": "text/PreferenceBandit-v0"}}
PROXY = [{"kind": "learned", "name": "proxy"}]


def watched(
    width, *, rows=(ROW, ROW, ROW), warnings=(), displayed_metrics=None, name="02-ppo-door-seed0"
):
    """The lines that stand on a terminal of this width when the run ends."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    displayed_metrics = (
        online_displayed_metrics(BANDIT) if displayed_metrics is None else displayed_metrics
    )
    with ProgressDisplay(
        name, 2000, num_completed=1000, displayed_metrics=displayed_metrics, console=console
    ) as bar:
        for step, row in enumerate(rows, start=1001):
            bar.show(step, row, warnings if step == 1001 else ())
            time.sleep(0.002)
    return on_screen(console.file.getvalue(), width)


class ClosedTerminal(io.StringIO):
    """Fails as a terminal whose window was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_closed_terminal_does_not_stop_the_run():
    """The run saves a checkpoint after the step and the signal."""
    file = io.StringIO()
    with ProgressDisplay("run", 2, console=Console(file=file, force_terminal=True)) as bar:
        bar.view.console.file = ClosedTerminal()
        bar.show(1, ROW, ["a warning"])
        bar.show(2, ROW)


def on_screen(output, width):
    """What a terminal shows after it: each frame goes up and erases the lines of the last one."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\n|\r|[^\x1b\n\r]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A"):
            row -= int(re.sub(r"\D", "", part) or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    assert all(len(line) <= width for line in lines)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_bar_steps_times_and_all_numbers_are_there(width):
    first, *rest = watched(width)
    bar = re.search(r"[━╸╺]+", first)
    assert bar is not None
    assert len(bar.group()) >= 8
    assert "1003/2000" in first
    assert re.search(r"0:00:0\d 0:0\d:\d\d left$", first)
    assert len(first) <= 100
    numbers = "  ".join(rest)
    for text in ("reward 0.767", "KL -0.00123", "entropy 1.24", "length 41.2", "clipped 0.104"):
        assert text in numbers
    assert len(rest) == (1 if width >= 80 else 2)
    assert "gradient" not in numbers  # the sixth


def test_a_long_name_leaves_room_for_the_bar_and_keeps_both_ends():
    first, *_ = watched(60, name="11-grpo-with-a-very-long-name-[x]-seed12")
    assert first.startswith("11-grpo-w…(x)-seed12")
    assert len(re.search(r"[━╸╺]+", first).group()) >= 5
    assert first.endswith("left")


def test_time_left_is_known_when_a_step_takes_minutes():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with ProgressDisplay("ppo", 100, console=console) as bar:
        bar.view.get_time = lambda: now[0]
        for step in range(1, 5):
            now[0] += 120
            bar.show(step, {})
        assert bar.view.tasks[0].time_remaining == 96 * 120


def test_without_numbers_there_is_one_line():
    assert len(watched(80, rows=({}, {}), displayed_metrics=())) == 1


def test_warnings_stand_above_the_bar():
    words = "policy/kl reached 150 [not markup] (first above 100 at step 12): it jumped far."
    lines = watched(60, warnings=[words])
    bar = next(i for i, line in enumerate(lines) if "left" in line)
    assert " ".join(lines[:bar]) == f"warning, step 1001: {words}"


def test_numbers_stay_until_they_are_measured_again():
    lines = watched(80, rows=({**ROW, "eval/return": 0.5}, ROW))
    assert "held-out 0.5" in lines[1]


def test_a_number_that_is_missing_names_the_step_of_its_measurement():
    without_kl = {key: value for key, value in ROW.items() if key != "policy/kl"}
    lines = watched(100, rows=({**ROW, "eval/return": 0.5}, ROW, without_kl))
    numbers = " ".join(lines[1:])
    assert "held-out 0.5 (step 1001)" in numbers
    assert "KL -0.00123 (step 1002)" in numbers
    assert "reward 0.767 " in numbers
    assert "reward 0.767 (step" not in numbers


def headline(row: dict, displayed_metrics: DisplayedMetrics) -> dict[str, float]:
    """The displayed numbers by their short names."""
    return {
        name: row[key] for name, key in metric_key_by_displayed_name(row, displayed_metrics).items()
    }


def test_a_reward_without_a_learned_part_is_shown_once():
    assert headline(ROW, online_displayed_metrics(BANDIT)) == {
        "reward": 0.76661,
        "KL": -0.0012341,
        "entropy": 1.23571,
        "length": 41.25,
        "clipped": 0.104,
    }


@pytest.mark.parametrize(
    ("config", "more", "judge"),
    [
        (BANDIT, {"eval/return": 0.5}, "held-out"),
        (BANDIT | {"rewards": PROXY}, {}, "env"),
        (BANDIT | {"rewards": PROXY}, {"eval/return": 0.5}, "held-out"),
        (BANDIT | {"gold": [{"kind": "vader"}]}, {"reward/vader": 0.5}, "gold"),
        (BANDIT | {"gold": [{"kind": "x", "name": "g"}]}, {"reward/g": 1, "eval/g": 2}, "held-out"),
        ({"env": {"id": None, "prompts": [{}]}, "rewards": PROXY}, {"eval/return": 0.0}, None),
    ],
)
def test_the_second_number_judges_the_first(config, more, judge):
    names = list(headline(ROW | more, online_displayed_metrics(config)))
    assert len(names) == 5
    assert names[0] == "reward"
    assert set(names) >= {"KL", "entropy", "length"}
    if judge:
        assert names[1].startswith(judge)
    else:
        assert names[1] == "KL"


def test_offline_numbers_have_short_names():
    row = {"train/loss": 1.0, "train/token_accuracy": 0.5, "eval/token_accuracy": 0.4}
    assert headline(row, OFFLINE_DISPLAYED_METRICS) == {
        "loss": 1.0,
        "token accuracy": 0.5,
        "held-out": 0.4,
    }


def test_a_log_gets_few_plain_lines_and_every_warning(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), ProgressDisplay("ppo", 40, console=console) as bar:
        for step in range(1, 41):
            bar.show(step, {"loss": 0.123456}, ["it diverged."] if step == 7 else ())
        bar.show(40, {"loss": 0.1})  # the last step once
    assert console.file.getvalue().strip() == ""
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11
    assert lines[0] == "ppo 4/40  loss 0.123"
    assert lines[1] == "ppo: warning, step 7: it diverged."
    assert lines[-1] == "ppo 40/40  loss 0.123"
    assert caplog.records[1].levelno == logging.WARNING


def test_of_several_processes_only_the_first_draws(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert watched(80) == []


def test_the_display_needs_no_torch():
    code = "import sys, rlhf.runs.progress; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
