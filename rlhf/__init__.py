"""Reinforcement-learning fine-tuning and evaluation of language models."""

from rlhf.api.commands import compare, generate, report, run, score, stage
from rlhf.api.evaluation import evaluate
from rlhf.api.live_plot import LivePlot
from rlhf.api.results import Run
from rlhf.api.training import (
    best_of_n,
    cispo,
    dapo,
    dpo,
    dr_grpo,
    grpo,
    gspo,
    kto,
    online_dpo,
    ppo,
    ppo_lagrangian,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    sft,
    train,
    train_reward,
)
from rlhf.errors import UserError
from rlhf.runs.callbacks import Callback, TrainingEvent

__all__ = [
    "Callback",
    "LivePlot",
    "Run",
    "TrainingEvent",
    "UserError",
    "best_of_n",
    "cispo",
    "compare",
    "dapo",
    "dpo",
    "dr_grpo",
    "evaluate",
    "generate",
    "grpo",
    "gspo",
    "kto",
    "online_dpo",
    "ppo",
    "ppo_lagrangian",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "report",
    "rloo",
    "run",
    "score",
    "sft",
    "stage",
    "train",
    "train_reward",
]

__version__ = "0.1.0"
