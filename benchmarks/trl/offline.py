"""Run TRL's SFT, reward and DPO trainers on the rows on which the toolkit is measured."""

from __future__ import annotations

import json
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.trl.common import PacedCallback, trl_arguments
from benchmarks.worker import Job, StepTimer
from rlhf.models.loading import ensure_pad_token_and_embedding, load_tokenizer

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
}


def train(job: Job, timer: StepTimer, *, command: str, tuned: bool) -> None:
    """Train until the harness stops the process."""
    trainer = make_trainer(job, command, tuned=tuned)
    trainer.add_callback(PacedCallback(timer, job.work_per_step))
    trainer.train()


def make_trainer(job: Job, command: str, *, tuned: bool, **more: Any) -> Any:
    """Return TRL's trainer for a command ("sft", "reward" or "dpo"), on the rows in trl.jsonl."""
    make, configuration = TRAINERS[command]
    tokenizer: Any = load_tokenizer(job.model)
    rows = [json.loads(line) for line in (job.folder / "trl.jsonl").read_text().splitlines()]
    model = load_model(job.model, classifier=command == "reward")
    ensure_pad_token_and_embedding(tokenizer, model)
    extra = {}
    if command == "dpo":
        extra["ref_model"] = load_model(job.model, classifier=False)
    return make(
        model=model,
        args=configuration(**{**trl_arguments(job, tuned=tuned, batch_size=len(rows)), **more}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **extra,
    )


def load_model(place: str, *, classifier: bool) -> Any:
    """Load a model in float32, as TRL does for a model name."""
    if classifier:
        return AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=1, dtype="float32"
        )
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32")
