"""Names of the components with sums of rewards, and names that no component may have."""

from __future__ import annotations

GOLD = "gold"
"""Component with the sum of the rewards that are only measured."""
SCORE = "score"
"""Component with the sum of the rewards that are trained on or evaluated."""
OTHER_METRICS = frozenset(
    {
        "env",
        "invalid",
        "length_limited",
        "loss",
        "mean",
        "normalized",
        "return",
        "seconds",
        "success",
        "tokens",
        "turns",
        "unscored",
    }
)
"""Names of other metrics of episodes and training steps, which no component may have."""
