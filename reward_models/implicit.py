"""The implicit reward beta * log(pi / pi_ref) of a policy that is trained on preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.common.files import read_json
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import encode_conversation, template_hash
from rlhf.reward_models.checkpoint import call_loader, load_model, max_input_tokens
from rlhf.reward_models.core import Conversation, Reward, Scores, score_each


class ImplicitReward(Reward):
    """The implicit reward of a preference-trained policy (DPO, arXiv:2305.18290, eq. 5).

    The score is beta * sum(log pi - log pi_ref) over the tokens of the last reply, including EOS.
    With ``average``, the sum is divided by the number of tokens, as RewardBench does for models
    that favor long replies. To find the tokens of the reply, the conversation is also encoded with
    an empty reply. The reply consists of the tokens after the longest common prefix.

    Args:
        policy: The policy pi.
        reference: The reference policy pi_ref.
        tokenizer: The tokenizer of both policies.
        beta: Coefficient beta; above 0.
        average: Whether to divide the sum by the number of tokens.
        max_length: Maximum number of tokens. The first tokens of longer conversations are removed.
            By default, it is the number of tokens that the policy can read.
        name: Name of the component.

    Raises:
        UserError: ``beta`` is not above 0.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float = 0.1,
        average: bool = False,
        max_length: int | None = None,
        name: str = "implicit",
    ):
        if not beta > 0:
            raise UserError(f"implicit: beta must be > 0, got {beta}")
        self.policy, self.reference, self.tokenizer = policy.eval(), reference.eval(), tokenizer
        self.beta, self.average, self.name = beta, average, name
        self.max_length = max_length or max_input_tokens(policy, tokenizer)

    @classmethod
    def load(
        cls,
        policy: str | Path,
        reference: str | Path,
        *,
        beta: float = 0.1,
        average: bool = False,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> ImplicitReward:
        """Load the policy and the reference policy from folders or Hugging Face Hub ids.

        Raises:
            FileNotFoundError: ``policy`` or ``reference`` is not a checkpoint.
            UserError: The tokenizers or the chat templates differ, weights are missing, or beta is
                not above 0.
        """
        tokenizers = [
            call_loader(AutoTokenizer.from_pretrained, path) for path in (policy, reference)
        ]
        same_vocab = tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
        if not same_vocab or template_hash(tokenizers[0]) != template_hash(tokenizers[1]):
            raise UserError(f"{policy} and {reference} have different tokenizers or chat templates")
        return cls(
            _load_model_or_adapter(policy, dtype=dtype, device=device),
            _load_model_or_adapter(reference, dtype=dtype, device=device),
            tokenizers[0],
            beta=beta,
            average=average,
            max_length=max_length,
        )

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        values, reasons, counts = score_each(
            self._truncate_and_score, conversations, name=self.name
        )
        return Scores(values, {self.name: values}, counts, reasons)

    def _truncate_and_score(self, conversation: Conversation) -> float | None:
        """Return the score of a conversation; None if it has fewer than two tokens."""
        ids, start = ids_and_reply_start(self.tokenizer, conversation)
        if self.max_length is not None and len(ids) > self.max_length:
            num_removed = len(ids) - self.max_length
            ids, start = ids[num_removed:], max(1, start - num_removed)
        if start >= len(ids):
            return None
        batch = torch.tensor([ids], device=self.policy.device)
        log_ratios = _token_logprobs(self.policy, batch) - _token_logprobs(self.reference, batch)
        of_reply = log_ratios[start - 1 :]
        return self.beta * float(of_reply.mean() if self.average else of_reply.sum())


def _load_model_or_adapter(path: str | Path, *, dtype: str, device: str | None) -> Any:
    """Load a language model, or a LoRA adapter with its base model.

    The base model of an adapter is in its subfolder ``base``, or its configuration names it. The
    adapter is loaded by PEFT, because the loader of Transformers ignores the magnitudes of DoRA.
    """
    adapter = Path(path) / "adapter_config.json"
    source: str | Path = path
    if adapter.is_file():
        named = read_json(adapter)["base_model_name_or_path"]
        source = Path(path) / "base" if (Path(path) / "base").is_dir() else named
    model = load_model(
        AutoModelForCausalLM.from_pretrained,
        source,
        dtype=dtype,
        device=device,
        missing_weights_message="is not a causal language model",
    )
    if not adapter.is_file():
        return model
    from peft import PeftModel  # only adapters need it

    return PeftModel.from_pretrained(model, str(path)).eval()


@torch.no_grad()
def _token_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return log p(ids[t] | ids[<t]) for t = 1 ... T-1, [T-1], in float64; ``ids`` are [1, T]."""
    logits = model(ids, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def ids_and_reply_start(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[list[int], int]:
    """Return the token ids of a conversation with EOS, and the index of the reply's first token.

    The reply is the content of the last message, without the header that the template writes. The
    index is at least 1, because the first token has no log-probability.
    """
    ids = encode_conversation(tokenizer, conversation, append_eos=True)
    with_empty_reply = [*conversation[:-1], {**conversation[-1], "content": ""}]
    ids_of_empty_reply = encode_conversation(tokenizer, with_empty_reply, append_eos=True)
    pairs = enumerate(zip(ids, ids_of_empty_reply, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), len(ids) - 1)
    return ids, max(1, start)
