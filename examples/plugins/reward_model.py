"""A kind of reward model: pairs whose scores differ by less than 1 are penalized linearly."""

import torch

from rlhf.plugins import register_reward_model
from rlhf.training.reward_models.preference import PairKind

plugin_api = 1


@register_reward_model("hinge", settings=("num_heads",))
class HingeKind(PairKind):
    """Hinge loss on the difference of the scores."""

    def pair_losses(self, chosen, rejected, margin):
        """Return max(0, 1 - difference) of each pair and head, [B, M]."""
        return torch.relu(1 - (chosen - rejected))
