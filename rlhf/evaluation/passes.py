"""pass@k: the chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from rlhf.evaluation.metrics import COUNTS


def pass_at_k(k: int, *, correct: int, drawn: int) -> float:
    """Unbiased estimate from `correct` of `drawn` samples: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: fewer than k samples were drawn, or more are correct than drawn.
    """
    if not 0 <= correct <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs between 1 and {drawn} samples, the number drawn")
    return 1.0 - math.comb(drawn - correct, k) / math.comb(drawn, k)


def pass_columns(
    groups: Mapping[str, Mapping[Hashable, Sequence[float]]],
) -> dict[str, dict[Hashable, float]]:
    """pass@k of each seed, for every metric that is 0 or 1 and was drawn more than once.

    Args:
        groups: metric -> seed -> its samples. `success` gives `pass@k`, others `NAME/pass@k`.

    Returns:
        Metric -> seed -> value, for k = 1, 2, 4, ... and the number of samples; a seed of
        which some samples could not be scored counts for the k that are left to it.
    """
    found: dict[str, dict[Hashable, float]] = {}
    for name, seeds in groups.items():
        drawn = max(len(values) for values in seeds.values())
        binary = all(value in (0.0, 1.0) for values in seeds.values() for value in values)
        if drawn == 1 or not binary or name in COUNTS or name in ("return", "normalized"):
            continue
        prefix = "" if name == "success" else f"{name}/"
        for k in sorted({2**i for i in range(drawn.bit_length())} | {drawn}):
            found[f"{prefix}pass@{k}"] = {
                seed: pass_at_k(k, correct=int(sum(values)), drawn=len(values))
                for seed, values in seeds.items()
                if len(values) >= k
            }
    return found
