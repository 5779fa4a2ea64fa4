"""Tiny random reward models with their own tokenizers, created in milliseconds."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.reward_models.chat_template import template_hash
from rlhf.reward_models.sidecar import Sidecar

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "yes no maybe 1 2 3 4 5 6 7 8 9 0"]


def make_tokenizer(*, template: str | None = TEMPLATE, pad: str = "<pad>"):
    """A byte-level BPE of 300 tokens with <eos> and ``pad``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def llama_config(tokenizer, **changes) -> LlamaConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaConfig(**settings | changes)


def save_decoder(folder: Path, *, seed: int = 0, sidecar: bool = True, tokenizer=None, **config):
    """Write a random Llama reward model into ``folder``; its scores are of order one."""
    tokenizer = tokenizer or make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(llama_config(tokenizer, **config))
        torch.nn.init.normal_(model.score.weight, std=1.0)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if sidecar:
        Sidecar(template_hash(tokenizer), append_eos=True, max_length=64, pooling="last").write(
            folder
        )
    return folder


def save_encoder(folder: Path, *, seed: int = 0, **config):
    """Write a random BERT classifier (with [CLS] and [SEP]) into ``folder``."""
    from tokenizers import processors

    core = make_tokenizer(template=None).backend_tokenizer
    core.add_special_tokens(["[CLS]", "[SEP]"])
    cls, sep = core.token_to_id("[CLS]"), core.token_to_id("[SEP]")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]"
    )
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "num_labels": 1,
        "initializer_range": 0.4,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(**settings | config))
        torch.nn.init.normal_(model.classifier.weight, std=1.0)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_causal(folder: Path, *, seed: int = 0, tokenizer=None):
    """Write a random Llama language model into ``folder``."""
    tokenizer = tokenizer or make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(llama_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation of ``texts`` with alternating user and assistant turns."""
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def decoder_path(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def helpers():
    """The builders above, for tests that need a variant."""
    return {
        "tokenizer": make_tokenizer,
        "decoder": save_decoder,
        "encoder": save_encoder,
        "causal": save_causal,
        "talk": talk,
    }
