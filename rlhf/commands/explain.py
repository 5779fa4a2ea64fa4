"""Implements `rlhf explain`, which explains rewards, policies and stages of training on a page."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config.explain import ExplainConfig
from rlhf.runs.directory import Run

if TYPE_CHECKING:
    from rlhf.explain.model_differences import StageDifference
    from rlhf.explain.policy_view import PolicyExplanation
    from rlhf.explain.reward.explanation import RewardExplanation
    from rlhf.reward_models.core import Conversation, Reward
    from rlhf.reward_models.pairs import Pair

log = logging.getLogger(__name__)


def explain(name: str, config: ExplainConfig, run: Run) -> Path:
    """Write `explanation.html` and `explanation.json`.

    Returns:
        The path of the page.
    """
    from rlhf.data.conversation import conversation_of_labeled_row
    from rlhf.data.load import load_and_log
    from rlhf.explain import Explanation
    from rlhf.reward_models.chat_template import with_tools
    from rlhf.reward_models.pairs import to_pair

    pairs = [
        to_pair(row)
        for row in load_and_log(config.pairs, "preference", data_name="pairs", seed=config.seed)
    ]
    texts = [
        with_tools(conversation_of_labeled_row(row), row.get("tools"))
        for row in load_and_log(config.texts, "rated", data_name="texts", seed=config.seed)
    ]
    replies = [reply for pair in pairs for reply in (pair.chosen, pair.rejected)] + texts
    reward = _load_reward(config)
    explanation = Explanation(
        run.directory.resolve().name,
        reward=_explain_reward(config, reward, pairs, texts) if reward else None,
        policy=_explain_policy(config, reward, replies),
        stages=_compare_stages(config, replies),
    )
    return explanation.save(run.directory)


def _load_reward(config: ExplainConfig) -> Reward | None:
    from rlhf.models.rewards import load_rewards

    if config.reward is not None:
        return load_rewards([{"kind": "trained", "path": config.reward, "name": "reward"}])
    return load_rewards(config.rewards) if config.rewards else None


def _explain_reward(
    config: ExplainConfig,
    reward: Reward,
    pairs: Sequence[Pair],
    texts: Sequence[Conversation],
) -> RewardExplanation:
    """Explain the pairs and the first ``config.shown`` texts; there is at least one of them."""
    from rlhf.data.load import load_and_log
    from rlhf.explain import RewardExplainer
    from rlhf.reward_models.pairs import to_pair

    rows = load_and_log(
        config.train_pairs, "preference", data_name="training pairs", seed=config.seed
    )
    train_pairs = [to_pair(row) for row in rows]
    explainer = RewardExplainer(
        reward, config.attribution, train_pairs=train_pairs, seed=config.seed
    )
    of_texts = explainer.explain_texts(texts[: config.shown]) if texts else None
    if not pairs:
        assert of_texts is not None
        return of_texts
    of_pairs = explainer.explain_pairs(
        pairs,
        shown=config.shown,
        measure_on=config.faithfulness.pairs,
        draws=config.faithfulness.draws,
    )
    if of_texts is None:
        return of_pairs
    skipped = Counter(of_pairs.skipped) + Counter(of_texts.skipped)
    return dataclasses.replace(of_pairs, texts=of_texts.texts, skipped=dict(skipped))


def _explain_policy(
    config: ExplainConfig, reward: Reward | None, replies: Sequence[Conversation]
) -> list[PolicyExplanation]:
    """Explain the first ``2 * config.shown`` replies under the policy; [] without a policy."""
    if config.policy is None:
        return []
    from rlhf.explain import explain_policy, load_policy

    spec = config.policy
    return explain_policy(
        load_policy(spec.model, seed=config.seed),
        replies[: 2 * config.shown],  # two replies of each pair
        reference=load_policy(spec.reference, seed=config.seed) if spec.reference else None,
        reward=reward,
        gamma=spec.gamma,
        lam=spec.lam,
    )


def _compare_stages(
    config: ExplainConfig, replies: Sequence[Conversation]
) -> list[StageDifference]:
    """Compare neighboring stages on the first ``config.compared`` replies; [] without stages."""
    from rlhf.explain import compare_stages, load_policy

    stages = config.stage_models
    if not stages:
        return []
    differences, before = [], load_policy(stages[0].model, seed=config.seed)
    for earlier, later in itertools.pairwise(stages):
        after = load_policy(later.model, seed=config.seed)
        differences.append(
            compare_stages(
                before, after, replies[: config.compared], names=(earlier.name, later.name)
            )
        )
        log.info("compared %s with %s", earlier.name, later.name)
        before = after
    return differences
