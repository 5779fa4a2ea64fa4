"""top-k, top-p and min-p by hand, in the sampler, and where they are refused."""

import math

import pytest
import torch

from rlhf.config.load import build_config
from rlhf.config.model import ModelSpec
from rlhf.config.online import OnlineConfig
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.rollout.sampling.base import SamplingParams
from rlhf.rollout.sampling.draw import sample_tokens_and_logprobs, truncated_logits

PROBABILITIES = [0.5, 0.1, 0.25, 0.15]


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.6}, [0, 2]),  # 0.5 does not reach it, 0.75 does
        ({"top_p": 0.8}, [0, 2, 3]),
        ({"min_p": 0.4}, [0, 2]),  # at least 0.4 * 0.5
        ({"min_p": 0.25}, [0, 2, 3]),
        ({"top_k": 3, "min_p": 0.45}, [0, 2]),
    ],
)
def test_truncation_keeps_expected_tokens(spec: dict, kept: list[int]):
    logits = torch.tensor([PROBABILITIES], dtype=torch.float64).log() + 3.0
    found = truncated_logits(logits, SamplingParams(**spec))
    assert found.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(found[0, kept], logits[0, kept])


def test_truncation_always_keeps_a_token():
    even = torch.zeros(1, 300)
    assert truncated_logits(even, SamplingParams(top_p=0.01)).isfinite().sum() == 3
    sure = torch.tensor([[0.0, 90.0, 0.0]])
    for spec in ({"top_p": 1e-9}, {"min_p": 0.999}, {"top_k": 1}):
        assert truncated_logits(sure, SamplingParams(**spec)).isfinite().tolist() == [
            [False, True, False]
        ]


def test_draw_reports_renormalized_logprobs_after_truncation():
    logits = torch.tensor([PROBABILITIES], dtype=torch.float64).log().repeat(1000, 1)
    numbers = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    tokens, logprobs = sample_tokens_and_logprobs(logits, numbers, SamplingParams(top_p=0.6))
    shares = torch.bincount(tokens, minlength=4) / 1000
    assert shares.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0], abs=2e-3)
    expected = [math.log(2 / 3) if token == 0 else math.log(1 / 3) for token in tokens.tolist()]
    assert logprobs.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("key", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_training_refuses_truncation(key: dict):
    (name,) = key
    with pytest.raises(ValueError, match=rf"rollout\.{name} cannot be used in training: .*ratio"):
        OnlineConfig(
            output_dir="x",
            model=ModelSpec("m"),
            env=EnvSpec("text/Echo-v0"),
            rollout=RolloutSpec(**key),
        )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be > 0"),
        ({"min_p": 1.0}, "min_p must be < 1"),
    ],
)
def test_values_out_of_range(key: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_config(RolloutSpec, key)
