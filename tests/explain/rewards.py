"""Small rewards whose attributions are known, and pairs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rlhf.reward_models.chat_template import template_hash
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.pairs import Pair
from rlhf.reward_models.sidecar import Sidecar
from tests.reward_models.conftest import make_tokenizer


class SumConfig(PreTrainedConfig):
    model_type = "sum_of_embeddings"
    hidden_size: int = 8
    num_labels: int = 1


class SumTrunk(nn.Module):
    """A decoder whose state at a token is the sum of the embeddings up to this token."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **_: Any):
        embeddings = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        embeddings = embeddings * attention_mask[..., None]
        return BaseModelOutput(last_hidden_state=embeddings.cumsum(1))


class SumModel(PreTrainedModel):
    """A reward model whose score is the sum of the weights of its tokens."""

    config_class = SumConfig
    base_model_prefix = "model"

    def __init__(self, config: SumConfig, vocabulary: int) -> None:
        super().__init__(config)
        self.model = SumTrunk(vocabulary, config.hidden_size)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed


def linear_reward(*, seed: int = 0, template: bool = True) -> tuple[LearnedReward, torch.Tensor]:
    """A reward that is linear in the counts of tokens, and the weight of each token, [V]."""
    tokenizer = make_tokenizer() if template else make_tokenizer(template=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SumModel(SumConfig(), len(tokenizer)).eval()
    sidecar = Sidecar(template_hash(tokenizer), append_eos=True, max_length=None, pooling="last")
    weights = (model.model.embed.weight @ model.score.weight[0]).detach()
    return LearnedReward(model, tokenizer, sidecar), weights


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    """A pair of two replies to one user message."""
    opening = [{"role": "user", "content": prompt}]
    replies = ([*opening, {"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Pair(opening, *replies)


PAIRS = [
    pair("the fox?", "yes the quick fox", "no lazy dog 1 2 3"),
    pair("maybe?", "the brown dog jumps over", "no no no"),
    pair("jumps", "over the lazy dog", "fox fox maybe 9 8 7"),
]
