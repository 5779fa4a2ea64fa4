"""Transcripts of episodes, which are the lines of ``samples.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.algorithms.batch import TrainingBatch
from rlhf.rollout.batch import Rollout

MAX_TOKENS = 512
"""Maximum number of tokens in a token table, which limits the size of samples.jsonl."""


def transcript_row(
    rollout: Rollout, step: int, split: str, *, return_trained: float | None = None
) -> dict[str, Any]:
    """Return a transcript as a line of ``samples.jsonl``.

    In the transcript, ``return_env`` is the return of the environment, and ``score`` is the
    weighted sum of all rewards that are trained on. ``score`` and ``return_trained`` are None if
    the episode could not be scored.

    Args:
        rollout: The episode.
        step: Number of the training step that uses a training episode, counted from 1; for a
            held-out episode, the number of training steps of the policy.
        split: "train" for training episodes; "before" or "after" training for held-out episodes.
        return_trained: Return of a training episode after scaling and penalties; None for held-out
            episodes.
    """
    row = {
        "step": step,
        "split": split,
        "seed": rollout.seed,
        "messages": rollout.conversation,
        "return_env": rollout.env_return,
        "score": _finite_or_none(rollout.score),
    }
    if return_trained is not None:
        row["return_trained"] = _finite_or_none(return_trained)
    row["rewards"] = rollout.components
    return row | ({"unscored": rollout.unscored} if rollout.unscored else {})


def token_table(batch: TrainingBatch, row: int, tokenizer: Any) -> dict[str, list[Any]]:
    """Return a table of the first ``MAX_TOKENS`` sampled tokens of an episode.

    Args:
        batch: The training batch.
        row: Index of the episode in the batch.
        tokenizer: Tokenizer of the policy.

    Returns:
        Column name -> value of each token, with numbers rounded to four significant digits. The
        columns are:

        - ``turn``: turn of the token, counted from 0.
        - ``text``: text of the token; the joined texts of a turn are its completion.
        - ``reward``: training reward before KL and cost penalties.
        - ``advantage``: advantage.
        - ``entropy``: entropy in nats at the sampling temperature.
        - ``kl``: log(policy / reference) in nats, only with a reference policy.
        - ``value``: value of the critic, only with a critic.
    """
    index = batch.action_mask[row].nonzero()[:MAX_TOKENS, 0]
    columns = {
        "reward": batch.require("rewards"),
        "advantage": batch.require("advantages"),
        "entropy": batch.require("entropy"),
    }
    if batch.ref_logprobs is not None:
        columns["kl"] = batch.require("old_logprobs") - batch.ref_logprobs
    if batch.values is not None:
        columns["value"] = batch.values
    ids, turns = batch.tokens[row, index].tolist(), batch.require("turns")[row, index].tolist()
    text = []
    for turn in sorted(set(turns)):
        turn_ids = [token for token, number in zip(ids, turns, strict=True) if number == turn]
        text += token_texts(
            turn_ids, lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False)
        )
    numbers = {
        name: [float(f"{value:.4g}") for value in column[row, index].tolist()]
        for name, column in columns.items()
    }
    return {"turn": turns, "text": text, **numbers}


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return the text of each token, so that the joined texts are the decoded text.

    A character that consists of several tokens is in the text of its last token.
    """
    result, length = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an incomplete character
        result.append(text[length:])
        length = max(length, len(text))
    return result


def _finite_or_none(value: float) -> float | None:
    """Return the value, or None if it is nan or infinite."""
    return value if math.isfinite(value) else None
