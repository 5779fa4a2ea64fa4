"""Optional experiment trackers: TensorBoard, Weights & Biases, trackio, MLflow.

Each line of ``metrics.jsonl`` is also sent to the trackers, with the same keys (docs/metrics.md).
The server and the project are set by the environment variables of the tracker (``WANDB_PROJECT``,
``MLFLOW_TRACKING_URI``, ...).

A tracker that raises an exception, or does not return within its time limit, receives no further
metrics. The run continues.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from rlhf.common.files import write_text
from rlhf.common.foreign import describe_exception, limit_side_effects
from rlhf.common.registry import OneOf, Registry
from rlhf.common.user_code import add_location_to_errors, warn_if_argument_changed
from rlhf.errors import UserError

DEFAULT_PROJECT = "rlhf"
LOG_LIMIT_SECONDS = 60.0
"""Time limit of sending the metrics of a step."""
OPEN_OR_CLOSE_LIMIT_SECONDS = 300.0
"""Time limit of opening or closing a tracker; closing may send metrics that are not sent yet."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """An open tracker, as two functions: ``log(step, metrics)`` and ``close()``.

    Example:
        >>> from rlhf.plugins import Tracker
        >>> tracker = Tracker(log=lambda step, metrics: print(step, metrics), close=lambda: None)
        >>> tracker.log(1, {"reward/mean": 0.5})
        1 {'reward/mean': 0.5}
    """

    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


class _CallThread:
    """A daemon thread that calls the functions of a tracker, so that a hanging call can be left.

    A signal to the main thread would not interrupt native code. One thread makes all calls of a
    tracker, because some trackers store the open run by thread.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, function: Callable[[], Any], *, seconds: float) -> Any:
        """Return the result of ``function``. After an exception, the thread can make no more calls.

        Raises:
            TimeoutError: The call takes longer than ``seconds``; it continues in the thread.
            BaseException: The function raised this exception.
        """
        future: Future[Any] = Future()
        self._calls.put((future, function))
        try:
            return future.result(seconds)
        except BaseException as error:
            self.end()
            if isinstance(error, TimeoutError) and not future.done():
                raise TimeoutError(f"took longer than {seconds:g} s") from None
            raise

    def end(self) -> None:
        """Let the thread end after the last call."""
        self._calls.put(None)

    def _run(self) -> None:
        process = os.getpid()
        while call := self._calls.get():
            future, function = call
            try:
                result = function()
            except BaseException as error:  # `call` raises it in the main thread
                future.set_exception(error)
            else:
                future.set_result(result)
            if os.getpid() != process:  # a forked process, in which this thread would wait forever
                os._exit(1)


def check_trackers_installed(names: Sequence[str]) -> None:
    """Check that the packages of the built-in trackers among ``names`` are installed.

    Raises:
        UserError: A package is missing. The message contains the command that installs it.
    """
    for name in names:
        if name not in TRACKERS.sources and find_spec(name) is None:
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
        with _log_tracker_failures(name):
            opening = functools.partial(TRACKERS[name], directory, dict(config), step)
            trackers[name] = _open_with_time_limits(opening)
    return trackers


def log_to_trackers(
    trackers: Mapping[str, Tracker], step: int, metrics: Mapping[str, float]
) -> dict[str, Tracker]:
    """Send the metrics of a step to every tracker; return the trackers that did not fail.

    A failure is logged as a warning.
    """
    working = {}
    for name, tracker in trackers.items():
        with _log_tracker_failures(name):
            metrics_copy = dict(metrics)
            tracker.log(step, metrics_copy)
            what = f"tracker {name}"
            warn_if_argument_changed(
                metrics, metrics_copy, what=what, code=TRACKERS[name], argument="metrics"
            )
            working[name] = tracker
    return working


def close_trackers(trackers: Mapping[str, Tracker]) -> None:
    """Close every tracker; a failure is logged as a warning."""
    for name, tracker in trackers.items():
        with _log_tracker_failures(name):
            tracker.close()


def _open_with_time_limits(opening: Callable[[], Tracker]) -> Tracker:
    """Open a tracker; return it with functions that raise TimeoutError after their time limit.

    Raises:
        TypeError: The function that opens it returned something else.
    """
    thread = _CallThread()
    opened = thread.call(opening, seconds=OPEN_OR_CLOSE_LIMIT_SECONDS)
    if not isinstance(opened, Tracker):
        thread.end()
        raise TypeError(f"it was opened as a {type(opened).__name__}, not as a Tracker")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        thread.call(functools.partial(opened.log, step, metrics), seconds=LOG_LIMIT_SECONDS)

    def close() -> None:
        thread.call(opened.close, seconds=OPEN_OR_CLOSE_LIMIT_SECONDS)
        thread.end()

    return Tracker(log, close)


@contextlib.contextmanager
def _log_tracker_failures(name: str) -> Iterator[None]:
    """Return a context manager that logs a tracker's failure as a warning instead of raising it.

    The text that a tracker prints is redirected to standard error.
    """
    try:
        with add_location_to_errors(TRACKERS[name]), limit_side_effects():
            yield
    except Exception as error:
        log.warning(
            "tracker %s failed and receives no further metrics (%s); metrics.jsonl is complete",
            name,
            describe_exception(error),
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
        project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
        name=directory.name,
        id=_load_or_create_tracking_id(directory),
        resume="allow",
        dir=str(directory),
        config=dict(config),
    )
    return Tracker(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _open_trackio(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
        name=f"{directory.name}-{_load_or_create_tracking_id(directory)}",
        resume="allow",
        config=dict(config),
    )
    return Tracker(lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish)


def _open_mlflow(directory: Path, config: Mapping[str, Any], step: int) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT))
    tag = _load_or_create_tracking_id(directory)
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


def _load_or_create_tracking_id(directory: Path) -> str:
    """Return the id of a run in the trackers: eight hexadecimal digits.

    The id is stored in the run directory, so a resumed run has the same id.
    """
    path = directory / "tracking_id"
    if not path.exists():
        write_text(path, os.urandom(4).hex())
    return path.read_text()


TrackerOpener = Callable[[Path, Mapping[str, Any], int], Tracker]
"""Function (run directory, flat configuration, first step) -> tracker."""
_BUILT_IN_OPENERS: dict[str, TrackerOpener] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
TRACKERS: Registry[TrackerOpener] = Registry("tracker", _BUILT_IN_OPENERS)
"""All trackers. The names of built-in trackers are those of their packages.
`rlhf.plugins.register_tracker` adds a tracker."""
TrackerName = Annotated[str, OneOf(TRACKERS)]
