"""Reinforcement-learning fine-tuning and evaluation of language models."""

from rlhf.api import compare, evaluate, generate, report, run, score, stage
from rlhf.errors import UserError

__all__ = [
    "UserError",
    "compare",
    "evaluate",
    "generate",
    "report",
    "run",
    "score",
    "stage",
]

__version__ = "0.1.0"
