"""Display the progress of a run: a live view in a terminal, or a few lines in a log file."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from rlhf.common.launcher import launcher_number
from rlhf.common.text import escape_invisible
from rlhf.runs.metric_log import gold_metric_keys

log = logging.getLogger(__name__)

# Approximate number of progress lines of a run if the output is not a terminal.
LOG_LINES = 10
# Maximum width of the line with the progress bar, in columns.
MAX_WIDTH = 100
MAX_NAME_LENGTH = 20
MAX_NUMBERS = 5
# Rich estimates the remaining time from the steps in this window, which must contain at least two
# steps. The window is long, because a step of reinforcement learning may take minutes.
SPEED_WINDOW_SECONDS = 7 * 86400.0

DisplayedMetrics = Sequence[Mapping[str, str]]
"""The numbers to display, in order. An entry displays one number. It maps metric keys to displayed
names, and the first of its metrics that has been logged is displayed."""

OFFLINE_DISPLAYED_METRICS: DisplayedMetrics = (
    {"train/loss": "loss"},
    {"eval/loss": "held-out loss"},
    {"train/accuracy": "accuracy", "train/token_accuracy": "token accuracy"},
    {"eval/accuracy": "held-out", "eval/token_accuracy": "held-out", "eval/rmse": "held-out"},
    {"train/grad_norm": "gradient"},
)
"""The numbers that are displayed in offline training."""

_POLICY_METRICS: DisplayedMetrics = (
    {"policy/kl": "KL"},
    {"policy/entropy": "entropy"},
    {"rollout/tokens": "length"},
    # These metrics are shown if other metrics are missing, such as the KL or the gold score.
    {"policy/clip_fraction": "clipped"},
    {"train/grad_norm": "gradient"},
)
_RETURN_NAMES = {"eval/return": "held-out", "eval/env": "held-out", "reward/env": "env"}
"""Metric of the return of the environment -> displayed name."""


class ProgressDisplay:
    """Displays completed steps, remaining time, at most five numbers, and warnings.

    The display is active in the ``with`` block of the object. If the output is not a terminal,
    about `LOG_LINES` lines are logged instead, without the remaining time.

    Args:
        what: Name of the run.
        total: Number of steps.
        num_completed: Number of steps that are already completed.
        displayed_metrics: The metrics to show; by default, the first logged ones under their keys.
        console: Output; standard error by default.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        num_completed: int = 0,
        displayed_metrics: DisplayedMetrics = (),
        console: Console | None = None,
    ) -> None:
        self.what, self.total, self.done = escape_invisible(what), total, num_completed
        self.displayed_metrics = displayed_metrics
        self.last_values: dict[str, float] = {}
        self.last_logged_steps: dict[str, int] = {}
        # Rich would treat a log file as a terminal if FORCE_COLOR is set.
        console = console or Console(file=sys.stderr, force_terminal=sys.stderr.isatty())
        first = launcher_number("RANK") == 0  # only the first process draws
        self.live = first and console.is_terminal and not console.is_dumb_terminal
        self.view = _ProgressView(console, disable=not self.live)
        self.task = self.view.add_task(
            _shortened_name(self.what), total=total, completed=num_completed
        )

    def __enter__(self) -> ProgressDisplay:
        self.view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            self.view.stop()

    def show(self, step: int, metrics: Mapping[str, float], warnings: Iterable[str] = ()) -> None:
        """Show the progress after a step.

        Args:
            step: Number of completed steps.
            metrics: Metrics of this step. A displayed metric that is missing here is shown with its
                last value and the step of this value.
            warnings: One-line warnings, which are shown above the bar or in the log.
        """
        self.last_values |= metrics
        self.last_logged_steps |= dict.fromkeys(metrics, step)
        before, self.done = self.done, step
        displayed = metric_key_by_displayed_name(self.last_values, self.displayed_metrics)
        numbers = [self._number_text(name, key) for name, key in displayed.items()]
        self.view.numbers.parts = numbers
        with contextlib.suppress(OSError):  # the terminal was closed; the run saves and stops
            self.view.update(self.task, completed=step)
            for words in warnings:
                self._show_warning(step, words)
        every = max(1, self.total // LOG_LINES)
        due = before // every != step // every or before < step == self.total
        if not self.live and due:
            log.info("%s", "  ".join([f"{self.what} {step}/{self.total}", *numbers]))

    def _number_text(self, name: str, key: str) -> str:
        """Return the name and last value of a metric, with the step if the value is older."""
        text = f"{escape_invisible(name)} {self.last_values[key]:.3g}"
        measured = self.last_logged_steps[key]
        return text if measured == self.done else f"{text} (step {measured})"

    def _show_warning(self, step: int, words: str) -> None:
        if self.live:
            line = Text.assemble(
                (f"warning, step {step}: ", "bold yellow"), escape_invisible(words)
            )
            self.view.console.print(line)
        else:
            log.warning("%s: warning, step %d: %s", self.what, step, words)


def metric_key_by_displayed_name(
    last_values: Mapping[str, float], displayed_metrics: DisplayedMetrics
) -> dict[str, str]:
    """Return displayed name -> metric key for at most five metrics to show.

    Args:
        last_values: Key -> last value of all metrics that have been logged.
        displayed_metrics: The metrics to show; if empty, the first logged ones under their keys.
    """
    chosen: dict[str, str] = {}
    for names in displayed_metrics or [{key: key} for key in last_values]:
        key = next((key for key in names if key in last_values), None)
        if key is not None and len(chosen) < MAX_NUMBERS:
            chosen.setdefault(names[key], key)
    return chosen


def online_displayed_metrics(config: Mapping[str, Any]) -> DisplayedMetrics:
    """Return the metrics to show of an online run: reward, gold or held-out score, and policy.

    Args:
        config: Configuration of the run, as plain data.
    """
    gold_scores = {
        key: _RETURN_NAMES.get(key) or ("held-out gold" if key.startswith("eval/") else "gold")
        for key in gold_metric_keys(config)
    }
    if not config.get("rewards"):  # the return of the environment is the training reward
        gold_scores.pop("reward/env", None)
    return ({"reward/mean": "reward"}, gold_scores, *_POLICY_METRICS)


class _ProgressView(Progress):
    """Progress display with one line for the bar and the times, and the numbers below this line."""

    def __init__(self, console: Console, *, disable: bool) -> None:
        self.numbers = _NumbersLine()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=disable,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the lines of the display, from top to bottom."""
        yield Constrain(self.make_tasks_table(self.tasks), MAX_WIDTH)
        yield self.numbers


class _NumbersLine:
    """A line with the names and values of metrics. Line breaks occur only between two metrics."""

    def __init__(self) -> None:
        self.parts: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[str] = []
        for part in self.parts:
            if lines and len(lines[-1]) + 2 + len(part) <= options.max_width:
                lines[-1] += "  " + part
            else:
                lines.append(part)
        for line in lines:
            yield Text(line, no_wrap=True, overflow="ellipsis")


def _shortened_name(name: str) -> str:
    """Return a name, shortened by removing its middle if it is long.

    The start and the end are kept, because stages have names with different starts, and runs of
    different seeds have names with different ends. Brackets are replaced by parentheses.
    """
    half = MAX_NAME_LENGTH // 2
    # Rich would interpret brackets as markup.
    text = name if len(name) <= MAX_NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
    return text.replace("[", "(").replace("]", ")")
