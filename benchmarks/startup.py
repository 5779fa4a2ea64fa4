"""Benchmark of startup times; each step starts a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.paths import ROOT
from benchmarks.worker import Job, StepTimer

PROGRAMS = {
    "rlhf-help": "from rlhf.cli.main import main; main(['--help'])",
    "trl-help": "import sys; sys.argv = ['trl', '--help']; from trl.cli import main; main()",
    "rlhf-import": "import rlhf",
    "trl-import": "import trl",
    "rlhf-first-step": (
        "import sys; from benchmarks import startup; startup.run_toolkit_to_first_step(sys)"
    ),
    "trl-first-step": (
        "import sys; from benchmarks import startup; startup.run_trl_to_first_step(sys)"
    ),
}


def time_program(job: Job, timer: StepTimer, *, program: str) -> None:
    """Time a program from its start to its end; the unit of work is one start of the program."""

    def step() -> float:
        command = [sys.executable, "-c", PROGRAMS[program], str(job.folder)]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        return 1.0

    timer.loop(step)


def run_toolkit_to_first_step(sys_module: Any) -> None:
    """Run `rlhf sft` up to its first logged step."""
    from rlhf.runs import launch

    launch.prepare_process()
    from rlhf.cli.table import configure
    from rlhf.runs.directory import Run
    from rlhf.training.offline import train_offline

    job = Job(Path(sys_module.argv[1]))

    class ExitAfterFirstStep(Run):
        def log(self, step: int, metrics: Any) -> None:
            if "train/loss" in metrics:
                raise SystemExit

    config = configure("sft", job.settings["config"])
    run = ExitAfterFirstStep(Path(config.output_dir))
    (run.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    train_offline("sft", config, run)


def run_trl_to_first_step(sys_module: Any) -> None:
    """Run TRL's SFT trainer up to the end of its first step."""
    from transformers import TrainerCallback

    from benchmarks.trl.offline import make_trainer

    class ExitAfterFirstStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise SystemExit

    trainer = make_trainer(Job(Path(sys_module.argv[1])), "sft", tuned=True, bf16=False)
    trainer.add_callback(ExitAfterFirstStep())
    trainer.train()
