"""Activation checkpointing changes what is kept, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf.cli.table import run_command
from rlhf.config.model import ScratchSpec
from rlhf.errors import UserError
from rlhf.models import activation_checkpointing
from rlhf.models.policy import Policy
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from tests.helpers.training import (
    offline_tree,
    online_tree,
    pair_rows,
    same,
    sft_rows,
    weights_of,
    write_rows,
)


def make_policy(seed: int, *, critic: str = "none") -> Policy:
    tokenizer = make_tokenizer(["a b c d"] * 4, 300)
    spec = ScratchSpec(hidden_size=32, num_layers=6, num_heads=2, context=64)
    return Policy(make_random_llama_model(spec, tokenizer, seed=seed), tokenizer, critic=critic)


def gradients_and_kept_bytes(policy: Policy) -> tuple[list[torch.Tensor], int]:
    """Gradients of a loss on log-probabilities and values, and the bytes kept for them."""
    tokens = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    actions = mask.clone()
    actions[:, 0] = False
    parameters = [p for module in policy.modules().values() for p in module.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scored = policy.score(tokens, mask, actions)
        loss = -scored.logprobs.sum() + scored.entropy.sum()
        if scored.values is not None:
            loss = loss + scored.values.square().sum()
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None], size


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_equal_and_less_is_kept(seed: int, critic: str) -> None:
    plain, policy = (make_policy(seed, critic=critic) for _ in range(2))
    policy.checkpoint_activations()
    expected, all_bytes = gradients_and_kept_bytes(plain)
    gradients, kept_bytes = gradients_and_kept_bytes(policy)
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)
    assert kept_bytes < all_bytes / 3


def test_a_forward_pass_without_gradients_is_unchanged() -> None:
    policy = make_policy(0)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        policy.checkpoint_activations()
        assert torch.equal(policy.model(input_ids=ids).logits, expected)
        generated = policy.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 21)


def test_the_heap_is_trimmed_after_some_blocks_of_checkpointed_passes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trims = []
    monkeypatch.setattr(activation_checkpointing, "trim_heap", lambda: trims.append(1))
    plain, policy = make_policy(0), make_policy(0)
    gradients_and_kept_bytes(plain)
    policy.checkpoint_activations()
    with torch.no_grad():
        policy.model(input_ids=torch.arange(2, 20)[None])
    assert not trims
    for _ in range(2):  # 24 computed blocks: six in each of two forward and two backward passes
        gradients_and_kept_bytes(policy)
    assert len(trims) == 24 // activation_checkpointing.BLOCKS_PER_TRIM


def run_tree(case: str, folder: Path, model: Path) -> tuple[str, dict[str, Any]]:
    """The command of a case and its configuration."""
    if case in ("shared", "separate"):
        return "ppo", online_tree(folder, model, critic=case, num_steps=2)
    rows = write_rows(folder.parent / "rows.jsonl", sft_rows() if case == "sft" else pair_rows())
    return case, offline_tree(folder, model, rows)


@pytest.mark.parametrize("case", ["sft", "dpo", "reward", "shared", "separate"])
def test_a_run_is_bitwise_that_without_checkpointing(
    case: str, tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = activation_checkpointing.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", counted)
    command, tree = run_tree(case, tmp_path / "plain", echo_model)
    run_command(command, tree)
    assert not calls
    again = {"output_dir": str(tmp_path / "again"), "activation_checkpointing": True}
    run_command(command, tree | again)
    assert calls
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "again"))


def test_the_load_balancing_loss_has_the_same_gradients() -> None:
    tokenizer = make_tokenizer(["a b c d"] * 4, 300)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
    )
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = Policy(MixtralForCausalLM(config).eval(), tokenizer)
        if checkpointing:
            policy.checkpoint_activations()
        tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        actions = mask.clone()
        actions[:, 0] = False
        scored = policy.score(tokens, mask, actions, with_balancing_loss=True)
        assert scored.balancing_loss is not None
        (100 * scored.balancing_loss - scored.logprobs.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    for gradient, other in zip(*gradients, strict=True):
        assert torch.equal(gradient, other)


def test_a_run_of_trl_refuses_it(tmp_path: Path, echo_model: Path) -> None:
    _, tree = run_tree("sft", tmp_path / "run", echo_model)
    with pytest.raises(UserError, match=r"set trainer\.gradient_checkpointing"):
        run_command("sft", tree | {"engine": "trl", "activation_checkpointing": True})
