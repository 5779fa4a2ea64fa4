"""pass@k: the chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def pass_at(k: int, *, right: int, drawn: int) -> float:
    """Unbiased estimate from ``right`` of ``drawn`` samples: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: fewer than k samples were drawn.
    """
    if not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs between 1 and {drawn} samples, the number drawn")
    return 1.0 - math.comb(drawn - right, k) / math.comb(drawn, k)


def pass_columns(groups: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, list[float]]:
    """pass@k of each seed, for every metric that is 0 or 1 and was drawn more than once.

    Args:
        groups: metric -> seed -> its samples. ``success`` gives ``pass@k``, others ``NAME/pass@k``.

    Returns:
        Columns for k = 1, 2, 4, ... and the number of samples; a seed of which some samples could
        not be scored counts for the k that are left to it.
    """
    found: dict[str, list[float]] = {}
    for name, seeds in groups.items():
        drawn = max(len(values) for values in seeds.values())
        binary = all(value in (0.0, 1.0) for values in seeds.values() for value in values)
        if drawn == 1 or not binary or name in ("turns", "cost", "invalid", "tokens", "return"):
            continue
        prefix = "" if name == "success" else f"{name}/"
        for k in sorted({2**i for i in range(drawn.bit_length())} | {drawn}):
            found[f"{prefix}pass@{k}"] = [
                pass_at(k, right=int(sum(values)), drawn=len(values))
                for values in seeds.values()
                if len(values) >= k
            ]
    return found
