"""Metrics of runs with one fault for each alarm that depends on logged metrics."""

import math

Columns = dict[str, list[float]]

FAULTS: dict[str, tuple[Columns, int]] = {
    "metric_not_finite": ({"train/loss": [1.0, math.nan, math.inf]}, 1),
    "not_moved": ({"train/moved": [0.0] * 3}, 1),
    "no_gradient": ({"train/no_gradient": [1.0] * 5}, 4),
    "policy_jump": ({"policy/kl": [1.0, 2.0, 101.0]}, 2),
    "negative_kl": ({"policy/kl": [0.1] + [-0.5, -0.6] * 5}, 10),
    "exploding_gradient": ({"train/grad_norm": [1.0, 2.0] * 10 + [41.0]}, 20),
    "entropy_collapse": (
        {"policy/entropy": [2.0] * 5 + [0.05] * 5, "reward/mean": [0.3] * 10},
        9,
    ),
    "repetition_collapse": (
        {"rollout/repetition": [0.1] * 5 + [0.6] * 5, "reward/mean": [0.3] * 10},
        9,
    ),
    "dead_critic": ({"value/explained_variance": [0.3] + [0.0] * 20}, 20),
    "overfitted": ({"eval/loss": [1.0, 0.8, 0.85]}, 2),
    "length_limited": ({"rollout/length_limited": [0.2] * 5}, 4),
    "truncated": ({"rollout/truncated": [0.2] * 5}, 4),
    "unscored": ({"reward/unscored": [0.01] * 5}, 4),
    "invalid": ({"rollout/invalid": [0.2] * 5}, 4),
    "evasion": ({"rollout/evasion_gain": [1.0] * 10}, 9),
    "missing_eos": ({"rollout/missing_eos": [0.2] * 5}, 4),
    "constant_reward": ({"rewards/std": [0.5] * 2 + [0.0] * 10, "reward/mean": [1.0] * 12}, 11),
    "saturated": ({"rollout/success": [0.9, 1.0, 1.0, 1.0, 0.9]}, 4),
    "unsolved": ({"rollout/success": [0.0] * 20, "reward/mean": [0.1] * 20}, 19),
    "equal_groups": (
        {"groups/equal": [0.8, 1.0] * 5, "rewards/std": [0.3] * 10, "reward/mean": [0.3] * 10},
        9,
    ),
    "dominant_reward": (
        {
            "rewards/variance_share/a": [0.5] + [0.995] * 5,
            "rewards/variance_share/b": [0.5] + [0.005] * 5,
        },
        5,
    ),
    "low_effective_sample": ({"sampler/ess": [0.4] * 5}, 4),
    "clipped": ({"policy/clip_fraction_negative": [0.9, 1.0] * 5}, 9),
    "length_drift": (
        {"rollout/tokens": [10.0] * 5 + [25.0] * 5, "reward/mean": [0.3] * 10},
        9,
    ),
    "over_optimized": (
        {
            "reward/mean": [float(i) for i in range(40)],
            "eval/gold": [float(min(i, 40 - i)) for i in range(40)],  # the peak is at row 20
        },
        29,
    ),
}
"""Alarm -> (columns of metrics, row at which the alarm is due)."""
