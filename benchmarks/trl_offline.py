"""TRL's SFT, reward and DPO trainers on the rows that our side gets."""

from __future__ import annotations

from typing import Any

import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.child import Job, Pace
from benchmarks.trl_common import Paced, options
from rlhf.data.load import load
from rlhf.data.spec import DataSpec
from rlhf.models.loading import give_pad_token, load_tokenizer
from rlhf.training.examples import Encoder

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, "sft"),
    "reward": (trl.RewardTrainer, trl.RewardConfig, "preference"),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "preference"),
}


def train(job: Job, pace: Pace, *, verb: str, tuned: bool) -> None:
    """Train until stopped."""
    trainer = make_trainer(job, verb, tuned=tuned)
    trainer.add_callback(Paced(pace, job.work))
    trainer.train()


def make_trainer(job: Job, verb: str, *, tuned: bool, **more: Any) -> Any:
    """The trainer of a verb, with our encoding of the rows, so that the tokens are the same."""
    make, configuration, kind = TRAINERS[verb]
    tokenizer: Any = load_tokenizer(job.model)
    rows = load([DataSpec(path=str(job.folder / "rows.jsonl"))], kind, seed=0).rows
    model = load_model(job.model, classifier=verb == "reward")
    give_pad_token(tokenizer, model)
    extra = {}
    if verb == "dpo":
        extra["ref_model"] = load_model(job.model, classifier=False)
    return make(
        model=model,
        args=configuration(**{**options(job, tuned=tuned, batch_size=len(rows)), **more}),
        train_dataset=Encoder(tokenizer, max_length=1024)(verb, rows),
        processing_class=tokenizer,
        **extra,
    )


def load_model(place: str, *, classifier: bool) -> Any:
    """Weights in float32, as TRL loads a model that is named."""
    if classifier:
        return AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=1, dtype="float32"
        )
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32")
