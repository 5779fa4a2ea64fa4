"""Coverage of every kind of printed interval: at least 90% everywhere, 94% on average."""

import numpy as np
import pytest

from tests.stats.coverage import KINDS, coverage

QUICK = {
    "share, several samples a prompt": (4, 30),
    "share, unequal numbers of values a prompt": (87,),
    "overdispersed count": (1,),
    "training seeds against one reference evaluation": (8,),
    "pass@4 of 8": (3,),
    "mean": (5, 7, 9),
    "ratio (text loss)": (0, 89),
    "the same, several samples a prompt": (2,),
    "paired difference of means": (2,),
    "P(improvement)": (3,),
}
"""Kind -> the points that every run of the tests simulates; shares are summed exactly elsewhere."""


@pytest.mark.parametrize("kind", QUICK)
def test_some_intervals_cover_their_truth(kind: str):
    points = list(KINDS[kind]())
    for index in QUICK[kind]:
        share = coverage(points[index], seed=index)
        assert share is not None
        assert share >= 0.90, points[index]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_all_intervals_cover_their_truth(kind: str):
    found = {
        f"{point.size} units, {point.name}": share
        for seed, point in enumerate(KINDS[kind]())
        if (share := coverage(point, seed=1000 + seed)) is not None
    }
    least = min(found, key=found.__getitem__)
    print(f"{kind}: mean {np.mean(list(found.values())):.3f}, least {found[least]:.3f} at {least}")
    assert found[least] >= 0.90, least
    assert np.mean(list(found.values())) >= 0.94
