"""The quick gate of a SwiGLU layer against the model's own."""

import copy

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.models.fast import swiglu as gates

SIZES = {"hidden_size": 8, "intermediate_size": 24, "num_attention_heads": 2}


def layer(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(LlamaMLP(LlamaConfig(**SIZES)))


@pytest.mark.parametrize("cached", [1, 100, 10**6])
@pytest.mark.parametrize("shape", [(9, 8), (2, 5, 8), (0, 8)])
def test_values_and_gradients_are_the_model_s(monkeypatch, cached, shape):
    monkeypatch.setattr(gates, "CHUNK_ELEMENTS", cached)
    plain = layer().double()
    fast = copy.deepcopy(plain)
    assert gates.patch_swiglu(fast) == 1
    x, upstream = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    found = []
    for model in (plain, fast):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        found.append((out, *torch.autograd.grad(out, [leaf, *model.parameters()], upstream)))
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def test_the_gradient_by_hand():
    # silu(0) = 0 and silu'(0) = 1/2, so at g = 0 the gate passes u / 2 on to g and nothing to u.
    gate = torch.zeros(1, 2, requires_grad=True)
    up = torch.tensor([[4.0, -6.0]], requires_grad=True)
    out = gates.SwiGLUFunction.apply(gate, up)
    out.backward(torch.tensor([[1.0, 10.0]]))
    assert not out.any()
    assert gate.grad.tolist() == [[2.0, -30.0]]
    assert up.grad.tolist() == [[0.0, 0.0]]


def test_bf16_outputs_are_the_model_s_to_the_bit():
    plain = layer().bfloat16()
    fast = copy.deepcopy(plain)
    gates.patch_swiglu(fast)
    x = torch.randn(7, 8).bfloat16()
    assert torch.equal(plain(x), fast(x))


def test_other_feed_forward_layers_are_not_patched():
    other = Gemma2MLP(Gemma2Config(**SIZES))  # gelu
    assert gates.patch_swiglu(torch.nn.Sequential(other)) == 0
