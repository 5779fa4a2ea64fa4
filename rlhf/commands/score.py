"""`rlhf score`: what a reward says of conversations; `rlhf data check`: what is wrong with data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.data import DataSpec, Kind

log = logging.getLogger(__name__)


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
    """Yield one JSON line per conversation: score (null if there is none) and components.

    An `answer` column, or an `answer` on a message, stays with the conversation.
    """
    from rlhf.data.conversation import labelled_conversation
    from rlhf.data.load import load
    from rlhf.models.rewards import load_rewards
    from rlhf.reward_models.chat_template import with_tools

    specs = config.rewards or [{"kind": "trained", "path": config.reward}]
    reward = load_rewards(specs)
    loaded = load(DataSpec(config.input), "sft", seed=0, facts=True)
    log.info("input: %s", loaded.summary())
    conversations = [
        with_tools(labelled_conversation(row), row.get("tools")) for row in loaded.rows
    ]
    scores = reward.score(conversations)
    for index, conversation in enumerate(conversations):
        parts = {name: column[index] for name, column in scores.components.items()}
        line = {"score": scores.values[index], "components": parts, "messages": conversation}
        yield json.dumps(line, ensure_ascii=False)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in scores.counts.items())
    if scores.unscored:
        log.warning("%d of %d not scored: %s", scores.unscored, len(conversations), reasons)


@dataclass(frozen=True)
class CheckConfig:
    """What is wrong with a data set; the exit code is 1 where anything is.

    `rlhf data check FILE...` takes paths without a flag, and looks at each on its own.
    """

    path: str
    """The data set: a file, a folder or a hub id."""
    kind: Kind | None = None
    """What its rows are for; left out, the columns tell."""
    against: str | None = None
    """Another data set, whose prompts should not be in this one (training against test)."""
    columns: dict[str, str] | None = None
    """Our field -> their column; a dot reaches into one."""
    seed: int = 0
    """Of the folds in the search for suspect pairs."""


def check(config: CheckConfig) -> tuple[str, bool]:
    """The page of a data set in Markdown, and whether it has no fault."""
    from rlhf.data.data_report import check_dataset
    from rlhf.data.files import read_rows
    from rlhf.data.reader import guess_kind

    spec = DataSpec(config.path, columns=config.columns)
    kind = config.kind or guess_kind(read_rows(spec), spec)
    against = DataSpec(config.against, columns=config.columns) if config.against else None
    report = check_dataset(spec, kind, against=against, seed=config.seed)
    return f"# {config.path}, read as {kind} data\n\n{report.to_markdown()}", report.ok
