"""`rlhf score`: what a reward says of conversations; `rlhf data check`: what is wrong with data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.spec import DataSpec, Kind


@dataclass(frozen=True)
class ScoreConfig:
    """A reward and the conversations it scores."""

    input: str
    """JSONL with prompts and completions, or messages."""
    reward: str | None = None
    """Folder of a trained reward model."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Rewards by kind, as in a training configuration."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (not self.rewards):
            raise ValueError("score: give either --reward FOLDER or --rewards")


def score(config: ScoreConfig) -> Iterator[str]:
    """Yield one JSON line per conversation: score (null if there is none) and components."""
    from rlhf.data.load import load
    from rlhf.models.rewards import load_rewards

    specs = config.rewards or [{"kind": "trained", "path": config.reward}]
    reward = load_rewards(specs)
    rows = load(DataSpec(config.input), "sft", seed=0).rows
    conversations = [[*row["prompt"], *row["completion"]] for row in rows]
    scores = reward.score(conversations)
    for index, conversation in enumerate(conversations):
        parts = {name: column[index] for name, column in scores.components.items()}
        line = {"score": scores.values[index], "components": parts, "messages": conversation}
        yield json.dumps(line, ensure_ascii=False)


@dataclass(frozen=True)
class CheckConfig:
    """Data sets to look over."""

    path: str
    """The data set."""
    kind: Kind
    """What its rows are for."""
    against: str | None = None
    """Another data set, whose prompts should not be in this one (training against test)."""
    columns: dict[str, str] | None = None
    """Our field -> their column."""
    seed: int = 0
    """Of the folds in the search for suspect pairs."""


def check(config: CheckConfig) -> Iterator[str]:
    """Yield the report of the data doctor as Markdown."""
    from rlhf.data.doctor import check_data

    against = DataSpec(config.against, columns=config.columns) if config.against else None
    spec = DataSpec(config.path, columns=config.columns)
    yield check_data(spec, config.kind, against=against, seed=config.seed).to_markdown()
