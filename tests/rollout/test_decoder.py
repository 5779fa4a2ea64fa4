"""The fused decoder against the models' own forward passes."""

import copy
import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from rlhf.config.model import LoraSpec
from rlhf.models.adapters import add_lora
from rlhf.rollout.sampling import decoder
from rlhf.rollout.sampling.base import Request, SamplingParams
from rlhf.rollout.sampling.continuous import Sampler
from rlhf.rollout.sampling.decoder import (
    FusedDecoder,
    PaddedBatchDecoder,
    fused_linear,
    fused_logit_difference,
    make_fastest_matching_decoder,
)
from rlhf.rollout.sampling.kv_cache import RaggedCache
from tests.helpers.models import tiny_gpt2, tiny_model, tiny_qwen2

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, stretched": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
}


def random_model(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


@torch.no_grad()
def logits_by(decoder: Any, model: Any, rows: list[list[int]], cuts: list[int]) -> list[Any]:
    """Logits after each row's last token, the rows being read up to each cut in turn."""
    config = model.config
    cache = RaggedCache(
        config.num_hidden_layers, rows=len(rows), dtype=model.dtype, device=model.device
    )
    found: list[Any] = []
    order = list(range(len(rows)))
    for start, end in zip([0, *cuts], [*cuts, 99], strict=False):
        parts = [rows[row][start:end] for row in order if rows[row][start:end]]
        taking = [row for row in order if rows[row][start:end]]
        counts = [len(part) for part in parts]
        cache.ensure_capacity(end)
        cache.plan_forward_pass(taking, counts)
        ids = torch.tensor([token for part in parts for token in part])
        found.append(dict(zip(taking, decoder(ids, cache).double(), strict=True)))
        cache.advance(taking, counts)
        order.reverse()  # rows need not come in order, nor be neighbors
    return found


def assert_logits_are_those_of_a_whole_pass(model: Any) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(5, 300, size=size).tolist() for size in (30, 11, 9, 30)]
    fused = make_fastest_matching_decoder(model)
    assert isinstance(fused, FusedDecoder)
    cuts = [7, 8, 9, 20, 29]
    for end, found in zip([*cuts, 99], logits_by(fused, model, rows, cuts), strict=True):
        assert found
        for row, logits in found.items():
            whole = model(input_ids=torch.tensor([rows[row][:end]])).logits[0, -1].double()
            assert (logits - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_fused_logits_are_those_of_a_whole_pass(name):
    assert_logits_are_those_of_a_whole_pass(random_model(*KINDS[name]))


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2, tiny_qwen2])
def test_plain_logits_are_those_of_a_whole_pass(make):
    model, _ = make(double=True)
    rows = [list(range(5, 25)), list(range(40, 49)), list(range(60, 80))]
    for end, found in zip(
        [3, 4, 99], logits_by(PaddedBatchDecoder(model), model, rows, [3, 4]), strict=True
    ):
        for row, logits in found.items():
            whole = model(input_ids=torch.tensor([rows[row][:end]])).logits[0, -1]
            assert (logits - whole).abs().max() < 1e-9


def test_other_families_decode_with_own_forward():
    assert isinstance(make_fastest_matching_decoder(tiny_gpt2()[0]), PaddedBatchDecoder)


def test_a_family_is_added_by_its_name(monkeypatch):
    config = SeedOssConfig(**SIZES, head_dim=8)
    assert isinstance(
        make_fastest_matching_decoder(random_model(SeedOssForCausalLM, config)), PaddedBatchDecoder
    )
    monkeypatch.setattr(decoder, "FUSED_FAMILIES", (*decoder.FUSED_FAMILIES, "seed_oss"))
    model = random_model(SeedOssForCausalLM, config)
    assert_logits_are_those_of_a_whole_pass(model)


SCALED_QUERIES = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 1.0,
}
OTHER_FAMILIES: dict[str, tuple[Any, Any, str]] = {
    "other positions": (
        HeliumForCausalLM,
        HeliumConfig(**SIZES, head_dim=4),
        "differs from it by",
    ),
    "other norms": (Olmo2ForCausalLM, Olmo2Config(**SIZES), "does not support its layers"),
    "a merged projection": (Phi3ForCausalLM, Phi3Config(**SIZES), "does not support its layers"),
    "LayerNorm": (StableLmForCausalLM, StableLmConfig(**SIZES), "does not support its layers"),
    "scaled queries in long rows": (
        Ministral3ForCausalLM,
        Ministral3Config(**SIZES, head_dim=8, rope_parameters=SCALED_QUERIES),
        "differs from it by",
    ),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_an_added_family_with_other_layers_keeps_its_own_forward(monkeypatch, caplog, name):
    kind, config, reason = OTHER_FAMILIES[name]
    families = (*decoder.FUSED_FAMILIES, config.model_type)
    monkeypatch.setattr(decoder, "FUSED_FAMILIES", families)
    model = random_model(kind, config)
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_fastest_matching_decoder(model), PaddedBatchDecoder)
    assert f"own forward pass, because the fused decoder {reason}" in caplog.text


class Scaled(LlamaForCausalLM):
    """Says it is a Llama, and is not quite one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        mlp: Any = self.model.layers[0].mlp
        mlp.down_proj.register_forward_hook(lambda module, args, out: 1.01 * out)


def test_fused_decoder_is_not_used_for_modified_model(caplog):
    assert fused_logit_difference(LlamaForCausalLM, LlamaConfig(**SIZES)) < 1e-5
    with caplog.at_level(logging.WARNING):
        assert isinstance(
            make_fastest_matching_decoder(Scaled(LlamaConfig(**SIZES))), PaddedBatchDecoder
        )
    assert "own forward pass" in caplog.text


def test_comparison_does_not_change_random_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_fastest_matching_decoder(random_model(*KINDS["qwen3"]))
    assert torch.equal(torch.rand(3), expected)


def test_fused_linear_keeps_adapters_separate():
    model = add_lora(tiny_model(double=True)[0], LoraSpec(rank=2), seed=0).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    decoder = make_fastest_matching_decoder(model)
    assert isinstance(decoder, FusedDecoder)
    rows = [list(range(5, 25))]
    found = logits_by(decoder, model, rows, [12])[-1][0]
    whole = model(input_ids=torch.tensor(rows)).logits[0, -1]
    assert (found - whole).abs().max() < 1e-9
    with model.disable_adapter():
        without = model(input_ids=torch.tensor(rows)).logits[0, -1]
    assert (without - whole).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 5, 17, 32, 130])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_equals_concatenated_layers(rows, bias, dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, size, bias=bias).to(dtype) for size in (32, 16, 16)]
    x = torch.randn(rows, 48).to(dtype)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(fused_linear(layers)(x), expected)


def test_a_new_decoder_sees_an_update():
    model = random_model(*KINDS["llama"])
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    rows = [[5, 6, 7, 8]]
    old, new = (
        logits_by(make_fastest_matching_decoder(m), m, rows, [])[0][0] for m in (before, model)
    )
    assert (old - new).abs().max() > 1e-2
    whole = model(input_ids=torch.tensor(rows)).logits[0, -1]
    assert (new - whole).abs().max() < 1e-4 * whole.abs().max()


def test_bf16_decodes_as_near_to_float32_as_the_models_own_pass():
    model = random_model(*KINDS["llama"])
    rows = [list(range(5, 35))]
    exact = model(input_ids=torch.tensor(rows)).logits[0, -1].double()
    half = model.bfloat16()
    half.model.rotary_emb.float()  # angles are not rounded
    ours = logits_by(make_fastest_matching_decoder(half), half, rows, list(range(10, 30)))[-1][0]
    theirs = half(input_ids=torch.tensor(rows)).logits[0, -1].double()
    assert (ours - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


def test_the_cache_is_freed_at_once():
    model, _ = tiny_model()
    sampling = SamplingParams(stop_ids=frozenset({1}))
    sampler = Sampler(model, rows=2)
    sampler.start_request(Request(0, [5, 6, 7], 3, (0,), sampling))
    sampler.step()
    keys = weakref.ref(sampler.cache.ragged[0].keys)
    weights = weakref.ref(sampler.decoder)
    gc.disable()
    try:
        del sampler
        assert keys() is None
        assert weights() is None
    finally:
        gc.enable()
