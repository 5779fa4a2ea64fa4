"""The load-balancing loss of a mixture of experts: transformers' own, and TRL's."""

import pytest
import torch

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.models.load_balancing import balancing_loss_weight
from rlhf.models.policy import Policy
from rlhf.training.examples import Example
from rlhf.training.supervised import collate_examples, sft_loss
from tests.helpers.models import tiny_tokenizer
from tests.helpers.training import offline_tree, write_rows
from tests.models.families import model_of

FAMILIES = ("mixtral", "qwen3_moe", "jetmoe", "granitemoe", "dbrx", "gpt_oss", "qwen3_next")
WEIGHT = 0.3


def balanced(name):
    """A mixture whose configuration asks for the loss."""
    model = model_of(name)
    model.config.output_router_logits = True
    for key in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(model, key):
            setattr(model, key, WEIGHT)
    return model


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (21, 9, 14)]
    examples = [Example((row,), ([-100, -100, *row[2:]],)) for row in rows]
    return collate_examples(examples, pad_id=0, device=torch.device("cpu"))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradient_are_transformers_own(name):
    part = batch()
    model = balanced(name)
    labels = torch.where(part.action_mask, part.tokens, -100)
    own = model(input_ids=part.tokens, attention_mask=part.attention_mask.long(), labels=labels)
    own.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = Policy(model, tiny_tokenizer())
    loss, metric_sums = sft_loss(policy, part, denominator=part.action_mask.sum())
    loss.backward()
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert WEIGHT * own.aux_loss.item() > 0.1
    metrics = metric_sums.compute()
    assert metrics["loss"] == pytest.approx(own.loss.item(), rel=1e-5)
    assert metrics["loss_balance"] == pytest.approx(WEIGHT * own.aux_loss.item(), rel=1e-5)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for n, parameter in model.named_parameters():
        if n in expected:
            assert (parameter.grad - expected[n]).abs().max() < 1e-5 * largest, n


def test_micro_batches_are_weighted_by_tokens():
    part = batch()
    policy = Policy(balanced("mixtral"), tiny_tokenizer())
    count = part.action_mask.sum()
    pieces = [part.select(torch.tensor([0])), part.select(torch.tensor([1, 2]))]
    balances = [
        policy.score(
            p.tokens, p.attention_mask, p.action_mask, with_balancing_loss=True
        ).balancing_loss
        for p in pieces
    ]
    plain = sum(
        -policy.score(p.tokens, p.attention_mask, p.action_mask).logprobs[p.action_mask].sum()
        for p in pieces
    )
    expected = plain / count + sum(
        b * p.action_mask.sum() / count for b, p in zip(balances, pieces, strict=True)
    )
    found = sum(sft_loss(policy, p, denominator=count)[0] for p in pieces)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_micro_batches_keep_their_limit_although_rows_are_padded(tmp_path, monkeypatch, command):
    model = balanced("mixtral")
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    texts = ["no " * (20 if i % 8 == 0 else 1) for i in range(24)]
    columns = ("completion",) if command == "sft" else ("chosen", "rejected")
    rows = [{"prompt": f"p{i}", **dict.fromkeys(columns, t)} for i, t in enumerate(texts)]
    if command == "dpo":
        rows = [row | {"rejected": "yes"} for row in rows]
    sizes = []
    score = Policy.score

    def recorded(policy, tokens, *given, **settings):
        sizes.append(tokens.numel())
        return score(policy, tokens, *given, **settings)

    monkeypatch.setattr(Policy, "score", recorded)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    batches = {"batch_size": 8, "micro_batch_size": 2, "max_length": 64}
    tree = offline_tree(tmp_path / "run", tmp_path / "model", data, **batches)
    run_command(command, {**tree, "trainer": {"max_steps": 2, "learning_rate": 1e-3}})
    assert 64 < max(sizes) <= 2 * 64


def test_without_the_setting_nothing_is_added():
    model = model_of("mixtral")
    assert balancing_loss_weight(model) == 0
    _, metric_sums = sft_loss(
        Policy(model, tiny_tokenizer()), batch(), denominator=torch.tensor(38)
    )
    assert "loss_balance" not in metric_sums.compute()


def test_a_model_without_such_a_loss_is_refused():
    model = model_of("deepseek_v3")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="has no load-balancing loss: set") as error:
        balancing_loss_weight(model)
    assert "\n" not in str(error.value)
