"""Optional experiment trackers: TensorBoard, Weights & Biases, trackio, MLflow.

Each line of ``metrics.jsonl`` is also sent to the trackers, with the same keys (docs/metrics.md).
The server and the project are set by the environment variables of the tracker (``WANDB_PROJECT``,
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

from rlhf.common.foreign import limit_side_effects
from rlhf.errors import UserError, message_of

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

PROJECT = "rlhf"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """An open tracker, as two functions: ``log(step, metrics)`` and ``close()``."""

    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


def check_trackers_installed(names: Sequence[str]) -> None:
    """Check that the packages of all trackers are installed.

    Raises:
        UserError: A package is missing. The message contains the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"track: {name} is not installed: pip install {name}")


def open_trackers(
    names: Sequence[str], directory: Path, config: Mapping[str, Any], *, step: int
) -> dict[str, Tracker]:
    """Open the trackers of a run.

    Args:
        names: Names of the trackers, whose packages are installed.
        directory: The run directory; its name is the name of the run in the trackers.
        config: The configuration with dotted keys, to log.
        step: First step that will be logged. If an interrupted run logged this step or later steps,
            TensorBoard discards them.

    Returns:
        Name -> tracker, for the trackers that could be opened. Failures are logged as warnings.
    """
    trackers = {}
    for name in names:
        with _failures_as_warnings(name):
            trackers[name] = _OPENERS[name](directory, config, step)
    return trackers


def log_to_trackers(
    trackers: Mapping[str, Tracker], step: int, metrics: Mapping[str, float]
) -> dict[str, Tracker]:
    """Send the metrics of a step to every tracker; return the trackers that did not fail."""
    working = {}
    for name, tracker in trackers.items():
        with _failures_as_warnings(name):
            tracker.log(step, metrics)
            working[name] = tracker
    return working


def close_trackers(trackers: Mapping[str, Tracker]) -> None:
    """Close every tracker; a failure is logged as a warning."""
    for name, tracker in trackers.items():
        with _failures_as_warnings(name):
            tracker.close()


@contextlib.contextmanager
def _failures_as_warnings(name: str) -> Iterator[None]:
    """Return a context manager that logs a tracker's failure as a warning instead of raising it.

    The text that a tracker prints is redirected to standard error.
    """
    try:
        with limit_side_effects():
            yield
    except Exception as error:
        log.warning(
            "tracker %s failed and receives no further metrics (%s: %s); metrics.jsonl is complete",
            name,
            type(error).__name__,
            message_of(error),
        )


def _open_tensorboard(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(directory / "tensorboard"), purge_step=step)
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _open_wandb(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=directory.name,
        id=_tracking_id(directory),
        resume="allow",
        dir=str(directory),
        config=dict(config),
    )
    return Tracker(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _open_trackio(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{directory.name}-{_tracking_id(directory)}",
        resume="allow",
        config=dict(config),
    )
    return Tracker(lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish)


def _open_mlflow(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    tag = _tracking_id(directory)
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


def _tracking_id(directory: Path) -> str:
    """Return the id of a run in the trackers: eight hexadecimal digits.

    The id is stored in the run directory, so a resumed run has the same id.
    """
    path = directory / "tracking_id"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text()


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
