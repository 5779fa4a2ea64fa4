"""Time the toolkit in the training workloads, with the functions that `rlhf sft|ppo|...` use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.worker import Job, StepTimer
from rlhf.cli.table import configure
from rlhf.runs.directory import Run


class PacedRun(Run):
    """A run that waits after every logged step until the harness starts the next step."""

    def __init__(self, directory: Path, timer: StepTimer, work: float) -> None:
        super().__init__(directory)
        self.timer, self.work = timer, work
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        timer.wait_for_start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics, stop the timer and wait for the start of the next step."""
        super().log(step, metrics)
        if "train/loss" in metrics:  # The metrics are from a training step, not an evaluation.
            self.timer.done(self.work)
            self.timer.wait_for_start()


def time_offline_training(job: Job, timer: StepTimer, *, command: str) -> None:
    """Time the steps of SFT, reward training or DPO; every step is logged."""
    from rlhf.training.offline import train_offline

    config = configure(command, job.settings["config"])
    train_offline(command, config, PacedRun(Path(config.output_dir), timer, job.work_per_step))


def time_online_training(job: Job, timer: StepTimer) -> None:
    """Time the steps of an online algorithm; the unit of work is a sampled token."""
    from rlhf.training.online import OnlineTrainer

    algorithm = job.settings["algorithm"]
    config = configure(algorithm, job.settings["config"])
    trainer = OnlineTrainer(algorithm, config)
    run = Run(Path(config.output_dir))
    run.directory.mkdir(exist_ok=True)
    steps = iter(range(config.num_steps))

    def step() -> float:
        number = next(steps)
        metrics = trainer.step(number, run)
        run.log(number + 1, metrics)
        return metrics["rollout/tokens"] * config.episodes_per_step

    timer.loop(step)
