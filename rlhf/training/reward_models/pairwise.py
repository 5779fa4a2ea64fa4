"""Pairwise models, which predict from a text with two replies whether the first is better."""

from __future__ import annotations

import numpy as np

from rlhf.data.messages import RowDropped
from rlhf.data.splits import prompt_key
from rlhf.models.rewards import enable_reward_packing
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.pairwise import PairModel, encode_pair
from rlhf.reward_models.report import labeled
from rlhf.training.examples import EQUAL_TEXTS_REASON, Example
from rlhf.training.reward_models.base import Report, ReportInputs
from rlhf.training.reward_models.classification import LogOddsKind
from rlhf.training.reward_models.encoding import RewardEncoder, Row


class PairwiseKind(LogOddsKind):
    """Kind of reward model whose output is the log-odds that the first of two replies is better.

    The order of the chosen and the rejected reply is random. The labels [B, 1] are 1 if the first
    reply is the chosen reply, otherwise 0.
    """

    data = "preference"
    scorer = "pairwise"
    append_eos = False

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        chosen_first = bool(encoder.generator.random() < 0.5)
        order = ("chosen", "rejected") if chosen_first else ("rejected", "chosen")
        first, second = (_reply_text(row, side) for side in order)
        ids, swapped = (
            encode_pair(
                encoder.tokenizer,
                prompt_with_tools(row),
                *replies,
                max_length=self.config.max_length,
            )
            for replies in ((first, second), (second, first))
        )
        if ids == swapped:
            raise RowDropped(EQUAL_TEXTS_REASON)
        return Example([ids], [float(chosen_first)])

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with the accuracy of the model and of a baseline.

        The baseline prefers the longer reply. ``order_agreement`` is the fraction of pairs for
        which the model prefers the same reply in both orders.
        """
        rows = inputs.test_rows
        model = enable_reward_packing(PairModel.load(inputs.run.final, dtype=inputs.dtype))
        chosen, rejected = (
            [_reply_text(row, side) for row in rows] for side in ("chosen", "rejected")
        )
        log_odds, agree = model.log_odds_and_consistency(
            [prompt_with_tools(row) for row in rows], chosen, rejected
        )
        correct = (np.sign(log_odds) + 1) / 2
        gaps = [len(a) - len(b) for a, b in zip(chosen, rejected, strict=True)]
        groups = [prompt_key(row) for row in rows]
        report = labeled.accuracy_report(
            correct, baselines={"longer wins": (np.sign(gaps) + 1) / 2}, groups=groups
        )
        report["metrics"]["order_agreement"] = labeled.proportion_estimate(agree, groups)
        return report


def _reply_text(row: Row, side: str) -> str:
    return "\n\n".join(message["content"] for message in row[side])
