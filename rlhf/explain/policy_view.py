"""Compute the log-ratio, entropy, value and advantage of each token of a reply under a policy."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.advantages import gae, mean_of_others
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.settings import Settings
from rlhf.common.conversation import Conversation
from rlhf.config.model import ModelSpec
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.models.architecture import configured_context_length, text_config
from rlhf.models.loading import find_model_folder, load_model
from rlhf.models.policy import VALUE_FILE, Policy
from rlhf.models.sharding.tensors import StoredWeights
from rlhf.reward_models.chat_template import template_hash
from rlhf.reward_models.core import Reward
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.demonstrations import encode_example
from rlhf.training.transcripts import token_texts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyExplanation:
    """The tokens of one reply under a policy.

    All lists except ``prompt`` have one element for each of T tokens.
    """

    prompt: Conversation
    """Messages before the reply."""
    tokens: list[str]
    """Text of each token of the reply, stop tokens included."""
    logprobs: list[float]
    """log pi of each token, in nats."""
    entropy: list[float]
    """Entropy of the distribution of each token, in nats."""
    log_ratio: list[float] | None = None
    """log pi - log pi_ref of each token; None without a reference policy. The sum is the KL
    estimate k1 of the reply."""
    values: list[float] | None = None
    """Value of the state before each token; None without a critic."""
    advantages: list[float] | None = None
    """Advantage of each token; None without a reward. With a critic, it is the generalized
    advantage estimate. Without a critic, it is the score minus the mean score of the other scored
    replies to the same prompt (RLOO), and None if there are no such replies."""
    score: float | None = None
    """Score of the reply; None without a reward, or if the reward cannot score the reply."""


def load_policy(spec: ModelSpec, *, seed: int = 0) -> Policy:
    """Load a policy, with its critic if the folder has one.

    Raises:
        UserError: The model is not available.
    """
    folder = find_model_folder(spec)
    model, tokenizer = load_model(spec, seed=seed)
    critic = "none"
    if folder and (Path(folder) / VALUE_FILE).exists():
        names = StoredWeights(Path(folder), VALUE_FILE).shapes
        critic = "separate" if any(name.startswith("trunk.") for name in names) else "shared"
    policy = Policy(model, tokenizer, critic=critic)
    if critic != "none":
        policy.restore_critic(Path(folder))
    return policy


def explain_policy(
    policy: Policy,
    conversations: Sequence[Conversation],
    *,
    reference: Policy | None = None,
    reward: Reward | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    temperature: float = 1.0,
) -> list[PolicyExplanation]:
    """Explain the last reply of each conversation by quantities of its tokens.

    Args:
        policy: The policy pi.
        conversations: Conversations that end with a reply. Those that the chat template cannot
            render, or that exceed the context of the policy, are omitted with a warning. Those
            whose replies have no tokens are omitted without one.
        reference: The reference policy pi_ref, with the same tokenizer and chat template.
        reward: Reward of the replies, which is paid at their last tokens.
        gamma: Discount of generalized advantage estimation (Schulman et al. 2016, eq. 16).
        lam: Parameter lambda of generalized advantage estimation.
        temperature: Sampling temperature of the log-probabilities and the entropies.

    Raises:
        UserError: The tokenizers or chat templates of the policies differ, or no conversation can
            be encoded.
    """
    if reference is not None:
        check_same_encoding(policy.tokenizer, reference.tokenizer, "the policy and its reference")
    encodable, examples = _encode_or_omit_conversations(policy, conversations)
    scores = reward.score(encodable).values if reward else [None] * len(encodable)
    results = []
    for conversation, (ids, mask), score in zip(encodable, examples, scores, strict=True):
        batch = _single_row_batch_with_advantages(
            policy, reference, ids, mask, score, gamma, lam, temperature
        )
        results.append(_policy_explanation(policy.tokenizer, conversation, batch, score))
    return _with_leave_one_out_advantages(results) if policy.value_head is None else results


def check_same_encoding(first: Any, second: Any, what: str) -> None:
    """Raise a UserError if two tokenizers have different vocabularies or chat templates."""
    same_vocabulary = first.get_vocab() == second.get_vocab()
    if not same_vocabulary or template_hash(first) != template_hash(second):
        raise UserError(
            f"{what} have different tokenizers or chat templates, so their tokens cannot be "
            "compared"
        )


def chat_format_of(policy: Policy) -> ChatFormat:
    """Return the chat format of a policy."""
    return ChatFormat(policy.tokenizer, stop_ids=generation_stop_ids(policy.model))


def encode_and_mask_last_reply(
    chat_format: ChatFormat, conversation: Conversation, *, context: int
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation and the mask of its last reply, both [T].

    Args:
        chat_format: Chat format of the policy.
        conversation: The conversation.
        context: Maximum number of tokens.

    Raises:
        RowDropped: The chat template cannot render the conversation, or the conversation has more
            than ``context`` tokens.
    """
    ids, mask = encode_example(chat_format, conversation[:-1], conversation[-1:])
    if len(ids) > context:
        raise RowDropped(f"longer than the {context} tokens of the model's context")
    return list(ids), [False, *map(bool, mask[1:])]  # the first token has no log-probability


def _encode_or_omit_conversations(
    policy: Policy, conversations: Sequence[Conversation]
) -> tuple[list[Conversation], list[tuple[list[int], list[bool]]]]:
    """Encode the conversations whose last reply can be encoded and has tokens.

    Returns:
        - These conversations, [N].
        - The token ids and the mask of the last reply of each of them, [N].

    Raises:
        UserError: There is no such conversation.
    """
    encodable, examples, reasons = [], [], []
    chat_format, context = (
        chat_format_of(policy),
        configured_context_length(text_config(policy.model)),
    )
    for conversation in conversations:
        try:
            ids, mask = encode_and_mask_last_reply(chat_format, conversation, context=context)
        except RowDropped as reason:
            reasons.append(str(reason))
            continue
        if any(mask):
            encodable.append(conversation)
            examples.append((ids, mask))
    if not encodable:
        detail = f": {reasons[0]}" if reasons else ""
        raise UserError(f"explain: no reply can be encoded for the policy{detail}")
    for reason, count in Counter(reasons).items():
        log.warning("replies omitted from the policy view: %d (%s)", count, reason)
    return encodable, examples


@torch.no_grad()
def _single_row_batch_with_advantages(
    policy: Policy,
    reference: Policy | None,
    ids: Sequence[int],
    mask: Sequence[bool],
    score: float | None,
    gamma: float,
    lam: float,
    temperature: float,
) -> TrainingBatch:
    """Return a batch of one row with log-probabilities and entropies.

    With a reference, the batch has its log-probabilities; with a critic, the values; with a critic
    and a score, also the rewards and advantages.
    """
    tokens = torch.tensor([list(ids)], device=policy.device)
    actions = torch.tensor([list(mask)], device=policy.device)
    attention = torch.ones_like(actions)
    scored = policy.score(tokens, attention, actions, temperature=temperature)
    batch = TrainingBatch(
        tokens,
        attention,
        actions,
        old_logprobs=scored.logprobs,
        entropy=scored.entropy,
        values=scored.values,
    )
    if reference is not None:
        ref = reference.score(
            tokens, attention, actions, temperature=temperature, with_entropy=False
        )
        batch = replace(batch, ref_logprobs=ref.logprobs)
    if score is None or scored.values is None:
        return batch
    rewards = torch.zeros_like(scored.values)
    rewards[0, int(actions[0].nonzero()[-1])] = score
    batch = replace(batch, rewards=rewards, bootstrap=torch.zeros_like(rewards[:, 0]))
    return replace(batch, advantages=gae(batch, Settings(gamma=gamma, lam=lam)).advantages)


def _policy_explanation(
    tokenizer: Any, conversation: Conversation, batch: TrainingBatch, score: float | None
) -> PolicyExplanation:
    index = batch.action_mask[0].nonzero()[:, 0]
    ids = batch.tokens[0, index].tolist()

    def column(tensor: Tensor | None) -> list[float] | None:
        return None if tensor is None else tensor[0, index].tolist()

    logprobs = batch.require("old_logprobs")
    log_ratio = None if batch.ref_logprobs is None else logprobs - batch.ref_logprobs
    return PolicyExplanation(
        prompt=conversation[:-1],
        tokens=token_texts(
            ids, lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False)
        ),
        logprobs=column(logprobs) or [],
        entropy=column(batch.require("entropy")) or [],
        log_ratio=column(log_ratio),
        values=column(batch.values),
        advantages=column(batch.advantages),
        score=score,
    )


def _with_leave_one_out_advantages(results: list[PolicyExplanation]) -> list[PolicyExplanation]:
    """Add leave-one-out advantages (RLOO) to the replies of prompts with several scored replies."""
    prompts = [repr(result.prompt) for result in results]
    scores = torch.tensor(
        [torch.nan if result.score is None else result.score for result in results]
    )
    groups = torch.tensor([prompts.index(prompt) for prompt in prompts])
    advantages = (scores - mean_of_others(scores, groups)).tolist()
    return [
        result if math.isnan(value) else replace(result, advantages=[value] * len(result.tokens))
        for result, value in zip(results, advantages, strict=True)
    ]
