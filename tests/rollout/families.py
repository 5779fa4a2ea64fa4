"""Tiny models of families whose layers slide, chunk or carry states, or whose positions stretch.

Windows and chunks have 8 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"] * 2
STATES = ["linear_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

# Layers with a window or chunks.
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED},
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "gemma2": ("gemma2", {"sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"sliding_window": 8, "layer_types": MIXED, "num_local_experts": 4},
    ),
    "cohere2": ("cohere2", {"sliding_window": 8, "layer_types": MIXED}),
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": MIXED}),
    "llama4": (
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_layers": 4,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
}

# Layers with a recurrent state.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "qwen3_next",
        {
            **DELTA,
            **EXPERTS,
            "layer_types": STATES,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_5": ("qwen3_5_text", {**DELTA, "layer_types": STATES}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "granite4": (
        "granitemoehybrid",
        {
            **MAMBA2,
            "layer_types": STATES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "position_embedding_type": "rope",
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}

# Other rotary frequencies in rows of more than 16 tokens.
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 4.0, 6.0, 8.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
}


def tiny_family(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of a family with sharp random weights, in float32 and evaluation mode."""
    kind, own = (SLIDING | RECURRENT | LENGTHS)[name]
    config = CONFIG_MAPPING[kind](**{**SIZES, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model
