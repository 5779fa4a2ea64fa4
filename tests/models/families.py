"""A tiny model of every architecture family that transformers has a causal language model for.

Each is a few layers with random weights, narrow, with shared key heads, short windows, several
kinds of layers and few experts wherever the family has them, so that what sets the family apart
takes part in 60 tokens. ``USUAL`` holds the size of a field wherever a configuration has that
field; ``FAMILIES`` holds what a family needs beside it.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 12
VOCABULARY = 320
CONTEXT = 256

USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention.
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # State spaces and linear attention.
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # GPT-2, OPT, BART, MPT and their kin.
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "n_ctx": CONTEXT,
    "n_inner": 64,
    "rotary_dim": 8,
    "d_model": 48,
    "ffn_dim": 64,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "emb_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": CONTEXT,
    "dff": 64,
    "is_decoder": True,
    # What is compared should not depend on chance.
    **dict.fromkeys(
        (
            "activation_dropout",
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_pdrop",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "emb_pdrop",
            "hidden_dropout",
            "hidden_dropout_prob",
            "local_attention_probs_dropout_prob",
            "input_jitter_noise",
            "resid_pdrop",
            "residual_dropout",
            "router_jitter_noise",
            "summary_first_dropout",
        ),
        0.0,
    ),
}

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
BART = {"scale_embedding": True, "num_hidden_layers": 2, "encoder_layers": 2}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 32,
}

# Name of a family -> fields beside the usual ones; "model_type" where the name is not one.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": SLIDING, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "axk1": LATENT,
    "axk2": LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16},
    "bailing_hybrid": LATENT | {"layer_types": LINEAR, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "bart": BART,
    "beam": {"layer_types": [*SLIDING[:2], "full_attention"]},
    "bert": {},
    "bert-generation": {},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": BART,
    "biogpt": {},
    "bitnet": {},
    "blenderbot": BART,
    "blenderbot-small": BART,
    "bloom": {},
    "camembert": {},
    "codegen": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"layer_types": SLIDING, "logit_scale": 0.5},
    "cohere2_moe": {"layer_types": SLIDING, "logit_scale": 0.5},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in SLIDING[:2]
        },
    },
    "cpmant": {"dim_head": 12, "dim_ff": 64, "position_bias_max_distance": 64},
    "ctrl": {},
    "cwm": {"bos_token_id": 2, "layer_types": SLIDING},
    "data2vec-text": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16},
    "deepseek_v4": {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16},
    "diffllama": {},
    "doge": {"keep_window_size": 2048},
    "dots1": {"layer_types": SLIDING, "num_key_value_heads": 4},
    "dots3_note_text": LATENT
    | {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 16,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "electra": {"embedding_size": 48},
    "ernie": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": {"layer_types": SLIDING},
    "exaone_moe": {"layer_types": SLIDING},
    "falcon": {"alibi": False, "multi_query": True},
    "falcon-alibi": {"model_type": "falcon", "alibi": True, "new_decoder_architecture": False},
    "falcon-groups": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon_h1": {
        "mamba_d_ssm": 96,
        "tie_word_embeddings": True,
        "embedding_multiplier": 5.6,
        "lm_head_multiplier": 0.4,
        "key_multiplier": 0.4,
        "attention_out_multiplier": 0.9,
        "ssm_out_multiplier": 0.24,
        "ssm_in_multiplier": 1.25,
    },
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {"layer_types": SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": SLIDING, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [64] * 4,
        "layer_types": SLIDING[:2] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": SLIDING[:2] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 32,
    },
    "gemma4_text-shared": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": SLIDING[:2] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"layer_types": [*SLIDING[:2], "full_attention"]},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": {"layer_types": SLIDING},
    "gptj": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granite_swa": {},
    "granitemoe": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": LINEAR,
        "shared_intermediate_size": 32,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "helium": {"head_dim": 12},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": {},
    "hy_v4": LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16},
    "hyperclovax": {},
    "inkling_text": {
        "logits_mup_width_multiplier": 2.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": WINDOW,
        "rel_extent": 16,
        "d_rel": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling2_text": {
        "unpadded_vocab_size": VOCABULARY,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": WINDOW,
        "rel_extent": 16,
        "d_rel": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "jais2": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "kimi_linear": LATENT | {"layer_types": LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": {"layer_types": SLIDING},
    "laguna": {},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama": {},
    "llama4_text": {
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "longcat_flash": LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
    "mamba": {},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 16},
    "marian": BART,
    "mbart": BART,
    "megatron-bert": {},
    "mellum": {"layer_types": SLIDING},
    "mimo_v2_flash": {"layer_types": SLIDING},
    "minicpm3": LATENT,
    "minimax": {"layer_types": LINEAR, "block_size": 16},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"index_topk": 8},
    "ministral": {"layer_types": SLIDING},
    "ministral3": {"sliding_window": None},
    "mistral": {},
    "mixtral": {"sliding_window": None},
    "mixtral-windows": {"model_type": "mixtral"},
    "modernbert-decoder": {
        "bos_token_id": 2,
        "cls_token_id": 2,
        "sep_token_id": 1,
        "local_attention": 2 * WINDOW,
        "layer_types": SLIDING,
    },
    "moshi": {},
    "mpt": {},
    "mvp": BART,
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {"layer_types": LINEAR},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 48},
    "opt-projected": {
        "model_type": "opt",
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
    },
    "pegasus": BART,
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phi3-longrope": {
        "model_type": "phi3",
        "head_dim": 12,
        "sliding_window": None,
        "original_max_position_embeddings": 32,
        "rope_parameters": LONG_ROPE,
    },
    "phimoe": {"sliding_window": None},
    "plbart": BART,
    "prophetnet": {"num_decoder_layers": 2, "num_decoder_attention_heads": 4},
    "qwen2": {},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "layer_types": SLIDING,
    },
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_count": 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": WINDOW,
        "lru_width": 48,
    },
    "reformer": {
        "attn_layers": ["local", "local"],
        "attention_head_size": 12,
        "feed_forward_size": 64,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 16,
    },
    "rembert": {"input_embedding_size": 48, "output_embedding_size": 48},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 32,
        "shape_embed_dim": 16,
        "shape_vocab_size": 32,
    },
    "roformer": {},
    "rwkv": {"attention_hidden_size": 48, "context_length": CONTEXT},
    "seed_oss": {},
    "smollm3": {"layer_types": SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 1, 0]},
    "solar_open": {},
    "stablelm": {"num_attention_heads": 4, "hidden_size": 64, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": None},
    "trocr": {"max_position_embeddings": CONTEXT},
    "vaultgemma": {"layer_types": SLIDING, "query_pre_attn_scalar": 16},
    "whisper": {"max_target_positions": CONTEXT},
    "xglm": {"attention_heads": 4, "num_layers": 2},
    "xlm": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xlnet": {},
    "xlstm": {"num_heads": 4, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 96,
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "n_mamba_heads": 6,
        "chunk_size": 16,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def config_of(name: str) -> Any:
    """The configuration of a family's tiny model."""
    own = dict(FAMILIES[name])
    kind = CONFIG_MAPPING[own.pop("model_type", name)]
    known = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    usual = {key: value for key, value in USUAL.items() if key in known}
    return kind(**(usual | own))


def model_of(name: str, *, seed: int = 0) -> Any:
    """A family's tiny model, in evaluation mode, with weights that make every part matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name)).eval()
        _enlarge(model)
        _scale_queries(model)
    return model


@torch.no_grad()
def _enlarge(model: Any) -> None:
    """Weights as large as those of trained models; first weights of 0.02 hide every mistake."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            spread, wanted = float(weight.std()), weight.shape[-1] ** -0.5
            if 0 < spread < wanted:
                weight.mul_(wanted / spread)
        elif name.endswith(".bias"):
            weight.add_(torch.randn_like(weight), alpha=0.1)
        elif "norm" in name:
            weight.mul_(1 + 0.2 * torch.rand_like(weight))


@torch.no_grad()
def _scale_queries(model: Any) -> None:
    """Divide query norms by the square root of the head size where attention does not divide.

    Gemma 3n and Gemma 4 multiply queries by keys with a factor of 1, and their trained query norms
    contain the usual factor. Without it the attention of random weights is saturated, and the
    rounding errors of two correct float32 gradients differ by more than the bound of the test.
    """
    for module in model.modules():
        if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
            module.q_norm.weight.mul_(module.head_dim**-0.5)
