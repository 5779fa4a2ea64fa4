"""Run GRPO in TRL: a step is ``model.generate`` and one update on eight replies to one prompt."""

from __future__ import annotations

import json
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.trl.common import PacedCallback, trl_arguments
from benchmarks.worker import Job, StepTimer


def train(job: Job, timer: StepTimer, *, tuned: bool) -> None:
    """Train until the harness stops the process."""
    trainer = make_trainer(job, tuned=tuned)
    trainer.add_callback(PacedCallback(timer, job.work_per_step))
    trainer.train()


def make_trainer(job: Job, *, tuned: bool, **more: Any) -> Any:
    """Return TRL's trainer, which uses the toolkit's prompts as plain text."""
    lines = (job.folder / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"][0]["content"] for line in lines]
    config = trl.GRPOConfig(
        **{
            **trl_arguments(job, tuned=tuned, batch_size=8),
            "num_generations": 8,
            "max_completion_length": 32,
            **more,
        }
    )
    return trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
        reward_funcs=word_count_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )


def word_count_reward(completions: list[str], **_: Any) -> list[float]:
    """Return a cheap reward for each completion: its number of words / 40 - 1."""
    return [len(text.split()) / 40 - 1.0 for text in completions]
