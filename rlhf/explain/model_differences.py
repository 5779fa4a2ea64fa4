"""Compare two stages of training: log-probabilities of tokens, layers and norms of weights."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.common.conversation import Conversation, messages_for_models
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.explain.policy_view import chat_format_of, check_same_encoding, encode_and_mask_last_reply
from rlhf.models.architecture import (
    blocks_of,
    configured_context_length,
    text_config,
    trunk_of,
)
from rlhf.models.policy import Policy
from rlhf.rollout.chat_format import ChatFormat
from rlhf.stats import Interval, interval, ratio_interval
from rlhf.training.transcripts import token_texts

_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class TokenChange:
    """A token of a reply, with its log-probabilities in both stages."""

    context: str
    """Text of the reply before the token, shortened at the start."""
    token: str
    """Text of the token."""
    before: float
    """Log-probability in the earlier stage, in nats."""
    after: float
    """Log-probability in the later stage, in nats."""


@dataclass(frozen=True)
class LayerChange:
    """The change of one block of the decoder."""

    layer: int
    """Index of the block, starting at 0."""
    weights: float
    """||W' - W|| / ||W|| over all weights of the block (Frobenius norm)."""
    states: float
    """Mean of ||h' - h|| / ||h|| over the tokens of each reply, then over the replies. h and h' are
    the outputs of the block in the earlier and the later stage."""
    cosine: float
    """Mean of the cosine of h and h' over the tokens of each reply, then over the replies."""


@dataclass(frozen=True)
class NormChange:
    """The norm of a group of weights in both stages."""

    group: str
    """Name of the weights without block numbers, such as ``layers.mlp.up_proj``."""
    before: float
    """Frobenius norm in the earlier stage."""
    after: float
    """Frobenius norm in the later stage."""
    change: float
    """||W' - W|| / ||W||."""


@dataclass(frozen=True)
class StageDifference:
    """The differences between an earlier and a later stage of training."""

    before: str
    after: str
    replies: int
    """Number of replies on which tokens and states were compared. Intervals are over prompts."""
    logprob_change: Interval
    """Mean change of the log-probability per reply token, in nats."""
    kl: Interval
    """Mean KL(later || earlier) of the distributions of reply tokens, in nats. It is first averaged
    over the tokens of each reply, then over the replies to each prompt, then over the prompts."""
    same_top_token: Interval
    """Fraction of reply tokens for which both stages have the same most likely token, averaged
    like ``kl``."""
    gained: list[TokenChange]
    """Tokens whose log-probability increased most."""
    lost: list[TokenChange]
    """Tokens whose log-probability decreased most."""
    layers: list[LayerChange]
    norms: list[NormChange]


def compare_stages(
    before: Policy,
    after: Policy,
    conversations: Sequence[Conversation],
    *,
    names: tuple[str, str],
    num_tokens: int = 12,
) -> StageDifference:
    """Compare two stages of one model on the last replies of conversations.

    Args:
        before: The earlier stage.
        after: The later stage, with the same tokenizer and architecture.
        conversations: Conversations that end with a reply. Those that the chat template cannot
            render, that exceed the context of the models, or whose replies have no tokens, are
            omitted.
        names: Names of the two stages.
        num_tokens: Number of tokens in each of the two lists of tokens.

    Raises:
        UserError: The tokenizers, the chat templates or the architectures differ, or no
            conversation can be encoded.
    """
    check_same_encoding(before.tokenizer, after.tokenizer, f"{names[0]} and {names[1]}")
    weights = _weight_changes(before, after, names)
    replies, prompts = [], []
    chat_format = chat_format_of(before)
    for conversation in conversations:
        if reply := _compare_reply(before, after, chat_format, conversation):
            replies.append(reply)
            prompts.append(
                json.dumps(messages_for_models(conversation[:-1]), sort_keys=True, default=str)
            )
    if not replies:
        raise UserError("explain: no reply can be encoded for the stages")
    changes = sorted(
        (change for reply in replies for change in reply.tokens),
        key=lambda change: change.after - change.before,
    )
    states = torch.stack([reply.states for reply in replies]).mean(0).tolist()
    cosines = torch.stack([reply.cosines for reply in replies]).mean(0).tolist()
    kl = [reply.kl for reply in replies]
    return StageDifference(
        *names,
        replies=len(replies),
        logprob_change=_mean_logprob_change(prompts, replies),
        kl=interval(kl, prompts, bounds=(0.0, float("inf"))),
        same_top_token=interval([reply.same_top for reply in replies], prompts, kind="share"),
        gained=[c for c in reversed(changes[-num_tokens:]) if c.after > c.before],
        lost=[c for c in changes[:num_tokens] if c.after < c.before],
        layers=[
            LayerChange(i, weight, state, cosine)
            for i, (weight, state, cosine) in enumerate(
                zip(weights.blocks, states, cosines, strict=True)
            )
        ],
        norms=weights.groups,
    )


@dataclass(frozen=True)
class _ReplyComparison:
    """The comparison of two stages on one reply."""

    tokens: list[TokenChange]
    kl: float
    same_top: float
    states: Tensor
    """Relative change of the output of each block, [L]."""
    cosines: Tensor
    """Cosine of the outputs of each block, [L]."""


def _mean_logprob_change(prompts: list[str], replies: list[_ReplyComparison]) -> Interval:
    """Return the mean change of the log-probability per reply token, with interval over prompts."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for prompt, reply in zip(prompts, replies, strict=True):
        totals[prompt][0] += sum(change.after - change.before for change in reply.tokens)
        totals[prompt][1] += len(reply.tokens)
    return ratio_interval(*zip(*totals.values(), strict=True))


@torch.no_grad()
def _compare_reply(
    before: Policy, after: Policy, chat_format: ChatFormat, conversation: Conversation
) -> _ReplyComparison | None:
    """Compare two stages on a reply; return None if the reply cannot be encoded."""
    try:
        context = configured_context_length(text_config(before.model))
        ids, mask = encode_and_mask_last_reply(chat_format, conversation, context=context)
    except RowDropped:
        return None
    positions = torch.tensor(mask).nonzero()[:, 0]
    if not len(positions):
        return None
    old_logits, old_states = _logits_and_block_outputs(before, ids)
    new_logits, new_states = _logits_and_block_outputs(after, ids)
    old, new = (x[positions - 1].double().log_softmax(-1) for x in (old_logits, new_logits))
    targets = torch.tensor(ids)[positions, None]
    old_selected, new_selected = (x.gather(1, targets)[:, 0].tolist() for x in (old, new))
    kl = (new.exp() * (new - old)).sum(-1).mean()
    states = [
        (h[positions].float(), g[positions].float())
        for h, g in zip(old_states, new_states, strict=True)
    ]
    reply_ids = [ids[i] for i in positions.tolist()]
    return _ReplyComparison(
        _token_changes(before.tokenizer, reply_ids, old_selected, new_selected),
        max(0.0, float(kl)),
        float((old.argmax(-1) == new.argmax(-1)).double().mean()),
        torch.stack([((g - h).norm(dim=-1) / h.norm(dim=-1)).mean() for h, g in states]),
        torch.stack([nn.functional.cosine_similarity(h, g, dim=-1).mean() for h, g in states]),
    )


def _token_changes(
    tokenizer: Any, ids: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> list[TokenChange]:
    texts = token_texts(
        ids, lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False)
    )
    changes, context = [], ""
    for text, old, new in zip(texts, before, after, strict=True):
        changes.append(TokenChange(context[-40:], text, old, new))
        context += text
    return changes


def _logits_and_block_outputs(policy: Policy, ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits [T, V] of a text, and the output [T, D] of each block."""
    block_outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        block_outputs.append((output[0] if isinstance(output, tuple) else output)[0].cpu())

    hooks = [block.register_forward_hook(keep) for block in blocks_of(trunk_of(policy.model))]
    try:
        tokens = torch.tensor([list(ids)], device=policy.device)
        mask = torch.ones_like(tokens)
        output = policy.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        logits = output.logits[0].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, block_outputs


@dataclass(frozen=True)
class _WeightChanges:
    """The changes of the weights from an earlier to a later stage."""

    blocks: list[float]
    """Relative change of each block."""
    groups: list[NormChange]
    """Changes of all groups of weights."""


def _weight_changes(before: Policy, after: Policy, names: tuple[str, str]) -> _WeightChanges:
    """Compare the weights of two stages.

    Raises:
        UserError: The names or shapes of the weights differ.
    """
    old, new = (dict(policy.model.named_parameters()) for policy in (before, after))
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise UserError(
            f"{names[0]} and {names[1]} have different weights, so they are not stages of one "
            "model: give stages with the same architecture, with adapters merged"
        )
    # Group or block -> sums of the squares of W, W' and W' - W.
    groups: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    blocks: dict[int, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for name, weight in old.items():
        w, v = weight.detach().double(), new[name].detach().double()
        squares = torch.stack([(x * x).sum().cpu() for x in (w, v, v - w)])
        number = _BLOCK_NUMBER.search(name)
        groups[_BLOCK_NUMBER.sub(".", name).removesuffix(".weight")] += squares
        if number:
            blocks[int(number[1])] += squares
    return _WeightChanges(
        [_relative_norm_change(blocks[i]) for i in sorted(blocks)],
        [
            NormChange(name, float(s[0].sqrt()), float(s[1].sqrt()), _relative_norm_change(s))
            for name, s in groups.items()
        ],
    )


def _relative_norm_change(squared_norms: Tensor) -> float:
    """Return ||W' - W|| / ||W|| from the squares of the norms of W, W' and W' - W."""
    return float((squared_norms[2] / squared_norms[0].clamp_min(1e-30)).sqrt())
