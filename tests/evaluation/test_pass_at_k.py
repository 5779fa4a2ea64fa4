"""pass@k against every subset counted, and intervals over seeds rather than samples."""

from itertools import combinations, product
from statistics import mean

import pytest

from rlhf.evaluation.episodes import summarize_episodes
from rlhf.evaluation.metrics import pass_at_k_by_seed
from rlhf.stats.samples import pass_at_k


@pytest.mark.parametrize("drawn", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(drawn):
    for right in range(drawn + 1):
        samples = [True] * right + [False] * (drawn - right)
        for k in range(1, drawn + 1):
            share = mean(any(subset) for subset in combinations(samples, k))
            assert pass_at_k(k, correct=right, drawn=drawn) == pytest.approx(share)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of four samples, right with probability 0.3: 1 - 0.7^k."""
    for k in (1, 2, 3, 4):
        expected = 0.0
        for outcome in product([0, 1], repeat=4):
            chance = 0.3 ** sum(outcome) * 0.7 ** (4 - sum(outcome))
            expected += chance * pass_at_k(k, correct=sum(outcome), drawn=4)
        assert expected == pytest.approx(1 - 0.7**k)


def test_only_what_is_right_or_wrong_has_pass_at_k():
    groups = {
        "success": {1: [1.0, 0.0, 0.0], 2: [0.0, 0.0, 0.0]},
        "number": {1: [1.0, 1.0], 2: [0.0, 1.0, 1.0]},
        "length": {1: [0.5, 0.25, 1.0], 2: [1.0, 1.0, 0.0]},
        "turns": {1: [1.0, 1.0, 1.0], 2: [1.0, 1.0, 1.0]},
    }
    found = pass_at_k_by_seed(groups)
    assert found["pass@1"] == {1: pytest.approx(1 / 3), 2: 0.0}
    assert found["pass@2"] == {1: pytest.approx(2 / 3), 2: 0.0}
    assert found["pass@3"] == {1: 1.0, 2: 0.0}
    assert found["number/pass@2"] == {1: 1.0, 2: 1.0}
    assert found["number/pass@3"] == {2: 1.0}  # seed 1 was scored twice only
    assert {name.partition("/")[0] for name in found} == {"pass@1", "pass@2", "pass@3", "number"}


def test_large_pass_at_k_stays_exact():
    assert pass_at_k(5_000, correct=1, drawn=10_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="of 3 drawn"):
        pass_at_k(4, correct=1, drawn=3)


def test_samples_of_one_seed_are_not_evidence_of_their_own():
    def rows(copies):
        shared = {"cost": 0.0, "turns": 1, "invalid": 0, "tokens": 3, "components": {}}
        shared |= {"decoding": "sampled"}
        return [
            {**shared, "seed": seed, "return": float(seed % 4), "success": seed % 4 > 2}
            for seed in range(24)
            for _ in range(copies)
        ]

    once, often = (
        summarize_episodes(rows(copies), name="p", env="e")["metrics"] for copies in (1, 8)
    )
    assert often["return"] == once["return"]
    assert often["success"]["mean"] == once["success"]["mean"]
    assert often["success"]["n"] == 24
    assert "pass@8" in often
    assert "pass@1" not in once
