"""Kinds of reward models that are trained on several replies to a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.messages import RowDropped
from rlhf.data.splits import prompt_key
from rlhf.reward_models import losses
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.report import labeled
from rlhf.training.examples import EQUAL_TEXTS_REASON, SAME_TOKENS_REASON, Example
from rlhf.training.reward_models.base import Report, ReportInputs, RewardKind
from rlhf.training.reward_models.encoding import RewardEncoder, Row


class RankingKind(RewardKind):
    """Kind with the Plackett-Luce loss on ranked replies.

    The labels [B] are the numbers of replies of the examples.
    """

    data = "ranking"

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        replies = self.replies_best_first(row)
        texts = [
            encoder.encode_conversation([*row["prompt"], *reply], row.get("tools"))
            for reply in replies
        ]
        if len(set(map(tuple, texts))) < len(texts):
            raise RowDropped(EQUAL_TEXTS_REASON if encoder.truncated else SAME_TOKENS_REASON)
        return Example(texts, len(texts))

    def replies_best_first(self, row: Row) -> list[Any]:
        """Return the replies of a row, ordered so that the best reply is the first."""
        return list(row["replies"])

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        scores = self.group_by_example(logits, labels)
        return self.group_losses(scores, mask=scores > -torch.inf).sum() / num_batch_labels

    def group_losses(self, scores: Tensor, *, mask: Tensor) -> Tensor:
        """Return the loss of each example, [B].

        Args:
            scores: [B, K], scores of up to K replies, the best reply first.
            mask: [B, K], True for replies and False for padding.
        """
        return losses.ranking_loss(scores, mask=mask)

    def group_by_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reshape logits [N, 1] to scores [B, K], padded with -inf for missing replies."""
        position = torch.arange(int(labels.max()), device=logits.device)
        scores = logits.new_full((len(labels), len(position)), -torch.inf)
        return scores.masked_scatter(position < labels[:, None], logits[:, 0])

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return ``accuracy``: the fraction of examples whose best reply has the highest score.

        If k replies have the highest score, and the best reply is one of them, the example counts
        1/k.
        """
        is_reply = np.arange(logits.shape[1]) < labels[:, None]
        scores = np.where(is_reply, logits, -np.inf)
        highest = scores == scores.max(axis=1, keepdims=True)
        return {"accuracy": float((highest[:, 0] / highest.sum(axis=1)).mean())}

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with the accuracy of the model and of two baselines.

        The accuracy is the fraction of rows whose best reply is selected. The baselines are the
        longest reply and a random reply.
        """
        reward = inputs.load()
        correct, longest, chance = [], [], []
        for row in inputs.test_rows:
            best = row.get("best", 0)
            scores = reward([[*prompt_with_tools(row), *reply] for reply in row["replies"]])
            scores = [-np.inf if score is None else score for score in scores]
            lengths = [sum(len(m["content"]) for m in reply) for reply in row["replies"]]
            correct.append(float(int(np.argmax(scores)) == best))
            longest.append(float(int(np.argmax(lengths)) == best))
            chance.append(1 / len(row["replies"]))
        groups = [prompt_key(row) for row in inputs.test_rows]
        return labeled.accuracy_report(
            correct, baselines={"longest": longest, "chance": chance}, groups=groups
        )


class BestOfKind(RankingKind):
    """Kind with the cross-entropy loss of the best reply, whose index is in the column ``best``."""

    columns = ("best",)

    def replies_best_first(self, row: Row) -> list[Any]:
        replies, best = list(row["replies"]), row["best"]
        if not isinstance(best, int) or not 0 <= best < len(replies):
            raise RowDropped("best is not the index of a reply")
        return [replies.pop(best), *replies]

    def group_losses(self, scores: Tensor, *, mask: Tensor) -> Tensor:
        best = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return losses.best_of_loss(scores, best, mask=mask)
