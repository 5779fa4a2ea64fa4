import math

import pytest
import torch

from rlhf.algorithms.penalties import soft_overlong_penalty, subtract_missing_eos_penalty


def test_missing_eos():
    scores = torch.tensor([1.0, 1.0, math.nan])
    found = subtract_missing_eos_penalty(scores, torch.tensor([True, False, True]), penalty=0.5)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, math.nan]), equal_nan=True)


def test_soft_overlong():
    """Limit 100, last fifth: nothing up to 80, half at 90, all at 100."""
    lengths = torch.tensor([0, 80, 81, 90, 100, 120])
    found = soft_overlong_penalty(lengths, max_tokens=100, fraction=0.2)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    assert soft_overlong_penalty(lengths, max_tokens=100, fraction=0.0).abs().sum() == 0
