"""Learned rewards: sequence-classification checkpoints, scored the same whatever the batch.

Transformers' pooling takes the rightmost token that differs from ``config.pad_token_id`` and
ignores the attention mask: with pad == EOS it cannot see whether a reply ended, and with
``inputs_embeds`` it reads padding. Here the mask alone decides. Every row is moved to the left edge
first, so absolute positions, BERT's [CLS] and causal masks all see the unpadded text.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.reward_models import checkpoint, encoding
from rlhf.reward_models.core import Conversation, Reward, Scores, Unscorable, last_reply
from rlhf.reward_models.encoding import encode_conversation
from rlhf.reward_models.sidecar import Sidecar

__all__ = ["LearnedReward", "PrefixScores", "encode_conversation", "pack_left"]

_CHECK_TEXTS = ("Yes.", "The quick brown fox jumps over the lazy dog and goes home to sleep.")


# From ids [B, T], padded on the right, and their mask: last hidden states [N, D], and where the
# state of each token lies among them [B, T].
States = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PrefixScores:
    """The reward head read at every token of one conversation.

    Values before the last are off the training distribution: the head was trained at the end only.
    """

    tokens: list[str]
    """[T] text of each token."""
    values: list[float]
    """[T] score of the prefix that ends with this token; the last is the reward."""


class LearnedReward(Reward):
    """The score of one checkpoint; :meth:`load` reads and checks it.

    A one-output head gives its logit; a classifier the log-odds of ``label``; a head of several
    regression outputs the sum weighted by ``attributes`` (or ``"all"``, each weighing 1), with each
    output as a component.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sidecar: Sidecar,
        *,
        batch_size: int = 16,
        label: str | None = None,
        attributes: Mapping[str, float] | Literal["all"] | None = None,
        scope: str | None = None,
        name: str = "learned",
    ):
        scope = scope or sidecar.scope
        if scope not in ("conversation", "reply"):
            raise ValueError(f"scope must be 'conversation' or 'reply', got {scope!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.model, self.tokenizer, self.sidecar = model, tokenizer, sidecar
        self.batch_size, self.scope, self.name = batch_size, scope, name
        self.temperature = sidecar.temperature
        if sidecar.mean is not None and sidecar.std is not None:
            self.moments = (sidecar.mean, sidecar.std)
        self._states: States | None = None
        self._alone = False
        self._pad_id = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        if attributes == "all":
            attributes = dict.fromkeys(model.config.label2id or {}, 1.0)
        self._value = _read_value(model, label, attributes)
        self.parts = {name: _label_index(model, name) for name in attributes or {}}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
        max_length: int | None = None,
        append_eos: bool | None = None,
        label: str | None = None,
        attributes: Mapping[str, float] | Literal["all"] | None = None,
        scope: str | None = None,
    ) -> LearnedReward:
        """The reward of the checkpoint at ``path`` (a folder or a hub id), checked before use.

        ``max_length`` and ``append_eos`` come from the sidecar if there is one; without one they
        follow what TRL does at training. ``scope="reply"`` shows the model the last assistant
        message alone, for classifiers of plain text; the sidecar knows how it was trained. The
        score is raw; ``reward.normalise()`` applies the sidecar's reference mean and deviation.

        Raises:
            ValueError: no trained head, a setting that contradicts the sidecar, another chat
                template than in training, scores that depend on padding, an unknown label.
        """
        precision: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = checkpoint.load_checkpoint(path, dtype=precision)
        sidecar = checkpoint.reconcile(
            path, model, tokenizer, max_length=max_length, append_eos=append_eos
        )
        model.to(device)  # type: ignore[arg-type]
        reward = cls(
            model,
            tokenizer,
            sidecar,
            batch_size=batch_size,
            label=label,
            attributes=attributes,
            scope=scope,
        )
        tolerance = 1e-4 if precision == torch.float32 else 0.1
        try:
            reward.self_check(tolerance=tolerance)
        except ValueError:  # texts change each other's scores: LongRoPE, beyond its first context
            reward.read_alone()
            reward.self_check(tolerance=tolerance)
        return reward

    def read_alone(self) -> None:
        """Read one text a pass from now on, without padding."""
        self._alone = True

    def read_packed(self, states: States) -> None:
        """Run the decoder by ``states``, which must agree with it, instead of on padded batches."""
        self._states = states

    def checkpoints(self) -> tuple[LearnedReward, ...]:
        return (self,)

    def encode(self, conversation: Conversation) -> list[int]:
        """The token ids that the model sees; :class:`Unscorable` if there are none."""
        return self._encode(conversation)[0]

    def _encode(self, conversation: Conversation) -> tuple[list[int], bool]:
        if self.scope == "reply":
            conversation = [{"role": "assistant", "content": last_reply(conversation)}]
        policy = self.sidecar
        full = encoding.full_ids(self.tokenizer, conversation, append_eos=policy.append_eos)
        if not full:
            raise Unscorable("no tokens")
        ids = encoding.truncate_left(full, policy.max_length, tokenizer=self.tokenizer)
        return ids, len(ids) < len(full)

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        encoded: dict[int, list[int]] = {}
        counts: Counter[str] = Counter()
        reasons: list[str | None] = [None] * len(conversations)
        for i, conversation in enumerate(conversations):
            try:
                encoded[i], truncated = self._encode(conversation)
                counts[f"{self.name}: truncated"] += truncated
            except Unscorable as reason:
                missing = f"{self.name}: {reason}"
                reasons[i], counts[missing] = missing, counts[missing] + 1
        logits = self.score_ids(list(encoded.values()))
        columns = {self.name: self._value(logits)}
        columns |= {f"{self.name}.{part}": logits[:, k] for part, k in self.parts.items()}
        components = {}
        for name, column in columns.items():
            found = dict(zip(encoded, column.tolist(), strict=True))
            components[name] = [found.get(i) for i in range(len(conversations))]
        return Scores(components[self.name], components, +counts, reasons)

    @torch.no_grad()
    def score_ids(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """Logits [N, K], fp32, for N token lists; in the order given."""
        logits = torch.zeros(len(encoded), self.model.config.num_labels or 1)
        # Side by side: packed, texts that begin alike; padded, texts of one length.
        key = list if self._states else len
        order = sorted(range(len(encoded)), key=lambda i: key(encoded[i]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            mask, ids = self.pad([encoded[i] for i in rows])
            logits[rows] = self.logits(mask, input_ids=ids).cpu()
        return logits

    def pad(
        self, encoded: Sequence[Sequence[int]], *, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """Mask [B, T] (bool) and ids [B, T] on the model's device, padded on ``side``."""
        width = max(len(ids) for ids in encoded)
        ids = torch.full((len(encoded), width), self._pad_id, device=self.model.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(encoded):
            where = slice(len(tokens)) if side == "right" else slice(width - len(tokens), width)
            ids[row, where] = torch.tensor(tokens, device=ids.device)
            mask[row, where] = True
        return mask, ids

    def logits(
        self, mask: Tensor, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Logits [B, K] in fp32, with gradient, for ids or embeddings padded on any side."""
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        [(key, tensor)] = [(k, v) for k, v in given.items() if v is not None]
        if self._alone and len(mask) > 1:
            rows = [
                self.logits(mask[i : i + 1], **{key: tensor[i : i + 1]}) for i in range(len(mask))
            ]
            return torch.cat(rows)
        fill = self._pad_id if key == "input_ids" else 0
        mask, packed = pack_left(mask, tensor, fill=fill)
        if self._states and key == "input_ids":
            states, index = self._states(packed, mask)
            last = index.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
            return self._head(states[last])
        inputs = {key: packed, "attention_mask": mask.long()}
        if self.sidecar.pooling == "model":
            return self.model(**inputs).logits.float()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        last = mask.sum(1) - 1
        return self._head(hidden[torch.arange(len(last), device=last.device), last])

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_submodule("score")(hidden)

    @torch.no_grad()
    def prefix_scores(self, conversation: Conversation) -> PrefixScores:
        """The score of every prefix of ``conversation``, in one forward pass.

        Raises:
            ValueError: the model is an encoder, which sees the whole text at once.
        """
        if self.sidecar.pooling != "last":
            raise ValueError("prefix scores need a decoder; this checkpoint is an encoder")
        ids = self.encode(conversation)
        mask, batch = self.pad([ids])
        hidden = self.model.base_model(batch, attention_mask=mask.long(), use_cache=False)
        values = self._value(self._head(hidden.last_hidden_state[0]))
        return PrefixScores([str(self.tokenizer.decode([i])) for i in ids], values.tolist())

    @torch.no_grad()
    def self_check(self, *, tolerance: float) -> float:
        """Largest difference between a text scored alone, padded left, padded right and batched.

        Raises:
            ValueError: it exceeds ``tolerance`` relative to the score's size.
        """
        # Many chat templates refuse a conversation that the user does not begin.
        first = [{"role": "user", "content": "?"}] if self.tokenizer.chat_template else []
        texts = [[*first, {"role": "assistant", "content": text}] for text in _CHECK_TEXTS]
        short, long = (self.encode(text) for text in texts)
        mask, ids = self.pad([short])
        alone = self.logits(mask, input_ids=ids)
        worst = 0.0
        for side in ("left", "right"):
            mask, ids = self.pad([short, long], side=side)
            batched = self.logits(mask, input_ids=ids)[:1]
            padded = self.logits(mask[:1], input_ids=ids[:1])
            for other in (batched, padded):
                worst = max(worst, float((other - alone).abs().max()))
        if not worst <= tolerance * (1 + float(alone.abs().max())):
            raise ValueError(f"scores change by {worst:.2g} with padding; this model is not usable")
        return worst


def pack_left(mask: Tensor, tensor: Tensor, *, fill: int) -> tuple[Tensor, Tensor]:
    """Move the positions where ``mask`` [B, T] is set to the left edge, in order.

    ``tensor`` is [B, T] or [B, T, H]. Returns mask and tensor trimmed to the longest row, with
    ``fill`` behind the shorter ones: attention weights of zero do not stop a NaN.
    """
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
    order = order[:, : int(mask.sum(1).max())]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    packed, moved = mask[rows, order], tensor[rows, order]
    keep = packed if tensor.ndim == 2 else packed[..., None]
    return packed, torch.where(keep, moved, fill)


def _read_value(
    model: PreTrainedModel, label: str | None, attributes: Mapping[str, float] | None
) -> Callable[[Tensor], Tensor]:
    """The function from logits [N, K] to the reward [N]."""
    num_labels = model.config.num_labels or 1
    if label is not None and attributes is not None:
        raise ValueError("give label (a classifier) or attributes (regression heads), not both")
    if attributes is not None:
        weights = torch.zeros(num_labels)
        for name, weight in attributes.items():
            weights[_label_index(model, name)] = weight
        return lambda logits: logits @ weights.to(logits.device)
    if label is None:
        if num_labels > 1:
            names = ", ".join(model.config.label2id or {})
            raise ValueError(f"this model has {num_labels} outputs; choose one by label: {names}")
        return lambda logits: logits[:, 0]
    k = _label_index(model, label)
    if num_labels == 1 or model.config.problem_type == "multi_label_classification":
        return lambda logits: logits[:, k]
    others = [i for i in range(num_labels) if i != k]
    return lambda logits: logits[:, k] - logits[:, others].logsumexp(1)


def _label_index(model: PreTrainedModel, label: str) -> int:
    labels = model.config.label2id or {}
    if label not in labels:
        near = difflib.get_close_matches(label, labels, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(labels)}"
        raise ValueError(f"this model has no label {label!r}; {hint}")
    return int(labels[label])
