"""Run a workload: prepare the inputs, compare the results of implementations, and time steps."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import ROOT, work_directory
from benchmarks.summary import Round, TimedStep, has_enough_rounds, speed_ratios, summarize
from benchmarks.system_load import wait_for_quiet
from benchmarks.venvs import ensure_venv_python
from benchmarks.workloads import WORKLOADS, Side
from rlhf.common.names import did_you_mean
from rlhf.errors import UserError

OURS = "ours"
BEFORE = "before"
"""Name of the side that runs the toolkit's code of another checkout."""


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of a measurement."""

    warmup: int = 5
    """Number of warm-up rounds; a round is one step of every side."""
    rounds: int = 10
    """Number of undisturbed rounds to measure. A round is undisturbed if other processes used at
    most ``quiet`` cores during each step. The total number of rounds is at most twice this number.
    """
    quiet: float = 0.2
    """Maximum number of cores that other processes may use during an undisturbed step."""
    patience: float = 20.0
    """Maximum number of seconds to wait for idle cores before each step."""
    model: str = "smollm2-135m-instruct"
    """Short name, Hugging Face Hub id or folder of a model that accepts plain-text prompts."""
    sides: tuple[str, ...] = ()
    """Names of the sides to run. By default, all sides are run."""
    against: Path | None = None
    """Checkout of another commit. If it is set, the toolkit is compared with the code of this
    checkout instead of the other sides."""


class WorkerProcess:
    """A separate process that runs a side (an implementation) or a function of a workload.

    Args:
        workload: name of the workload.
        side: name of the side, or of the function: "prepare", "check" or "measure".
        folder: folder of the inputs and the log.
        spec: specification of the side; None for a function.
        root: checkout whose code runs.
    """

    def __init__(
        self,
        workload: str,
        side: str,
        folder: Path,
        spec: Side | None = None,
        root: Path = ROOT,
    ) -> None:
        self.name, self.log = f"{workload} {side}", folder / f"{side}.log"
        venv = spec.venv if spec else ""
        environment = {**os.environ, **(spec.environment if spec else {})}
        if venv:
            environment.pop("PYTHONPATH", None)  # Do not import the packages of this process.
        elif root != ROOT:
            environment["PYTHONPATH"] = str(root)  # This path precedes the installed package.
        # In the workload table of the other checkout, the name of this side is "ours".
        worker_side = OURS if side == BEFORE else side
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    ensure_venv_python(venv),
                    "-m",
                    "benchmarks.worker",
                    workload,
                    worker_side,
                    str(folder),
                ],
                cwd=root,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # The worker exits at the end of its input.
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read(self) -> dict[str, Any]:
        """Wait for the next report of the process and return it.

        Raises:
            UserError: the process exited; the message contains the last line of its log.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise UserError(f"{self.name} exited early: {lines[-1]} (log: {self.log})")
        return json.loads(line)

    def step(self) -> TimedStep:
        """Run one step and return its measurements."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return TimedStep(**self.read())


def run_workload(name: str, options: MeasurementOptions) -> dict[str, Any]:
    """Measure one workload.

    Returns:
        The result for the results file, without the date and the machine.

    Raises:
        UserError: a side does not exist, or its process could not be started or failed.
    """
    row = WORKLOADS[name]
    for side in options.sides:
        if side not in row.sides:
            raise UserError(f"{name} has no side {side!r}{did_you_mean(side, row.sides)}")
    folder = make_input_folder(name, options.model)
    result: dict[str, Any] = {"workload": name, "model": options.model}
    if row.prepare:
        run_workload_function(name, "prepare", folder)
    if row.measure:
        return result | {"rows": run_workload_function(name, "measure", folder)}
    if row.check:
        result["agreement"] = run_workload_function(name, "check", folder)
        log_to_stderr(f"{name}: one batch in float32, relative differences {result['agreement']}")
    if options.against:
        ours = row.sides[OURS]
        specs = {OURS: ours, BEFORE: dataclasses.replace(ours, label=f"{ours.label}, before")}
    else:
        specs = available_sides({side: row.sides[side] for side in options.sides or row.sides})
    rounds = measure_rounds(name, folder, specs, options)
    sides = {
        side: {"label": spec.label, **summarize([r[side] for r in rounds], options.quiet)}
        for side, spec in specs.items()
    }
    measured = {"unit": row.unit, "warmup": options.warmup, "sides": sides}
    return result | measured | {"ratios": speed_ratios(rounds, options.quiet)}


def available_sides(sides: Mapping[str, Side]) -> dict[str, Side]:
    """Return the sides whose virtual environments exist or can be created.

    Raises:
        UserError: the environment of a side that is not optional cannot be created.
    """
    usable = {}
    for side, spec in sides.items():
        try:
            ensure_venv_python(spec.venv)
        except UserError as error:
            if not spec.optional:
                raise
            log_to_stderr(f"{side} is skipped: {error}")
        else:
            usable[side] = spec
    return usable


def measure_rounds(
    name: str, folder: Path, sides: Mapping[str, Side], options: MeasurementOptions
) -> list[Round]:
    """Run rounds with one process for each side; return the rounds after the warm-up rounds."""
    with ExitStack() as stack:
        workers = {}
        for side, spec in sides.items():
            root = options.against if side == BEFORE and options.against else ROOT
            workers[side] = stack.enter_context(WorkerProcess(name, side, folder, spec, root))
            workers[side].read()  # Wait until this side is loaded before the next.
        rounds: list[Round] = []
        for number, steps in enumerate(run_rounds(workers, options)):
            counted = number >= options.warmup
            log_round(name, number, steps, counted=counted, max_other_cores=options.quiet)
            rounds += [steps] if counted else []
            if has_enough_rounds(rounds, options.rounds, options.quiet):
                return rounds
    raise AssertionError("unreachable: run_rounds is infinite")


def run_rounds(
    workers: Mapping[str, WorkerProcess], options: MeasurementOptions
) -> Iterator[Round]:
    """Yield rounds without end; a round is one step of every side.

    The order of the sides alternates between rounds (A B, B A, ...).
    """
    forwards = True
    while True:
        order = list(workers) if forwards else list(reversed(workers))
        steps = {}
        for side in order:
            wait_for_quiet(options.quiet, patience=options.patience)
            steps[side] = workers[side].step()
        yield {side: steps[side] for side in workers}
        forwards = not forwards


def run_workload_function(workload: str, function: str, folder: Path) -> Any:
    """Run the function "prepare", "check" or "measure" of a workload in a separate process.

    Returns:
        The result of the function.
    """
    with WorkerProcess(workload, function, folder) as worker:
        return worker.read()["result"]


def make_input_folder(name: str, model: str) -> Path:
    """Create a new folder for a workload's inputs and logs, and write request.json into it."""
    folder = work_directory("work") / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"model": model}))
    return folder


def log_round(
    name: str, number: int, steps: Round, *, counted: bool, max_other_cores: float
) -> None:
    """Log one line with the times of a round."""
    times = [
        f"{side} {step.seconds:.2f} s{' (disturbed)' if step.is_disturbed(max_other_cores) else ''}"
        for side, step in steps.items()
    ]
    log_to_stderr(f"{name} {number + 1}{'' if counted else ' warm-up'}: {', '.join(times)}")


def log_to_stderr(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)
