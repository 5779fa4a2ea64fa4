"""The quick norm against the model's own."""

import copy

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.models.fast import rmsnorm as norms


def with_norm(norm):
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    return torch.nn.Sequential(norm)


@pytest.mark.parametrize("cached", [1, 40, 10**6])
@pytest.mark.parametrize("shape", [(9, 16), (2, 5, 16), (0, 16)])
def test_values_and_gradients_are_the_model_s(monkeypatch, cached, shape):
    monkeypatch.setattr(norms, "CHUNK_ELEMENTS", cached)
    plain = with_norm(LlamaRMSNorm(16))
    fast = copy.deepcopy(plain)
    assert norms.patch_rmsnorm(fast) == 1
    x = torch.randn(shape)
    upstream = torch.randn(shape)
    found = []
    for model in (plain, fast):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        found.append((out, *torch.autograd.grad(out, [leaf, model[0].weight], upstream)))
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_bf16_outputs_are_the_model_s_to_the_bit():
    plain = with_norm(LlamaRMSNorm(64)).bfloat16()
    fast = copy.deepcopy(plain)
    norms.patch_rmsnorm(fast)
    x = torch.randn(7, 64).bfloat16()
    assert torch.equal(plain(x), fast(x))


def test_other_norms_are_not_patched():
    assert norms.patch_rmsnorm(with_norm(Gemma3RMSNorm(16))) == 0


def test_deep_copy_uses_own_weights():
    model = with_norm(LlamaRMSNorm(16))
    norms.patch_rmsnorm(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
    assert not other(torch.ones(1, 16)).any()
    assert model(torch.ones(1, 16)).any()
