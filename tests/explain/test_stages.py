"""Differences between stages: known changes of weights, and distributions by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.errors import UserError
from rlhf.explain.model_differences import compare_stages
from rlhf.models.policy import Policy
from tests.helpers.models import CONVERSATIONS, tiny_gpt2, tiny_model

TALKS = [
    [
        {"role": "user", "content": f"Say the number {i}."},
        {"role": "assistant", "content": f"I say {i} then {i + 1}."},
    ]
    for i in range(6)
]


def stages():
    model, tokenizer = tiny_model()
    return Policy(model, tokenizer), Policy(copy.deepcopy(model), tokenizer)


def test_a_stage_equals_itself():
    before, after = stages()
    found = compare_stages(before, after, TALKS, names=("base", "sft"))
    assert (found.before, found.after, found.replies) == ("base", "sft", 6)
    assert found.kl.value == pytest.approx(0.0, abs=1e-9)
    assert found.logprob_change.value == 0.0
    assert found.same_top_token.value == 1.0
    assert found.gained == found.lost == []
    assert [layer.weights for layer in found.layers] == [0.0, 0.0]
    assert all(norm.before == norm.after and norm.change == 0 for norm in found.norms)


def test_a_scaled_matrix_changes_by_its_factor():
    before, after = stages()
    with torch.no_grad():
        after.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    found = compare_stages(before, after, TALKS, names=("a", "b"))
    old = before.model.requires_grad_(False).model.layers
    block = sum(p.square().sum() for p in old[1].parameters())
    changed = old[1].mlp.up_proj.weight.square().sum() * 0.25
    assert found.layers[0].weights == 0
    assert found.layers[1].weights == pytest.approx(float((changed / block).sqrt()), rel=1e-5)
    # The first block has the same outputs, the second does not.
    assert found.layers[0].states == pytest.approx(0, abs=1e-6)
    assert found.layers[1].states > 1e-4
    assert found.layers[1].cosine < 1 - 1e-9
    norms = {norm.group: norm for norm in found.norms}
    up = norms["model.layers.mlp.up_proj"]
    both = sum(layer.mlp.up_proj.weight.square().sum() for layer in old)
    assert up.before == pytest.approx(float(both.sqrt()), rel=1e-5)
    assert up.change == pytest.approx(float((changed / both).sqrt()), rel=1e-5)
    assert norms["model.layers.mlp.down_proj"].change == 0


def test_kl_and_log_probabilities_of_a_known_change():
    before, after = stages()
    token = before.tokenizer(" number", add_special_tokens=False)["input_ids"][0]

    def add_to_logits(module, inputs, output):
        output.logits[..., token] += 2.0
        return output

    after.model.register_forward_hook(add_to_logits)
    found = compare_stages(before, after, TALKS[:1], names=("a", "b"))
    text = before.tokenizer.apply_chat_template(TALKS[0], tokenize=False)
    ids = before.tokenizer(text, add_special_tokens=False)["input_ids"]
    size = len(found.gained) + len(found.lost)
    assert size > 0
    with torch.no_grad():
        logits = before.model(input_ids=torch.tensor([ids])).logits[0].double()
    shifted = logits.clone()
    shifted[:, token] += 2.0
    old, new = logits.log_softmax(-1), shifted.log_softmax(-1)
    end = len(ids) - ids[::-1].index(before.tokenizer.eos_token_id)
    reply = before.tokenizer("I say 0 then 1.", add_special_tokens=False)["input_ids"]
    where = slice(
        end - len(reply) - 2, end - 1
    )  # the positions before the reply and its stop token
    kl = (new.exp() * (new - old)).sum(-1)[where].mean()
    assert found.kl.value == pytest.approx(float(kl), abs=1e-5)
    targets = torch.tensor(ids)[where.start + 1 : where.stop + 1, None]
    change = (new - old)[where].gather(1, targets).mean()
    assert found.logprob_change.value == pytest.approx(float(change), abs=1e-5)
    assert all(item.after < item.before for item in found.lost)


def test_stages_of_different_models_are_refused():
    before, after = stages()
    other = Policy(*tiny_gpt2())
    with pytest.raises(UserError, match="not stages of one model"):
        compare_stages(before, other, TALKS, names=("a", "b"))
    small = copy.deepcopy(CONVERSATIONS[0])
    small[1]["role"] = "user"
    after.tokenizer = copy.deepcopy(after.tokenizer)
    after.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match="a and b have different tokenizers"):
        compare_stages(before, after, TALKS, names=("a", "b"))
