"""Implements `rlhf pairs`, which creates preference pairs from a model's samples.

A simulated annotator labels the pairs by a known gold score. Later stages can therefore measure how
well a reward model predicts the gold score, and by how much RL improves the gold score of a policy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.common.files import write_jsonl
from rlhf.common.ranges import AtLeastTwo, PositiveInt
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import RunConfig
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.preferences import SimulatedAnnotator, pairs_from_gold
from rlhf.errors import UserError
from rlhf.rollout.seeds import training_seed
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairsConfig(RunConfig):
    """Configuration of `rlhf pairs`: a policy, prompts and an annotator."""

    model: ModelSpec
    """The policy from which replies are sampled."""
    env: EnvSpec
    """Source of prompts. Without rewards, the environment's own reward is the gold score."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards that define the gold score instead of the environment's reward; required with
    env.prompts."""
    annotator: SimulatedAnnotator = field(default_factory=SimulatedAnnotator)
    """Parameters of the simulated annotator, which labels pairs by the gold score."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings of the policy."""
    prompts: PositiveInt = 512
    """Number of prompts."""
    samples: AtLeastTwo = 4
    """Number of samples for each prompt."""
    pairs_per_prompt: PositiveInt = 2
    """Maximum number of pairs for each prompt."""

    def __post_init__(self) -> None:
        if self.env.prompts and not self.rewards:
            raise ValueError(
                "rewards: a prompt dataset gives no reward; set the rewards that define the gold "
                "score"
            )


def sample_pairs_into_run(command: str, config: PairsConfig, run: Run) -> Path:
    """Sample replies, label pairs of replies and write pairs.jsonl; return the run directory.

    Pairs with an episode that has a user turn after a reply are dropped and counted, because a
    reply of a pair has no user turn.

    Raises:
        UserError: No pair is left.
    """
    from rlhf.evaluation.replies import play_episode_groups
    from rlhf.models.rewards import load_rewards

    groups = play_episode_groups(
        config.model,
        config.env,
        config.rollout,
        start_seeds=[training_seed(config.seed, prompt) for prompt in range(config.prompts)],
        samples=config.samples,
        seed=config.seed,
    )
    # A return can depend on a hidden state, so it belongs to the episode and not to its text.
    gold = load_rewards(config.rewards) if config.rewards else None
    rows = [
        {
            "prompt": group[0].opening,
            "replies": [played.scored_conversation[len(played.opening) :] for played in group],
            "scores": [played.env_return for played in group],
        }
        for group in groups
    ]
    pairs = pairs_from_gold(
        rows,
        gold,
        annotator=config.annotator,
        pairs_per_prompt=config.pairs_per_prompt,
        seed=config.seed,
    )
    log.info("pairs: %s", pairs.summary())
    if not pairs.rows:
        raise UserError(f"no pair is left: {pairs.summary()}; sample other replies or prompts")
    write_jsonl(run.directory / "pairs.jsonl", pairs.rows)
    return run.directory
