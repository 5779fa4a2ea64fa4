"""Quick pieces that do not compute what a model computes are switched off for it."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf.errors import UserError
from rlhf.models.architecture import computation_change_lengths, text_config
from rlhf.models.fast import rmsnorm as norms
from rlhf.models.fast import swiglu as gates
from rlhf.models.fast import verification
from rlhf.models.fast.packing import uses_packed_attention
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.policy import Policy
from rlhf.models.reduced_model import small_random_model_like
from rlhf.rollout.sampling import verification as sampler_verification
from rlhf.rollout.sampling.verification import (
    check_sampler_or_disable_cache,
    sampler_logprob_difference,
)
from tests.helpers.models import tiny_model, tiny_tokenizer
from tests.models.families import FAMILIES, model_of

LENGTHS = (37, 9, 24)


def scores(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities as training computes them, and by plain passes over single rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.where(mask, torch.randint(5, 300, mask.shape, generator=generator), 0)
    actions = mask.clone()
    actions[:, 0] = False
    plain = torch.zeros(mask.shape)
    for row, length in enumerate(LENGTHS):
        logits = model(input_ids=tokens[row : row + 1, :length], use_cache=False).logits[0]
        found = logits.log_softmax(-1)[:-1].gather(1, tokens[row, 1:length, None])[:, 0]
        plain[row, 1:length] = found.detach()
    scored = Policy(model, tiny_tokenizer()).score(tokens, mask, actions)
    scored.logprobs.sum().backward()
    return scored.logprobs.detach(), plain


def test_ordinary_model_keeps_all_fast_paths():
    model, _ = tiny_model()
    found, plain = scores(model)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert uses_packed_attention(model.model)
    assert not getattr(model.model, "reads_single_rows", False)


def test_rows_are_read_one_by_one_if_batching_changes_states():
    model, _ = tiny_model()
    own = model.model.forward

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        rows = len(output.last_hidden_state)
        if rows > 1 or "packing" in kwargs:
            output.last_hidden_state = output.last_hidden_state * 1.2
        return output

    model.model.forward = disturbed
    found, plain = scores(model)
    assert model.model.reads_single_rows
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_rmsnorm_patch_is_undone_if_gradients_differ(monkeypatch):
    def blind(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * scale * weight.detach()  # right values, no gradient of the weight

    monkeypatch.setattr(norms._RMSNorm, "apply", staticmethod(blind))
    model, _ = tiny_model()
    found, plain = scores(model)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert model.model.norm.weight.grad.abs().max() > 0


def test_swiglu_patch_is_undone_if_activations_differ(monkeypatch):
    kept = gates.SwiGLUFunction.apply

    def clipped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return kept(gate.clamp(max=0.5), up)

    monkeypatch.setattr(gates, "_swiglu_gives_same_outputs", lambda module: True)
    monkeypatch.setattr(gates.SwiGLUFunction, "apply", staticmethod(clipped))
    model, _ = tiny_model()
    found, plain = scores(model)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_tied_embedding_is_not_used_if_embeddings_are_scaled():
    """Falcon-H1 scales what it looks up, not what it is handed."""
    model = model_of("falcon_h1")
    found, plain = scores(model)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_nondeterministic_model_is_refused():
    model, _ = tiny_model()
    own, calls = model.model.forward, []

    def drifting(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        calls.append(1)
        output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * len(calls))
        return output

    model.model.forward = drifting
    with pytest.raises(UserError, match=r"in training differ from .* one row by") as error:
        enable_fast_paths(model)
    assert "\n" not in str(error.value)


def test_a_refusal_states_the_difference_in_tolerances(monkeypatch):
    """Those of states and of gradients differ, so a relative difference would be ambiguous."""
    monkeypatch.setattr(verification, "_gap_in_tolerances", lambda *_: 5.0)
    with pytest.raises(UserError, match=r"states or gradients .* by 5 times the tolerance"):
        enable_fast_paths(tiny_model()[0])


def test_verification_leaves_model_unchanged():
    model, _ = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = torch.random.get_rng_state()
    enable_fast_paths(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())


def windowed(window: int) -> Any:
    """A Mistral of which a row of ``window`` tokens is too long to be tried."""
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=window,
    )
    return MistralForCausalLM(config).eval()


def test_long_windows_are_verified_on_reduced_model(monkeypatch):
    seen = []
    own = verification._enable_agreeing_paths

    def spy(model: Any, **kwargs: Any) -> int:
        seen.append(computation_change_lengths(text_config(model)))
        return own(model, **kwargs)

    monkeypatch.setattr(verification, "_enable_agreeing_paths", spy)
    monkeypatch.setattr(verification, "CPU_WORK", 1.0)
    enable_fast_paths(windowed(1000))
    assert seen == [[8], [1000]]


def test_fast_paths_wrong_beyond_windows_are_disabled(monkeypatch):
    monkeypatch.setattr(verification, "CPU_WORK", 1.0)
    own = verification._enable_agreeing_paths

    def slowest(model: Any, *, max_row_tokens: int, num_disabled: int) -> int:
        return own(model, max_row_tokens=max_row_tokens, num_disabled=max(num_disabled, 4))

    monkeypatch.setattr(verification, "_enable_agreeing_paths", slowest)
    model = windowed(1000)
    assert not enable_fast_paths(model)
    assert model.model.reads_single_rows


def test_most_families_have_a_reduced_form():
    without = [
        name for name in list(FAMILIES)[::6] if small_random_model_like(model_of(name)) is None
    ]
    assert len(without) <= len(FAMILIES) // 6 // 5, without


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "gpt_neo", "phi3-longrope"])
def test_the_sampler_agrees_with_plain_passes_beyond_windows(name):
    model = model_of(name)
    check_sampler_or_disable_cache(model)
    assert sampler_logprob_difference(model, max_episode_tokens=100) < 1e-5


def test_sampler_check_disables_wrong_cache(monkeypatch):
    model = model_of("llama")
    own = sampler_verification.Sampler.step

    def confused(self: Any) -> Any:
        if getattr(self.decoder, "cached", True):  # not the decoder that reads rows anew
            self.cache.lengths[:] = 0
        return own(self)

    monkeypatch.setattr(sampler_verification.Sampler, "step", confused)
    check_sampler_or_disable_cache(model)
    monkeypatch.undo()
    assert sampler_verification.Sampler(model, rows=1).decoder.cached is False


@pytest.mark.parametrize(("tokens_off", "cached"), [(1, True), (2, False)])
def test_in_half_precision_single_tokens_may_differ_by_nats(monkeypatch, tokens_off, cached):
    """Two wrong log-probabilities of ten are rounding in bfloat16; four disable the cache."""
    model = model_of("llama").to(torch.bfloat16)
    monkeypatch.setattr(sampler_verification, "small_random_model_like", lambda model: None)
    own = sampler_verification.Sampler.step

    def shifted(self: Any) -> Any:
        completions = own(self)
        for completion in completions:
            if getattr(self.decoder, "cached", True) and (completion.request.episode_id == 0):
                completion.logprobs[:tokens_off] = [
                    p - 8.0 for p in completion.logprobs[:tokens_off]
                ]
        return completions

    monkeypatch.setattr(sampler_verification.Sampler, "step", shifted)
    check_sampler_or_disable_cache(model)
    monkeypatch.undo()
    sampler = sampler_verification.Sampler(model, rows=1)
    assert getattr(sampler.decoder, "cached", True) is cached


def test_sampler_check_refuses_wrong_logprobs(monkeypatch):
    model, _ = tiny_model()
    own = sampler_verification.Sampler.step

    def shifted(self: Any) -> Any:
        completions = own(self)
        for completion in completions:
            completion.logprobs[:] = [p + 1.0 for p in completion.logprobs]
        return completions

    monkeypatch.setattr(sampler_verification.Sampler, "step", shifted)
    with pytest.raises(
        UserError, match="differ from those of a forward pass over the row"
    ) as error:
        check_sampler_or_disable_cache(model)
    assert "\n" not in str(error.value)
