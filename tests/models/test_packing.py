"""Rows laid end to end score as they do padded, whatever the architecture."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.models.fast.packing import (
    enable_packing,
    flat_states_and_token_index,
    group_neighbors_by_shared_prefix,
    pack,
    uses_packed_attention,
)
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.policy import Policy

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=120, eos_token_id=1, bos_token_id=1)
PACKING = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gpt2": GPT2,
}
PLAIN = {
    "soft-capped": Gemma2Config(**SMALL),
    "alibi": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=120),
}


def make(config, *, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).double().eval()


def some_rows(seed):
    """Six rows: the first three begin alike, the fourth and fifth too; (tokens, mask, actions)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 120, (6, 60), generator=generator)
    tokens[1:3, :40] = tokens[0, :40]
    tokens[4, :50] = tokens[3, :50]
    lengths = torch.tensor([60, 50, 55, 60, 52, 20])
    mask = torch.arange(60) < lengths[:, None]
    tokens = torch.where(mask, tokens, 0)
    starts = torch.tensor([40, 30, 45, 50, 51, 1])
    return tokens, mask, mask & (torch.arange(60) >= starts[:, None])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PACKING)
def test_scores_and_gradients_are_those_of_padded_rows(name, seed):
    tokens, mask, actions = some_rows(seed)
    found = []
    for supports_packing in (True, False):
        policy = Policy(make(PACKING[name], seed=seed), None, critic="shared")
        assert policy.supports_packing
        if not supports_packing:
            policy.model.set_attn_implementation("sdpa")
        assert policy.value_head is not None
        torch.nn.init.ones_(policy.value_head.linear.weight)
        scored = policy.score(tokens, mask, actions)
        assert scored.values is not None
        assert scored.last_value is not None
        parts = (scored.logprobs, scored.entropy, scored.values, scored.last_value)
        sum(part.sin().sum() for part in parts).backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        found.append((*parts, torch.cat([g.flatten() for g in gradients])))
    for ours, exact in zip(*found, strict=True):
        # Norms are computed in float32 by these models, whatever their weights.
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_shared_prefixes_are_computed_once():
    tokens, mask, _ = some_rows(0)
    packed = pack(tokens, mask)
    saved = 2 * 40 + 50
    assert packed.tokens.shape == (1, int(mask.sum()) - saved)
    there = packed.tokens[0][packed.index]
    assert torch.equal(there[mask], tokens[mask])
    assert torch.equal(packed.positions[0][packed.index][mask], mask.cumsum(1)[mask] - 1)


def test_row_joins_prefix_group_only_if_tokens_are_saved():
    rows = torch.zeros(5, 100, dtype=torch.long)
    rows[:2], rows[2:4] = 1, 2
    rows[:, :40] = 3  # a system prompt that all share
    lengths = mask_lengths = torch.tensor([100, 90, 100, 100, 41]).numpy()
    assert group_neighbors_by_shared_prefix(rows.numpy(), lengths) == [
        ([0, 1], 90),
        ([2, 3], 100),
        ([4], 0),
    ]
    rows[:, :40] = torch.arange(5)[:, None]
    rows[2:4, :40] = 9
    assert group_neighbors_by_shared_prefix(rows.numpy(), mask_lengths)[-1] == ([4], 0)


@pytest.mark.parametrize("name", PLAIN)
def test_models_without_packing_are_unchanged(name):
    model = make(PLAIN[name])
    tokens, mask, _ = some_rows(0)
    before = model.config._attn_implementation
    assert not enable_fast_paths(model)
    assert model.config._attn_implementation == before
    states, index = flat_states_and_token_index(model, tokens, mask)
    plain = model.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states[index][mask], plain[mask])


@pytest.mark.parametrize("limit", [{"sliding_window": 45}, {"sliding_window": None}])
def test_rows_longer_than_a_sliding_window_see_no_further_than_it(limit):
    model = make(MistralConfig(**{**SMALL, **limit}))
    tokens, mask, _ = some_rows(0)
    given = {"input_ids": tokens, "attention_mask": mask.long()}
    plain = model.base_model(**given).last_hidden_state
    assert enable_packing(model)
    states, index = flat_states_and_token_index(model, tokens, mask)
    assert len(states) == (tokens.numel() if limit["sliding_window"] else int(mask.sum()) - 130)
    torch.testing.assert_close(states[index][mask], plain[mask], rtol=1e-4, atol=1e-5)


def test_padding_counts_where_rows_pass_a_window():
    # Cutting a batch into portions must know which passes are padded: they take more memory.
    tokens, mask, _ = some_rows(0)
    real = int(mask.sum()) - 2 * 40 - 50  # shared beginnings count once
    for window, expected in ((45, tokens.numel()), (None, real)):
        policy = Policy(make(MistralConfig(**{**SMALL, "sliding_window": window})), None)
        assert policy.count_computed_tokens(tokens, mask) == expected
        assert policy.packs_rows(mask.sum(1)) == (window is None)
        assert policy.packs_rows(mask[:, :45].sum(1))


def test_a_model_of_few_positions_packs_too():
    model = make(LlamaConfig(**{**SMALL, "max_position_embeddings": 16}))
    assert enable_packing(model)


def test_a_packing_model_still_reads_padded_batches_and_saves_clean(tmp_path):
    model = make(PACKING["llama"])
    tokens, mask, _ = some_rows(0)
    before = model(input_ids=tokens, attention_mask=mask.long()).logits
    assert enable_packing(model)
    after = model(input_ids=tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(after[mask], before[mask], rtol=1e-9, atol=1e-9)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert not uses_packed_attention(AutoModelForCausalLM.from_pretrained(tmp_path).base_model)
