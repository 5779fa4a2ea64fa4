"""Small models, conversations and rollouts for tests, which are created in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rlhf.config.model import ScratchSpec
from rlhf.models.policy import Policy
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.rollout.batch import Rollout

TEXTS = (
    "Which colour is the sky? It is blue.",
    "Which colour is the grass? It is green.",
    "Say a number from 1 to 9. I say 7.",
    "The number is too high. Then I say 3.",
)

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "It is blue."},
    ],
    [
        {"role": "system", "content": "Guess the number."},
        {"role": "user", "content": "Say a number."},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Too high."},
        {"role": "assistant", "content": "Then 3"},
        {"role": "user", "content": "Too low, try again."},
        {"role": "assistant", "content": ""},
    ],
)


@cache
def _trained_tokenizer(vocab_size: int) -> Any:
    return make_tokenizer(TEXTS, vocab_size)


def tiny_tokenizer(vocab_size: int = 320) -> Any:
    """A fresh byte-level tokenizer with the scratch chat template; about 300 tokens."""
    return copy.deepcopy(_trained_tokenizer(vocab_size))


def tiny_model(
    *, seed: int = 0, double: bool = False, context: int = 256, sharp: float = 15.0
) -> tuple[Any, Any]:
    """A Llama of two layers and 16 channels, and its tokenizer.

    Args:
        seed: Seed of the weights.
        double: Use float64 (see ``in_double``).
        context: Longest sequence.
        sharp: Factor of all matrices; 1 keeps the near-uniform initial distribution.
    """
    tokenizer = tiny_tokenizer()
    spec = ScratchSpec(hidden_size=16, num_layers=2, num_heads=2, context=context)
    model = _with_scaled_logits(make_random_llama_model(spec, tokenizer, seed=seed), sharp).eval()
    return (as_float64(model) if double else model), tokenizer


def gpt2_config(tokenizer: Any, *, positions: int, **settings: float) -> GPT2Config:
    """The configuration of a GPT-2 with two layers; `settings` are further fields."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def tiny_gpt2(*, seed: int = 0, double: bool = False) -> tuple[Any, Any]:
    """A GPT-2 with 128 positions, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = gpt2_config(tokenizer, positions=128)
    return _make_other_model(GPT2LMHeadModel, config, seed, double), tokenizer


def tiny_qwen2(*, seed: int = 0, double: bool = False) -> tuple[Any, Any]:
    """A Qwen2 with grouped query heads and an untied output head, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _make_other_model(Qwen2ForCausalLM, config, seed, double), tokenizer


def _make_other_model(kind: Any, config: Any, seed: int, double: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _with_scaled_logits(kind(config), 15.0).eval()
    return as_float64(model) if double else model


@torch.no_grad()
def _with_scaled_logits(model: Any, factor: float) -> Any:
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(factor)
    return model


def as_float64(model: Any) -> Any:
    """The model in float64, with torch's RMSNorm, because transformers' computes in float32."""
    model = model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm.double())
    return model


def tiny_policy(
    *, critic: str = "none", seed: int = 0, double: bool = True, context: int = 256
) -> Any:
    """A policy with ``tiny_model``."""
    model, tokenizer = tiny_model(seed=seed, double=double, context=context)
    return Policy(model, tokenizer, critic=critic)


def tiny_rollouts(lengths: Sequence[int] = (9, 5, 12), *, seed: int = 0) -> list[Rollout]:
    """Rollouts of random tokens: a prompt of two tokens, then actions and environment tokens."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for index, length in enumerate(lengths):
        rollout = Rollout(seed=index, group_index=index // 2, sample_index=index % 2)
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        rollout.append(ids[:2], turn=0, logprobs=None)
        for place, token in enumerate(ids[2:]):
            own = place % 4 != 2
            rollout.append([token], turn=place // 4, logprobs=[-1.0] if own else None)
        rollouts.append(rollout)
    return rollouts


@torch.no_grad()
def recomputed_logprobs(model: Any, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token given the tokens before it, from one pass without a cache, [T].

    Position 0 is nan.
    """
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1] / temperature
    selected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    return torch.cat([torch.full((1,), torch.nan, dtype=selected.dtype), selected])


def scratch_model(*, seed: int = 0, lora: bool = False) -> Any:
    """A Llama with heads of 32 channels, which vLLM supports; with LoRA, rank 4."""
    spec = ScratchSpec(hidden_size=64, num_layers=2, num_heads=2, context=64)
    model = make_random_llama_model(spec, tiny_tokenizer(), seed=seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    if not lora:
        return model
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, settings).eval()
