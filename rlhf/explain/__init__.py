"""Explain rewards, policies and the differences between stages of training.

A reward is explained by attributions of its scores, a policy by quantities of reply tokens.

    from rlhf.explain import RewardExplainer, Explanation

    explainer = RewardExplainer(reward)
    Explanation("Reward", reward=explainer.explain_pairs(pairs)).save("explanation")

`docs/explain.md` describes the measures. `rlhf explain` writes the same page.
"""

from rlhf.explain.explanation import Explanation
from rlhf.explain.model_differences import compare_stages
from rlhf.explain.policy_view import explain_policy, load_policy
from rlhf.explain.reward.explainer import RewardExplainer

__all__ = [
    "Explanation",
    "RewardExplainer",
    "compare_stages",
    "explain_policy",
    "load_policy",
]
