"""Episode seeds of training and evaluation, from disjoint ranges."""

from __future__ import annotations

EVALUATION_BLOCK = 2**30
"""First seed of evaluation episodes. All seeds of training episodes are smaller."""


def training_seed(run_seed: int, counter: int) -> int:
    """Return the seed of start state number ``counter`` of a training run, in [0, 2**30).

    Consecutive counters give consecutive seeds modulo 2**30, so an epoch of a prompt dataset has no
    repetitions.
    """
    return (run_seed * 7_368_787 + counter) % EVALUATION_BLOCK


def evaluation_seed(index: int) -> int:
    """Return the seed of evaluation episode ``index``, equal in all runs, in [2**30, 2**31)."""
    return EVALUATION_BLOCK + index
