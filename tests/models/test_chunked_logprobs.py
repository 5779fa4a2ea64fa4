"""Log-probabilities and entropies of chosen tokens against torch's own softmax."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models.fast import chunked_logprobs


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, **shape)
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("cached", [1, 200, 10**9])
@pytest.mark.parametrize("chunk", [1, 350, 10**9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_a_plain_softmax(
    model, monkeypatch, cached, chunk, temperature
):
    monkeypatch.setattr(chunked_logprobs, "SOFTMAX_CHUNK_LOGITS", cached)
    monkeypatch.setattr(chunked_logprobs, "HEAD_CHUNK_LOGITS", chunk)
    hidden = torch.randn(13, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (13,))
    upstream = torch.randn(2, 13, dtype=torch.float64)
    inputs = [hidden, model.lm_head.weight]

    ours = chunked_logprobs.target_logprobs_and_entropies(
        model, hidden, targets, temperature=temperature
    )
    exact = torch.log_softmax(model.lm_head(hidden) / temperature, -1)
    exact = (exact.gather(1, targets[:, None])[:, 0], -(exact.exp() * exact).sum(-1))
    for mine, plain in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, plain)
    found = torch.autograd.grad(ours, inputs, list(upstream))
    wanted = torch.autograd.grad(exact, inputs, list(upstream))
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain)


def test_without_entropy_the_log_probabilities_and_their_gradient_are_the_same(model):
    hidden = torch.randn(13, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (13,))
    results = []
    for with_entropy in (True, False):
        chosen, entropy = chunked_logprobs.target_logprobs_and_entropies(
            model, hidden, targets, with_entropy=with_entropy
        )
        results.append((chosen, *torch.autograd.grad(chosen.sin().sum(), hidden)))
    assert not entropy.any()
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain)


def test_softmax_of_bf16_logits_adds_no_rounding(model):
    low = model.to(torch.bfloat16)
    hidden = torch.randn(13, 16).bfloat16()
    targets = torch.randint(50, (13,))
    chosen, _ = chunked_logprobs.target_logprobs_and_entropies(low, hidden, targets)
    exact = torch.log_softmax(low.lm_head(hidden).double(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(chosen.double(), exact, rtol=1e-5, atol=1e-5)
