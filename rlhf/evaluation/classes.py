"""Evaluate a language model as a classifier; it predicts the label that is the likeliest reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.config.evaluate import ZeroShotClassificationSpec
from rlhf.data.conversation import conversation_of_labeled_row
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.evaluation.text import completion_losses
from rlhf.models.policy import Policy
from rlhf.reward_models.report.labeled import CLASS_MEASURES, labeled_report
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.demonstrations import encode_example


def classification_report(
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    spec: ZeroShotClassificationSpec,
    *,
    examples: Sequence[dict[str, str]] = (),
    max_length: int,
) -> dict[str, Any]:
    """Return the report on a policy as a classifier, with a baseline.

    The metrics are accuracy, macro-F1 and AUC. The baseline always predicts the most common class.
    The independent units are the different texts.

    Args:
        policy: The model.
        rows: Canonical classification rows. If a row has a prompt and a reply, only the reply is
            classified.
        spec: Question and names of the classes.
        examples: Few-shot messages before each question.
        max_length: Maximum number of tokens of the examples, a question and its label together.

    Returns:
        The result of `labeled_report`.

    Raises:
        UserError: A label has no class name, a text is too long, or the chat template cannot render
            a question.
    """
    truth = np.array([int(row["label"]) for row in rows])
    if outside := sorted(set(truth.tolist()) - set(range(len(spec.labels)))):
        raise UserError(
            f"classes: the data have the label {outside[0]}, but classes.labels names only 0 to "
            f"{len(spec.labels) - 1}"
        )
    texts = [conversation_of_labeled_row(row)[-1]["content"] for row in rows]
    scores = label_logprobs(policy, texts, spec, examples=examples, max_length=max_length)
    common = np.bincount(truth, minlength=len(spec.labels)).astype(float)
    baselines = {"most common class": np.tile(common, (len(rows), 1))}
    return labeled_report(CLASS_MEASURES, scores, truth, baselines=baselines, groups=texts)


def label_logprobs(
    policy: Policy,
    texts: Sequence[str],
    spec: ZeroShotClassificationSpec,
    *,
    examples: Sequence[dict[str, str]] = (),
    max_length: int,
) -> np.ndarray:
    """Return the log-probability in nats of each of C labels as the reply to N texts, [N, C].

    `classification_report` describes the arguments.

    Raises:
        UserError: A text is too long, or the chat template cannot render a question.
    """
    rows = []
    for text in texts:
        question = {"role": "user", "content": spec.question.replace("{text}", text)}
        for label in spec.labels:
            reply = {"role": "assistant", "content": label}
            rows.append({"prompt": [*examples, question], "completion": [reply]})
    chat_format = ChatFormat(policy.tokenizer, stop_ids=generation_stop_ids(policy.model))
    try:
        lengths = [len(encode_example(chat_format, **row)[0]) for row in rows]
    except RowDropped as reason:
        raise UserError(f"classes: {reason}") from reason
    if max(lengths) > max_length:
        raise UserError(
            f"classes: a question with its label has {max(lengths)} tokens, more than max_length = "
            f"{max_length}: increase max_length, or remove long texts"
        )
    losses = completion_losses(policy, rows, max_length=max_length)
    return -np.array(losses.nats).reshape(len(texts), len(spec.labels))
