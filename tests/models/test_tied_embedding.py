"""One gradient for the two uses of a tied weight, against autograd's own."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from rlhf.config.model import LoraSpec
from rlhf.models.adapters import add_lora
from rlhf.models.fast import chunked_logprobs as logprobs_module
from rlhf.models.fast.tied_embedding import make_tied_embedding
from rlhf.models.policy import Policy
from tests.helpers.models import tiny_gpt2, tiny_model

Masks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def some_rows(seed: int) -> Masks:
    """Tokens of few kinds, so that most are read several times; attention and action masks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 12, (3, 17), generator=generator)
    lengths = torch.tensor([17, 9, 13])
    attention = torch.arange(17) < lengths[:, None]
    actions = attention & (torch.arange(17) >= 4)
    return tokens, attention, actions


def plain_loss(policy: Policy, masks: Masks) -> torch.Tensor:
    tokens, attention, actions = masks
    logits = policy.model(input_ids=tokens, attention_mask=attention.long()).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (chosen.square() * actions[:, 1:]).sum()


def tied_loss(policy: Policy, masks: Masks) -> torch.Tensor:
    return policy.score(*masks, with_entropy=False).logprobs.square().sum()


def table_gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, [policy.model.get_input_embeddings().weight])[0]


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
@pytest.mark.parametrize("chunk", [10**9, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_over_several_passes_are_the_plain_ones(monkeypatch, make, chunk, seed):
    monkeypatch.setattr(logprobs_module, "HEAD_CHUNK_LOGITS", chunk)
    ours = Policy(*make(double=True, seed=seed))
    plain = copy.deepcopy(ours)
    for part in range(3):
        plain_loss(plain, some_rows(part)).backward()
        tied_loss(ours, some_rows(part)).backward()
    for name, exact in plain.model.named_parameters():
        grad = ours.model.get_parameter(name).grad
        assert not grad.is_sparse
        torch.testing.assert_close(grad, exact.grad, rtol=1e-11, atol=1e-12)


def test_the_rows_by_hand():
    model, _ = tiny_model(double=True)
    weight = model.get_input_embeddings().weight
    tied = make_tied_embedding(model)
    states = torch.full((1, weight.shape[1]), 2.0, dtype=weight.dtype)
    loss = tied.embed(torch.tensor([5, 7, 5])).sum() + linear(states, tied.head).sum()
    loss.backward()
    expected = torch.full_like(weight, 2.0)
    expected[5] += 2
    expected[7] += 1
    assert torch.equal(weight.grad, expected)


def test_value_loss_alone_gives_dense_embedding_gradient():
    policy = Policy(*tiny_model(double=True), critic="shared")
    torch.nn.init.ones_(policy.value_head.linear.weight)
    tokens, attention, actions = some_rows(0)
    ours = table_gradient(policy, policy.score(tokens, attention, actions).values.sum())
    hidden = policy.model.base_model(input_ids=tokens, attention_mask=attention.long())[0]
    values = policy.value_head(hidden)[:, :-1]
    plain = table_gradient(policy, (values * actions[:, 1:]).sum())
    assert not ours.is_sparse
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)


def test_embedding_gradient_in_bf16_keeps_small_rows():
    model, _ = tiny_model()
    model = model.to(torch.bfloat16)
    tied = make_tied_embedding(model)
    weight = model.get_input_embeddings().weight
    # 1,000 rows of 1 each: a bf16 sum stops at 256, where 1 is half of the last bit.
    rows = tied.embed(torch.full((1000,), 5)).sum()
    states = torch.full((1, weight.shape[1]), 24.0, dtype=weight.dtype)
    (rows + linear(states, tied.head).sum()).backward()
    assert (weight.grad[5] == 1024).all()
    assert (weight.grad[6] == 24).all()


def test_no_dense_embedding_gradient_is_allocated():
    policy = Policy(*tiny_model())
    weight = policy.model.get_input_embeddings().weight
    loss = tied_loss(policy, some_rows(0))
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    touched = [
        event.name
        for event in profile.events()
        if [*weight.shape] in event.input_shapes
        and not (event.cpu_parent and event.cpu_parent.name == "aten::add_")  # writes in place
    ]
    assert "aten::add_" in touched
    assert not {"aten::fill_", "aten::zero_", "aten::copy_", "aten::add"} & {*touched}


def untied() -> Any:
    model, _ = tiny_model()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def test_tied_embedding_is_not_used_without_benefit():
    assert make_tied_embedding(untied()) is None
    assert make_tied_embedding(tiny_model()[0].requires_grad_(False)) is None
    assert make_tied_embedding(add_lora(tiny_model()[0], LoraSpec(rank=2), seed=0)) is None
    model, _ = tiny_model()
    assert make_tied_embedding(model) is not None
    with torch.no_grad():
        assert make_tied_embedding(model) is None
    model.get_input_embeddings().max_norm = 1.0  # looking up would change the weight
    assert make_tied_embedding(model) is None
    model, _ = tiny_model()
    model.get_input_embeddings().scale_grad_by_freq = True
    assert make_tied_embedding(model) is None
    model, _ = tiny_model()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    assert make_tied_embedding(model) is None
