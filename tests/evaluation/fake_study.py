"""Results of an over-optimization run with a planted peak, as `rlhf overoptimize` writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.studies.overoptimize.results import (
    TrainingTrack,
    best_of_n_result,
    rl_result,
    verdict_sentences,
)


def overoptimization() -> dict[str, Any]:
    """Six seeds around gold = 0.3 + d (1 - 0.5 log d), whose peak lies at d = e; two proxies."""
    rng = np.random.default_rng(0)
    d = np.linspace(0.0, 5, 40)
    log = np.log(np.where(d > 0, d, 1))
    tracks = [
        TrainingTrack(
            list(range(1, 41)),
            (d**2).tolist(),
            (d + 0.05 * rng.normal(size=40)).tolist(),
            (0.3 + d * (alpha - 0.5 * log) + 0.02 * rng.normal(size=40)).tolist(),
        )
        for alpha in (0.9, 0.94, 0.98, 1.02, 1.06, 1.1)
    ]
    cell = {"how": "single", "parameters": 1000, "members": 1, "accuracy": 0.7}
    results: dict[str, Any] = {
        "gold": "gold",
        "start": 0.3,
        "algorithm": "rloo",
        "best_of_n": [cell | {"pairs": n} | best_of_n(f"base0-{n}") for n in (300, 900)],
        "rl": [rl_result("single", tracks, start=0.3)],
    }
    results["verdict"] = verdict_sentences(results)
    return results


def best_of_n(name: str) -> dict[str, Any]:
    """Twelve prompts of 32 replies, chosen by a proxy that is gold with noise."""
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(12, 32))
    return best_of_n_result(name, (gold + rng.normal(size=gold.shape))[None], gold)
