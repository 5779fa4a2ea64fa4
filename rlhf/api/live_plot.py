"""`LivePlot`, a callback that draws metrics in a notebook, and the charts that it draws."""

from __future__ import annotations

import base64
import html
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.guards import as_list
from rlhf.common.numbers import is_number
from rlhf.runs.callbacks import Callback, TrainingEvent

log = logging.getLogger(__name__)

MAIN_METRICS = (
    "reward/mean",
    "policy/kl",
    "train/loss",
    "train/accuracy",
    "eval/return",
    "eval/loss",
    "eval/accuracy",
)
"""Metrics that are drawn by default; a run has some of them."""

Points = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value) of the steps at which it was logged."""


class LivePlot(Callback):
    """Draws metrics below the cell of a notebook while a run trains.

    In a program that is not a notebook, it draws nothing and logs one line.

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> plot = rlhf.LivePlot(metrics=["reward/mean"])
        >>> run = rlhf.rloo(
        ...     model=scratch,
        ...     env="text/Echo-v0",
        ...     num_steps=1,
        ...     callbacks=[plot],
        ... )
        >>> [step for step, value in plot.points["reward/mean"]]
        [1]

    Args:
        metrics: A metric of docs/metrics.md, or several of them. Each metric that the run logs has
            a separate chart. The default is `MAIN_METRICS`.
        every: Number of steps between drawings. The charts are also drawn after each evaluation and
            at the end.
    """

    def __init__(self, metrics: str | Sequence[str] = MAIN_METRICS, *, every: int = 1) -> None:
        self.metrics, self.every = tuple(as_list(metrics)), max(1, every)
        self.points: Points = {}
        self._display: Any = None
        """The displayed output, which later drawings replace."""
        self._explained = False

    def on_step(self, event: TrainingEvent) -> None:
        """Record the metrics of the step, and draw if the step is a multiple of ``every``."""
        self._record(event)
        if event.step % self.every == 0:
            self._draw()

    def on_evaluation(self, event: TrainingEvent) -> None:
        """Record the metrics of the evaluation, and draw."""
        self._record(event)
        self._draw()

    def on_end(self, event: TrainingEvent) -> None:
        """Draw the whole curves."""
        self._draw()

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded points, which a resumed run shows again."""
        return {"points": {key: [list(point) for point in row] for key, row in self.points.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the recorded points."""
        self.points = {key: [(x, y) for x, y in row] for key, row in state["points"].items()}

    def _record(self, event: TrainingEvent) -> None:
        """Record the selected metrics of an event; they replace earlier values of the same step."""
        for key in self.metrics:
            if is_number(event.metrics.get(key)):
                row = self.points.setdefault(key, [])
                if row and row[-1][0] == event.step:
                    row.pop()
                row.append((event.step, event.metrics[key]))

    def _draw(self) -> None:
        """Draw the charts, or replace the drawn ones; outside a notebook, log a line once."""
        if not _is_notebook():
            if not self._explained:
                log.info("LivePlot draws only in a notebook; metrics.jsonl has the metrics")
            self._explained = True
            return
        import IPython.display

        output: Any = IPython.display
        picture = output.HTML(charts_as_images_html(self.points))
        if self._display is None:
            self._display = output.display(picture, display_id=True)
        else:
            self._display.update(picture)


def charts_as_images_html(points: Points) -> str:
    """Return one chart for each metric, as images in HTML that no style sheet can change."""
    from rlhf.reports.charts import Chart, Series, standalone_chart_svg

    images = ""
    for key, row in sorted(points.items()):
        steps, values = [step for step, _ in row], [value for _, value in row]
        image = standalone_chart_svg(Chart(key, [Series("last", steps, values)]))
        data = base64.b64encode(image.encode()).decode()
        images += (
            f'<img alt="{html.escape(key)}" style="display:inline-block;margin:4px" '
            f'src="data:image/svg+xml;base64,{data}">'
        )
    return f"<div>{images}</div>"


def _is_notebook() -> bool:
    """Return whether the program runs in the kernel of a notebook."""
    module = sys.modules.get("IPython")  # a kernel has imported it
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None
