"""Scores of the policy and its reference against plain transformers logits, in float64."""

from typing import Any

import pytest
import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.config.model import LoraSpec
from rlhf.models.adapters import add_lora
from rlhf.models.fast import chunked_logprobs
from rlhf.models.policy import Policy, ReferencePolicy
from rlhf.rollout.batch import collate
from tests.helpers.models import tiny_gpt2, tiny_model, tiny_policy, tiny_qwen2, tiny_rollouts

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}


def some_batch(*, seed: int = 0, pad_id: int = 0) -> TrainingBatch:
    rollouts = tiny_rollouts(seed=seed)
    rewards = [rollout.env_rewards for rollout in rollouts]
    return collate(rollouts, rewards, pad_id=pad_id, device=torch.device("cpu"))


def masks(batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.tokens, batch.attention_mask, batch.action_mask


def plain_distribution(model, batch: TrainingBatch, temperature: float = 1.0) -> torch.Tensor:
    """[B, T, V] log p(. | tokens[<t]) from the whole model, row by row and without padding."""
    rows = []
    for tokens, mask in zip(batch.tokens, batch.attention_mask, strict=True):
        length = int(mask.sum())
        logits = model(input_ids=tokens[None, :length]).logits[0] / temperature
        shifted = torch.cat([torch.zeros_like(logits[:1]), logits[:-1]]).log_softmax(-1)
        rows.append(torch.nn.functional.pad(shifted, (0, 0, 0, len(tokens) - length)))
    return torch.stack(rows)


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    for parameter in policy.parameters():
        parameter.grad = None
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2, tiny_qwen2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_equal_the_full_softmax(make, temperature):
    policy: Any = Policy(*make(double=True))
    batch = some_batch()
    scored = policy.score(*masks(batch), temperature=temperature)
    full = plain_distribution(policy.model, batch, temperature)
    chosen = full.gather(-1, batch.tokens[..., None]).squeeze(-1)
    entropy = -(full.exp() * full).sum(-1)
    mine = batch.action_mask
    torch.testing.assert_close(scored.logprobs[mine], chosen[mine], **EXACT)
    torch.testing.assert_close(scored.entropy[mine], entropy[mine], **EXACT)
    assert (scored.logprobs[~mine] == 0).all()
    assert (scored.entropy[~mine] == 0).all()
    ours = gradients(policy, scored.logprobs.sum() + scored.entropy.sum())
    plain = gradients(policy, chosen[mine].sum() + entropy[mine].sum())
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_chunks_do_not_change_values_or_gradients(monkeypatch):
    policy = tiny_policy(critic="shared")
    batch = some_batch()
    whole = policy.score(*masks(batch))
    whole_grads = gradients(policy, (whole.logprobs * whole.entropy).sum())
    monkeypatch.setattr(chunked_logprobs, "HEAD_CHUNK_LOGITS", 4 * policy.model.config.vocab_size)
    chunked = policy.score(*masks(batch))
    torch.testing.assert_close(chunked.logprobs, whole.logprobs, **EXACT)
    torch.testing.assert_close(chunked.entropy, whole.entropy, **EXACT)
    for a, b in zip(
        gradients(policy, (chunked.logprobs * chunked.entropy).sum()), whole_grads, strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("extra", [1, 7])
def test_padding_does_not_change_scores(critic, extra):
    policy = tiny_policy(critic=critic)
    torch.nn.init.normal_(policy.value_head.linear.weight)
    batch = some_batch()
    wide = [torch.nn.functional.pad(x, (0, extra)) for x in masks(batch)]
    # Whatever stands where the padding is, nobody reads it.
    wide[0] = torch.where(wide[1], wide[0], 7)

    def everything(tokens, attention, actions):
        scored = policy.score(tokens, attention, actions)
        total = scored.logprobs.sum() + scored.values.sum() + scored.last_value.sum()
        return scored, gradients(policy, total + scored.entropy.sum())

    (narrow, narrow_grads), (padded, padded_grads) = everything(*masks(batch)), everything(*wide)
    width = batch.tokens.shape[1]
    for name in ("logprobs", "entropy", "values"):
        a, b = getattr(narrow, name), getattr(padded, name)
        torch.testing.assert_close(b[:, :width], a, **EXACT)
        assert (b[:, width:] == 0).all()
    torch.testing.assert_close(padded.last_value, narrow.last_value, **EXACT)
    for a, b in zip(narrow_grads, padded_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_of_the_states_before_each_action_and_after_the_last_token(critic):
    policy = tiny_policy(critic=critic)
    head = policy.value_head.linear
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias, 0.3)
    batch = some_batch()
    scored = policy.score(*masks(batch))
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        states = policy.model.model(input_ids=batch.tokens[row : row + 1, :length])
        values = states.last_hidden_state[0] @ head.weight[0] + 0.3  # [length]
        for t in range(length):
            if batch.action_mask[row, t]:
                torch.testing.assert_close(scored.values[row, t], values[t - 1], **EXACT)
            else:
                assert scored.values[row, t] == 0
        torch.testing.assert_close(scored.last_value[row], values[-1], **EXACT)


def test_the_critic_starts_at_zero_and_is_absent_without_one():
    scored = tiny_policy(critic="shared").score(*masks(some_batch()))
    assert (scored.values == 0).all()
    assert (scored.last_value == 0).all()
    without = tiny_policy().score(*masks(some_batch()))
    assert without.values is None
    assert without.last_value is None


def test_a_separate_critic_moves_its_own_trunk_only():
    policy = tiny_policy(critic="separate")
    torch.nn.init.normal_(policy.value_head.linear.weight)
    scored = policy.score(*masks(some_batch()))
    gradients(policy, scored.values.sum())
    assert all(p.grad is None for p in policy.model.parameters())
    assert policy.value_trunk.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    kept = policy.model.model.embed_tokens.weight.clone()
    with torch.no_grad():
        policy.value_trunk.embed_tokens.weight.zero_()
    torch.testing.assert_close(policy.model.model.embed_tokens.weight, kept, rtol=0, atol=0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_the_reference_is_the_policy_at_step_zero_and_stays(lora, double):
    model, tokenizer = tiny_model(double=double)
    if lora:
        model = add_lora(model, LoraSpec(rank=2), seed=0)
        model = model.double() if double else model
    policy: Any = Policy(model, tokenizer)
    assert policy.is_lora == lora
    reference = ReferencePolicy(policy)
    batch = some_batch()
    before = policy.score(*masks(batch)).logprobs
    assert torch.equal(reference.logprobs(*masks(batch)), before.detach())  # to the bit
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves only one of the two factors of an adapter
        policy.score(*masks(batch)).logprobs.sum().backward()
        optimizer.step()
    after = policy.score(*masks(batch)).logprobs
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(reference.logprobs(*masks(batch)), before.detach())


def test_the_reference_follows_the_weights_passed_and_not_a_file(tmp_path):
    model, tokenizer = tiny_model(double=True)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn(model.lm_head.weight.shape))
    policy: Any = Policy(model, tokenizer)
    batch = some_batch()
    gap = ReferencePolicy(policy).logprobs(*masks(batch)) - policy.score(*masks(batch)).logprobs
    assert (gap == 0).all()


def test_the_reference_samples_at_the_temperature_of_the_policy():
    policy = tiny_policy()
    batch = some_batch()
    warm = ReferencePolicy(policy).logprobs(*masks(batch), temperature=0.5)
    assert torch.equal(warm, policy.score(*masks(batch), temperature=0.5).logprobs.detach())


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_survives_saving(critic, tmp_path):
    policy, batch = tiny_policy(critic=critic), some_batch()
    for parameter in policy.value_head.parameters():
        torch.nn.init.normal_(parameter)
    if policy.value_trunk is not None:
        torch.nn.init.normal_(policy.value_trunk.embed_tokens.weight)
    policy.save(tmp_path)
    fresh = tiny_policy(critic=critic)
    fresh.restore(tmp_path)
    expected, found = policy.score(*masks(batch)), fresh.score(*masks(batch))
    assert expected.values.abs().sum() > 0
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.last_value, expected.last_value)


def test_the_value_head_of_a_bf16_policy_is_float32():
    model, tokenizer = tiny_model()
    policy: Any = Policy(model.bfloat16(), tokenizer, critic="shared")
    scored = policy.score(*masks(some_batch()))
    assert policy.value_head.linear.weight.dtype == torch.float32
    assert scored.values.dtype == scored.logprobs.dtype == torch.float32
