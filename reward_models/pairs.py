"""Preference pairs as the evaluation sees them: two whole conversations with one prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.reward_models.chat_template import with_tools
from rlhf.reward_models.core import Conversation


@dataclass(frozen=True)
class Pair:
    """One comparison; the conversations begin with the same prompt."""

    prompt: Conversation
    chosen: Conversation
    """The whole conversation that was preferred, prompt included."""
    rejected: Conversation
    """The whole conversation that was not."""
    source: str = ""
    """Where the row comes from (data set, annotator), for slices of the report."""

    @property
    def group(self) -> str:
        """Key of the prompt: pairs that share it are resampled together."""
        return json.dumps([[m["role"], m["content"]] for m in self.prompt])

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the chosen and of the rejected reply."""
        n = len(self.prompt)
        return reply_length(self.chosen[n:]), reply_length(self.rejected[n:])


def reply_length(reply: Conversation) -> int:
    """Characters of all messages."""
    return sum(len(message["content"]) for message in reply)


def data_card(pairs: Sequence[Pair], train: Sequence[Pair] | None = None) -> dict[str, Any]:
    """What kind of pairs these are, in numbers.

    ``duplicates``: pairs that stand there already; ``contradictions``: pairs that another one turns
    round; ``prompts_in_training``: prompts that ``train`` has too (None without it).
    """
    keys = [tuple(json.dumps(side) for side in (p.chosen, p.rejected)) for p in pairs]
    known = set(keys)
    prompts = {pair.group for pair in pairs}
    seen = {pair.group for pair in train or ()}
    lengths = np.median([pair.lengths for pair in pairs], axis=0)
    return {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "prompts_in_training": len(prompts & seen) if train is not None else None,
        "training_pairs": len(train) if train is not None else None,
        "duplicates": len(keys) - len(known),
        "contradictions": sum(key[::-1] in known for key in keys),
        "sources": dict(Counter(pair.source for pair in pairs if pair.source).most_common()),
        "median_characters": {"chosen": float(lengths[0]), "rejected": float(lengths[1])},
    }


def to_pair(row: Mapping[str, Any], *, source: str | None = None) -> Pair:
    """A :class:`Pair` from a row with ``chosen``, ``rejected`` and, if they lack it, ``prompt``.

    Text is taken as one message; messages may or may not repeat the prompt. ``source`` names the
    column with the row's origin; a row without it has none.

    Raises:
        ValueError: a column is missing, a reply is empty, or the two share no prompt.
    """
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"a pair needs the columns chosen and rejected; {missing[0]!r} is missing")
    chosen, rejected = (_messages(row[key], "assistant") for key in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = with_tools(_messages(row["prompt"], "user"), row.get("tools"))
        chosen, rejected = (_with_prompt(prompt, reply) for reply in (chosen, rejected))
    else:
        prompt = _common_prefix(chosen, rejected)
    if not prompt or min(len(chosen), len(rejected)) <= len(prompt):
        raise ValueError("a pair needs a prompt and two replies to it; one of them is empty")
    return Pair(prompt, chosen, rejected, source=str(row.get(source, "")) if source else "")


def _messages(value: str | Conversation, role: str) -> Conversation:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _with_prompt(prompt: Conversation, reply: Conversation) -> Conversation:
    return reply if reply[: len(prompt)] == prompt else [*prompt, *reply]


def _common_prefix(first: Conversation, second: Conversation) -> Conversation:
    shared = 0
    for a, b in zip(first[:-1], second[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return first[:shared]
