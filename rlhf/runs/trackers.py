"""Optional experiment trackers: TensorBoard, Weights & Biases, trackio, MLflow.

Each line of ``metrics.jsonl`` is also sent to the trackers, with the same keys (docs/metrics.md).
Server and project are set through the tracker's environment variables (``WANDB_PROJECT``,
``MLFLOW_TRACKING_URI``, ...).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

PROJECT = "rlhf"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """An open tracker: ``log(step, metrics)`` and ``close()``."""

    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if the package of a tracker is missing.

    Raises:
        UserError: A package is missing; the message has the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"track: {name} is not installed: pip install {name}")


def open_trackers(
    names: Sequence[str], directory: Path, config: Mapping[str, Any], *, step: int
) -> dict[str, Tracker]:
    """Open the trackers of a run, whose name there is the name of the run directory.

    Args:
        names: Names of the trackers, which ``check_installed`` accepts.
        directory: The run directory.
        config: The configuration with dotted keys, to log.
        step: First step that will be logged; TensorBoard discards later ones of an interrupted run.

    Returns:
        The trackers that could be opened, by name; failures of others are logged as warnings.
    """
    trackers = {}
    for name in names:
        with _failures(name):
            trackers[name] = _OPEN[name](directory, config, step)
    return trackers


def log_to(
    trackers: Mapping[str, Tracker], step: int, metrics: Mapping[str, float]
) -> dict[str, Tracker]:
    """Send one step to every tracker; return the trackers that accepted it, by name."""
    working = {}
    for name, tracker in trackers.items():
        with _failures(name):
            tracker.log(step, metrics)
            working[name] = tracker
    return working


def close_trackers(trackers: Mapping[str, Tracker]) -> None:
    """Close every tracker."""
    for name, tracker in trackers.items():
        with _failures(name):
            tracker.close()


@contextlib.contextmanager
def _failures(name: str) -> Iterator[None]:
    """Return a context that logs a tracker's failure as a warning, so that the run continues."""
    try:
        yield
    except Exception as error:
        log.warning(
            "tracker %s failed and receives nothing more (%s: %s); metrics.jsonl is complete",
            name,
            type(error).__name__,
            error,
        )


def _tensorboard(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(directory / "tensorboard"), purge_step=step)
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=directory.name,
        id=_identity(directory),
        resume="allow",
        dir=str(directory),
        config=dict(config),
    )
    return Tracker(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _trackio(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{directory.name}-{_identity(directory)}",
        resume="allow",
        config=dict(config),
    )
    return Tracker(lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish)


def _mlflow(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    tag = _identity(directory)
    earlier = mlflow.search_runs(filter_string=f"tags.rlhf = '{tag}'", output_format="list")
    if earlier:
        run = mlflow.start_run(run_id=earlier[0].info.run_id)
    else:
        run = mlflow.start_run(run_name=directory.name, tags={"rlhf": tag})
        mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
    run_id = run.info.run_id
    return Tracker(
        lambda step, metrics: mlflow.log_metrics(dict(metrics), step=step, run_id=run_id),
        mlflow.end_run,
    )


def _identity(directory: Path) -> str:
    """Return eight hexadecimal digits that stay the same when a run is resumed."""
    path = directory / "tracking_id"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text()


_OPEN: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
