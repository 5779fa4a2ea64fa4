"""Runs a workload: prepares its inputs, checks that sides agree, lets them step in turn."""

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
from benchmarks.summary import Round, Step, enough, ratios, summarise
from benchmarks.system_load import wait_for_quiet
from benchmarks.venvs import python_of
from benchmarks.workloads import WORKLOADS, Side
from rlhf.common.names import nearest
from rlhf.errors import UserError

OURS = "ours"
BEFORE = "before"
"""Our side as another checkout has it."""


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    warmup: int = 5
    """Rounds that are not counted; a round is one step of every side."""
    rounds: int = 10
    """Undisturbed rounds to collect; twice as many are tried at most."""
    quiet: float = 0.2
    """Cores that others may use during a step that counts."""
    patience: float = 20.0
    """Seconds to wait for a quiet moment before each step."""
    model: str = "smollm2-135m-instruct"
    """Short name, hub id or folder; it must be able to read the prompts as plain text."""
    sides: tuple[str, ...] = ()
    """Sides to run; empty: all."""
    against: Path | None = None
    """A checkout of another commit: its code takes the place of all sides but ours."""


class Child:
    """A side in a process of its own.

    Args:
        workload: name of the workload.
        side: name of the side; or "prepare", "check", "measure".
        folder: of the inputs; the log is written there.
        spec: of the side.
        root: the checkout whose code runs.
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
            environment.pop("PYTHONPATH", None)  # the caller's packages are not for it
        elif root != ROOT:
            environment["PYTHONPATH"] = str(root)  # before the installed toolkit
        # In the table of the other checkout its side has the name of ours.
        known = OURS if side == BEFORE else side
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python_of(venv), "-m", "benchmarks.worker", workload, known, str(folder)],
                cwd=root,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # the side takes it as the end
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read(self) -> dict[str, Any]:
        """The next report.

        Raises:
            UserError: the process ended instead; the last line of its log says why.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise UserError(f"{self.name} ended early: {lines[-1]} (all of it: {self.log})")
        return json.loads(line)

    def step(self) -> Step:
        """Let it take one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return Step(**self.read())


def run_workload(name: str, plan: Plan) -> dict[str, Any]:
    """Measure one workload.

    Returns:
        What goes into the results, but for date and machine.

    Raises:
        UserError: a side does not exist, could not be started, or failed.
    """
    row = WORKLOADS[name]
    for side in plan.sides:
        if side not in row.sides:
            raise UserError(f"{name} has no side {side!r}{nearest(side, row.sides)}")
    folder = fresh_folder(name, plan.model)
    result: dict[str, Any] = {"workload": name, "model": plan.model}
    if row.prepare:
        once(name, "prepare", folder)
    if row.measure:
        return result | {"rows": once(name, "measure", folder)}
    if row.check:
        result["agreement"] = once(name, "check", folder)
        say(f"{name}: one batch in float32, relative differences {result['agreement']}")
    if plan.against:
        ours = row.sides[OURS]
        chosen = {OURS: ours, BEFORE: dataclasses.replace(ours, label=f"{ours.label}, before")}
    else:
        chosen = available({side: row.sides[side] for side in plan.sides or row.sides})
    rounds = play(name, folder, chosen, plan)
    sides = {
        side: {"label": spec.label, **summarise([r[side] for r in rounds], plan.quiet)}
        for side, spec in chosen.items()
    }
    found = {"unit": row.unit, "warmup": plan.warmup, "sides": sides}
    return result | found | {"ratios": ratios(rounds, plan.quiet)}


def available(sides: Mapping[str, Side]) -> dict[str, Side]:
    """The sides whose environments are there or can be made; of the others only optional ones
    may be missing.
    """
    kept = {}
    for side, spec in sides.items():
        try:
            python_of(spec.venv)
        except UserError as error:
            if not spec.optional:
                raise
            say(f"{side} is left out: {error}")
        else:
            kept[side] = spec
    return kept


def play(name: str, folder: Path, sides: Mapping[str, Side], plan: Plan) -> list[Round]:
    """The rounds that count, all sides started once and stepping in turn."""
    with ExitStack() as stack:
        children = {}
        for side, spec in sides.items():
            root = plan.against if side == BEFORE and plan.against else ROOT
            children[side] = stack.enter_context(Child(name, side, folder, spec, root))
            children[side].read()  # loaded; one at a time, so that they do not disturb each other
        rounds: list[Round] = []
        for number, steps in enumerate(take_rounds(children, plan)):
            counted = number >= plan.warmup
            show(name, number, steps, counted=counted, limit=plan.quiet)
            rounds += [steps] if counted else []
            if enough(rounds, plan.rounds, plan.quiet):
                return rounds
    raise AssertionError("rounds never end by themselves")


def take_rounds(children: Mapping[str, Child], plan: Plan) -> Iterator[Round]:
    """One step of every side a round, forwards and backwards in turn (A B, B A, ...)."""
    forwards = True
    while True:
        order = list(children) if forwards else list(reversed(children))
        steps = {}
        for side in order:
            wait_for_quiet(plan.quiet, patience=plan.patience)
            steps[side] = children[side].step()
        yield {side: steps[side] for side in children}
        forwards = not forwards


def once(name: str, task: str, folder: Path) -> Any:
    """What a function that runs once in a process of its own returns."""
    with Child(name, task, folder) as child:
        return child.read()["result"]


def fresh_folder(name: str, model: str) -> Path:
    """An empty folder for a workload's inputs and logs, with the request in it."""
    folder = work_directory("work") / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"model": model}))
    return folder


def show(name: str, number: int, steps: Round, *, counted: bool, limit: float) -> None:
    """One line a round."""
    told = [
        f"{side} {step.seconds:.2f} s{' (disturbed)' if step.disturbed(limit) else ''}"
        for side, step in steps.items()
    ]
    say(f"{name} {number + 1}{'' if counted else ' warm-up'}: {', '.join(told)}")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
