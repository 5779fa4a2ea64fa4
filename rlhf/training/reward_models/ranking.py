"""Kinds that learn from more than two replies to a prompt: from rankings or from the best reply."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.messages import RowDropped
from rlhf.data.splits import prompt_key
from rlhf.reward_models import losses
from rlhf.reward_models.report import labeled
from rlhf.rollout.chat_format import prompt_of
from rlhf.training.examples import EQUAL_TEXTS_REASON, SAME_TOKENS_REASON, Example
from rlhf.training.reward_models.base import Report, RewardKind, TrainedModel
from rlhf.training.reward_models.encoding import RewardEncoder, Row


class Ranking(RewardKind):
    """Plackett-Luce loss on ranked replies, the best first. Labels [B]: the number of replies."""

    data = "ranking"

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        replies = self.best_first(row)
        texts = [encoder.text([*prompt_of(row), *reply]) for reply in replies]
        if len(set(map(tuple, texts))) < len(texts):
            raise RowDropped(EQUAL_TEXTS_REASON if encoder.truncated else SAME_TOKENS_REASON)
        return Example(texts, len(texts))

    def best_first(self, row: Row) -> list[Any]:
        """Return the replies of a row, the best first."""
        return list(row["replies"])

    def loss(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        scores = self.by_example(logits, labels)
        return self.group_losses(scores, mask=scores > -torch.inf).sum() / count

    def group_losses(self, scores: Tensor, *, mask: Tensor) -> Tensor:
        """Return the loss [B] of scores [B, K]; ``mask`` is True where there is a reply."""
        return losses.ranking(scores, mask=mask)

    def by_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reshape logits [N, 1] to scores [B, K], -inf where an example has fewer replies."""
        position = torch.arange(int(labels.max()), device=logits.device)
        scores = logits.new_full((len(labels), len(position)), -torch.inf)
        return scores.masked_scatter(position < labels[:, None], logits[:, 0])

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the share of the examples whose best reply has the highest score."""
        is_reply = np.arange(logits.shape[1]) < labels[:, None]
        return {"accuracy": float((np.where(is_reply, logits, -np.inf).argmax(1) == 0).mean())}

    def evaluate(self, trained: TrainedModel) -> Report:
        """Report how often the best reply scores highest, for the model and two baselines."""
        reward = trained.load()
        correct, longest, chance = [], [], []
        for row in trained.test_rows:
            best = row.get("best", 0)
            scores = reward([[*prompt_of(row), *reply] for reply in row["replies"]])
            scores = [-np.inf if score is None else score for score in scores]
            lengths = [sum(len(m["content"]) for m in reply) for reply in row["replies"]]
            correct.append(float(int(np.argmax(scores)) == best))
            longest.append(float(int(np.argmax(lengths)) == best))
            chance.append(1 / len(row["replies"]))
        groups = [prompt_key(row) for row in trained.test_rows]
        return labeled.accuracy_report(
            correct, baselines={"longest": longest, "chance": chance}, groups=groups
        )


class BestOf(Ranking):
    """Softmax cross-entropy loss of the best reply, whose index is in the column ``best``."""

    columns = ("best",)

    def best_first(self, row: Row) -> list[Any]:
        replies, best = list(row["replies"]), row["best"]
        if not isinstance(best, int) or not 0 <= best < len(replies):
            raise RowDropped("best is not the index of a reply")
        return [replies.pop(best), *replies]

    def group_losses(self, scores: Tensor, *, mask: Tensor) -> Tensor:
        best = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return losses.best_of(scores, best, mask=mask)
