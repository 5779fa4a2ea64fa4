"""Rewards from sequence-classification checkpoints; the scores do not depend on the batch.

The pooling of Transformers reads the rightmost token that differs from ``config.pad_token_id`` and
ignores the attention mask. If the pad token is EOS, this pooling cannot detect the end of a reply,
and with ``inputs_embeds`` it reads padding. This module selects the last token by the attention
mask. It first moves the tokens of every text to the left edge, so that absolute positions, BERT's
[CLS] and causal masks are those of the unpadded text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.common.names import did_you_mean
from rlhf.errors import UserError
from rlhf.reward_models import chat_template, checkpoint
from rlhf.reward_models.core import (
    Conversation,
    Reward,
    Scores,
    Unscorable,
    last_reply,
    scatter_scores,
    score_each,
)
from rlhf.reward_models.sidecar import Sidecar

_CHECK_TEXTS = ("Yes.", "The quick brown fox jumps over the lazy dog and goes home to sleep.")

# Function from token ids [B, T], padded on the right, and their mask [B, T]. It returns the last
# hidden states of N packed tokens, [N, D], and the index of the hidden state of each token, [B, T].
HiddenStatesFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class PrefixScores:
    """The score of every prefix of one conversation.

    The head was trained at the last token only, so the values at earlier tokens are out of
    distribution.
    """

    tokens: list[str]
    """Text of each token, [T]."""
    values: list[float]
    """Score of the prefix that ends with each token, [T]; the last value is the reward."""


class LearnedReward(Reward):
    """Reward that is the score of a checkpoint; :meth:`load` loads and checks the checkpoint.

    If the head has one output, the score is its logit. With ``label``, the score is the log-odds of
    this class of a classifier, or this output of a regression head. With ``attributes``, it is the
    weighted sum of several regression outputs, and each of these outputs is also a component;
    ``"all"`` gives every output the weight 1.

    Raises:
        UserError: ``batch_size`` is below 1, or ``label`` or ``attributes`` do not fit the head.
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
        sidecar = dataclasses.replace(sidecar, scope=scope or sidecar.scope)
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}")
        self.model, self.tokenizer, self.sidecar = model, tokenizer, sidecar
        self.batch_size, self.name = batch_size, name
        self.temperature = sidecar.temperature
        if sidecar.mean is not None and sidecar.std is not None:
            self.moments = (sidecar.mean, sidecar.std)
        self._compute_packed_states: HiddenStatesFunction | None = None
        self._one_text_per_pass = False  # whether each forward pass has one text without padding
        self._pad_id = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        if attributes == "all":
            attributes = dict.fromkeys(model.config.label2id or {}, 1.0)
        self.scores_from_logits = _logits_to_scores_function(model, label, attributes)
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
        """Load and check a reward checkpoint.

        The score is not normalized; ``reward.normalize()`` applies the mean and the standard
        deviation of the reference policy's scores, which the sidecar contains.

        Args:
            path: Folder or Hugging Face Hub id.
            device: Device of the model; by default the GPU if there is one.
            dtype: Data type of the weights outside the head.
            batch_size: Number of texts in one forward pass.
            max_length: Maximum number of tokens; by default the value in the sidecar. Without a
                sidecar, the default is the smaller of the tokenizer's limit and the model's number
                of positions.
            append_eos: Whether texts end with EOS; by default the value in the sidecar. Without a
                sidecar, TRL's rule is assumed.
            label: Class of a classifier whose log-odds are the score, or output of a regression
                head.
            attributes: Output of a regression head -> weight; "all" gives every output weight 1.
            scope: "reply" to score the last message without its prompt, "conversation" to score the
                whole conversation; by default the value in the sidecar.

        Raises:
            FileNotFoundError: There is no valid checkpoint.
            UserError: The checkpoint has no trained head or is an unmerged LoRA adapter, a setting
                or the chat template differs from training, ``append_eos`` must be given,
                ``max_length`` exceeds the model's positions, scores depend on padding, or a label
                is missing or unknown.
        """
        model, tokenizer = checkpoint.load_checkpoint(path, dtype=dtype, device=device)
        sidecar = checkpoint.checked_or_inferred_sidecar(
            path, model, tokenizer, max_length=max_length, append_eos=append_eos
        )
        reward = cls(
            model,
            tokenizer,
            sidecar,
            batch_size=batch_size,
            label=label,
            attributes=attributes,
            scope=scope,
        )
        tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
        try:
            reward.check_padding_invariance(tolerance=tolerance)
        except ValueError:  # scores depend on the batch, as with LongRoPE beyond its short context
            reward._one_text_per_pass = True
            reward.check_padding_invariance(tolerance=tolerance)
        return reward

    def use_packed_hidden_states(self, compute_states: HiddenStatesFunction) -> None:
        """Compute hidden states with ``compute_states`` instead of a pass over padded batches."""
        self._compute_packed_states = compute_states

    def learned_rewards(self) -> tuple[LearnedReward, ...]:
        return (self,)

    def encode(self, conversation: Conversation) -> list[int]:
        """Return the token ids of the model's input for a conversation.

        Raises:
            Unscorable: The conversation cannot be rendered, or has no tokens.
        """
        return self._ids_and_is_truncated(conversation)[0]

    def _ids_and_is_truncated(self, conversation: Conversation) -> tuple[list[int], bool]:
        """Return the token ids of `encode`, and whether the text was truncated."""
        if self.sidecar.scope == "reply":
            conversation = [{"role": "assistant", "content": last_reply(conversation)}]
        ids, truncated = chat_template.ids_and_is_truncated(
            self.tokenizer,
            conversation,
            append_eos=self.sidecar.append_eos,
            max_length=self.sidecar.max_length,
        )
        if not ids:
            raise Unscorable("no tokens")
        return ids, truncated

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        texts, reasons, counts = score_each(
            self._ids_and_is_truncated, conversations, name=self.name
        )
        encoded = {i: text[0] for i, text in enumerate(texts) if text}
        counts[f"{self.name}: truncated"] = sum(text[1] for text in texts if text)
        logits = self.logits_of_token_ids(list(encoded.values()))
        columns = {self.name: self.scores_from_logits(logits)}
        columns |= {f"{self.name}.{part}": logits[:, k] for part, k in self.parts.items()}
        components = {
            name: scatter_scores(column.tolist(), encoded, len(conversations))
            for name, column in columns.items()
        }
        return Scores(components[self.name], components, +counts, reasons)

    @torch.no_grad()
    def logits_of_token_ids(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits [N, K] of N tokenized texts, in the order of ``encoded``.

        The logits of all K outputs of the head are in float32, on the CPU. :meth:`score` computes
        scores from the logits.
        """
        logits = torch.zeros(len(encoded), self.model.config.num_labels or 1)
        # Sort packed texts by their tokens, so that texts with common prefixes are adjacent. Sort
        # padded texts by length.
        key = list if self._compute_packed_states else len
        order = sorted(range(len(encoded)), key=lambda i: key(encoded[i]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            mask, ids = self.pad_to_mask_and_ids([encoded[i] for i in rows])
            logits[rows] = self.logits(mask, input_ids=ids).cpu()
        return logits

    def pad_to_mask_and_ids(
        self, encoded: Sequence[Sequence[int]], *, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """Pad B tokenized texts on ``side``; return mask [B, T] (bool) and ids [B, T].

        The tensors are on the model's device.
        """
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
        """Return the logits [B, K] of padded texts in float32; gradients are recorded.

        Either ``input_ids`` or ``inputs_embeds`` must be given.

        Args:
            mask: Whether a position is a token and not padding, [B, T].
            input_ids: Token ids, [B, T].
            inputs_embeds: Embeddings, [B, T, D], instead of ``input_ids``.
        """
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        [(key, tensor)] = [(k, v) for k, v in inputs.items() if v is not None]
        if self._one_text_per_pass and len(mask) > 1:
            rows = [
                self.logits(mask[i : i + 1], **{key: tensor[i : i + 1]}) for i in range(len(mask))
            ]
            return torch.cat(rows)
        fill = self._pad_id if key == "input_ids" else 0
        mask, packed = pack_left(mask, tensor, fill=fill)
        if self._compute_packed_states and key == "input_ids":
            states, index = self._compute_packed_states(packed, mask)
            last = index.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
            return self._apply_head(states[last])
        batch = {key: packed, "attention_mask": mask.long()}
        if self.sidecar.pooling == "model":
            return self.model(**batch).logits.float()
        hidden = self.model.base_model(**batch, use_cache=False).last_hidden_state
        last = mask.sum(1) - 1
        return self._apply_head(hidden[torch.arange(len(last), device=last.device), last])

    def _apply_head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., K] of the head for hidden states [..., D]."""
        return self.model.get_submodule("score")(hidden)

    @torch.no_grad()
    def prefix_scores(self, conversation: Conversation) -> PrefixScores:
        """Return the score of every prefix of ``conversation``, computed in one forward pass.

        Raises:
            UserError: The model is an encoder.
            Unscorable: The conversation cannot be rendered, or has no tokens.
        """
        if self.sidecar.pooling != "last":
            raise UserError("prefix scores need a decoder; this checkpoint is an encoder")
        ids = self.encode(conversation)
        mask, batch = self.pad_to_mask_and_ids([ids])
        hidden = self.model.base_model(batch, attention_mask=mask.long(), use_cache=False)
        values = self.scores_from_logits(self._apply_head(hidden.last_hidden_state[0]))
        return PrefixScores([str(self.tokenizer.decode([i])) for i in ids], values.tolist())

    @torch.no_grad()
    def check_padding_invariance(self, *, tolerance: float) -> float:
        """Check that padding (left or right) and batching do not change the logits of a text.

        Returns:
            The largest absolute change.

        Raises:
            UserError: The change exceeds ``tolerance`` * (1 + largest absolute logit).
        """
        # Many chat templates reject a conversation that does not start with a user message.
        first = [{"role": "user", "content": "?"}] if self.tokenizer.chat_template else []
        texts = [[*first, {"role": "assistant", "content": text}] for text in _CHECK_TEXTS]
        short, long = (self.encode(text) for text in texts)
        mask, ids = self.pad_to_mask_and_ids([short])
        alone = self.logits(mask, input_ids=ids)
        others = []
        for side in ("left", "right"):
            mask, ids = self.pad_to_mask_and_ids([short, long], side=side)
            others.append(self.logits(mask, input_ids=ids)[:1])
            others.append(self.logits(mask[:1], input_ids=ids[:1]))
        worst = float((torch.cat(others) - alone).abs().max())
        if not worst <= tolerance * (1 + float(alone.abs().max())):
            raise UserError(
                f"padding changes scores by {worst:.2g}; this model cannot be used as a reward"
            )
        return worst


def pack_left(mask: Tensor, tensor: Tensor, *, fill: int) -> tuple[Tensor, Tensor]:
    """Move the positions where ``mask`` is set to the left edge, in order.

    Args:
        mask: Positions to keep, [B, T].
        tensor: Values, [B, T] or [B, T, D].
        fill: Value of the padding, which replaces old values because an attention weight of zero
            does not remove a NaN.

    Returns:
        The mask and the tensor, truncated to the length of the longest row.
    """
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
    order = order[:, : int(mask.sum(1).max())]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    packed, moved = mask[rows, order], tensor[rows, order]
    keep = packed if tensor.ndim == 2 else packed[..., None]
    return packed, torch.where(keep, moved, fill)


def _logits_to_scores_function(
    model: PreTrainedModel, label: str | None, attributes: Mapping[str, float] | None
) -> Callable[[Tensor], Tensor]:
    """Return the function that computes rewards [N] from logits [N, K]; see `LearnedReward`.

    Raises:
        UserError: ``label`` and ``attributes`` are given, one of them is unknown, or the model has
            several outputs and neither is given.
    """
    num_labels = model.config.num_labels or 1
    if label is not None and attributes is not None:
        raise UserError("set label (a classifier) or attributes (regression heads), not both")
    if attributes is not None:
        weights = torch.zeros(num_labels)
        for name, weight in attributes.items():
            weights[_label_index(model, name)] = weight
        return lambda logits: logits @ weights.to(logits.device)
    if label is None:
        if num_labels > 1:
            names = ", ".join(model.config.label2id or {})
            is_regression = model.config.problem_type == "regression"
            setting = "attributes to weights of" if is_regression else "label to one of"
            raise UserError(
                f"this model has {num_labels} outputs; with kind: learned, set {setting}: {names}"
            )
        return lambda logits: logits[:, 0]
    k = _label_index(model, label)
    if num_labels == 1 or model.config.problem_type in ("multi_label_classification", "regression"):
        return lambda logits: logits[:, k]
    others = [i for i in range(num_labels) if i != k]
    return lambda logits: logits[:, k] - logits[:, others].logsumexp(1)


def _label_index(model: PreTrainedModel, label: str) -> int:
    """Return the index of an output; raise UserError if the model has no such label."""
    labels = model.config.label2id or {}
    if label not in labels:
        hint = did_you_mean(label, labels) or f"; it has {', '.join(labels)}"
        raise UserError(f"this model has no label {label!r}{hint}")
    return int(labels[label])
