"""Implements `rlhf score`, which scores conversations with a reward."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import CommandConfig
from rlhf.config.data import DataSpec, check_reward_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreConfig(CommandConfig):
    """Configuration of `rlhf score`: a reward and the conversations to score."""

    input: str
    """JSONL file whose rows have a prompt and a completion, or messages."""
    reward: str | None = None
    """Folder of a trained reward model."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards, in the format of a training configuration. Set either this key or ``reward``."""
    reward_columns: list[str] = field(default_factory=list)
    """Columns that rewards read, such as [difficulty], as keys of the last user message."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (not self.rewards):
            raise ValueError("score: give either --reward FOLDER or --rewards")
        check_reward_columns(self.reward_columns, "reward_columns")


def score(config: ScoreConfig) -> Iterator[str]:
    """Yield a JSON line for each conversation, with the score, its components and the messages.

    The score is null if the conversation could not be scored. The reward also receives the column
    `answer` of the row, or the key `answer` of a message, and the columns `reward_columns`.
    """
    from rlhf.data.conversation import conversation_of_labeled_row
    from rlhf.data.load import load
    from rlhf.models.rewards import load_rewards
    from rlhf.reward_models.chat_template import with_tools

    specs = config.rewards or [{"kind": "trained", "path": config.reward}]
    reward = load_rewards(specs)
    source = DataSpec(config.input, reward_columns=config.reward_columns or None)
    loaded = load(source, "sft", seed=None, with_answer_and_tests=True)
    loaded.log_summary("input")
    conversations = [
        with_tools(conversation_of_labeled_row(row), row.get("tools")) for row in loaded.rows
    ]
    scores = reward.score(conversations)
    for index, conversation in enumerate(conversations):
        parts = {name: column[index] for name, column in scores.components.items()}
        line = {"score": scores.values[index], "components": parts, "messages": conversation}
        yield json.dumps(line, ensure_ascii=False)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in scores.counts.items())
    if scores.unscored:
        log.warning(
            "%d of %d conversations could not be scored: %s",
            scores.unscored,
            len(conversations),
            reasons,
        )
