"""Run PPO in the last TRL release that has it, in a separate virtual environment.

The toolkit is not installed in the virtual environment. PPO in TRL needs four models of full size:
policy, reference, value model and reward model.
"""

from __future__ import annotations

import json

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.trl.common import PacedCallback, trl_arguments
from benchmarks.worker import Job, StepTimer


def train(job: Job, timer: StepTimer) -> None:
    """Train until the harness stops the process.

    This trainer ignores the gradient checkpointing option. The tuned TRL configuration therefore
    differs from the default configuration only in the allocator settings and environment variables
    of the process.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    lines = (job.folder / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"][0]["content"] for line in lines]
    config = PPOConfig(
        **{
            **trl_arguments(job, tuned=True, batch_size=8),
            "max_steps": -1,
            "total_episodes": 8 * 10_000,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "num_sample_generations": 0,
            "response_length": 32,
        }
    )
    reward = job.settings["reward"]
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, dtype="float32"),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            job.model, num_labels=1, dtype="float32"
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
        callbacks=[PacedCallback(timer, job.work_per_step)],
    )
    trainer.train()
