"""Preference pairs for the evaluation of rewards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from rlhf.common.conversation import messages_for_models
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import with_tools
from rlhf.reward_models.core import Conversation, as_messages


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected conversation with the same prompt."""

    prompt: Conversation
    chosen: Conversation
    """The preferred conversation, with its prompt."""
    rejected: Conversation
    """The rejected conversation, with its prompt."""
    source: str = ""
    """Origin of the pair, such as a dataset or an annotator. The report shows the accuracy for each
    source."""

    @property
    def prompt_json(self) -> str:
        """Roles and contents of the prompt as JSON text, which reports use as cluster of a pair."""
        return json.dumps([[m["role"], m["content"]] for m in self.prompt])

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of characters of the chosen and of the rejected reply."""
        n = len(self.prompt)
        chosen, rejected = (
            sum(len(message["content"]) for message in conversation[n:])
            for conversation in (self.chosen, self.rejected)
        )
        return chosen, rejected


def data_card(
    pairs: Sequence[Pair], training_pairs: Sequence[Pair] | None = None
) -> dict[str, Any]:
    """Return the data card of pairs: numbers of pairs and prompts, sources, lengths and problems.

    ``duplicates`` is the number of repeated pairs. ``contradictions`` is the number of pairs that
    also occur with chosen and rejected exchanged. ``prompts_in_training`` is the number of prompts
    that are also in the argument ``training_pairs``, and ``training_pairs`` is the number of pairs
    in this argument; both are None if the argument is None.
    """
    sides = [[messages_for_models(side) for side in (p.chosen, p.rejected)] for p in pairs]
    keys = [tuple(map(json.dumps, pair)) for pair in sides]
    known = set(keys)
    prompts = {pair.prompt_json for pair in pairs}
    seen = {pair.prompt_json for pair in training_pairs or ()}
    lengths = np.median([pair.lengths for pair in pairs], axis=0)
    return {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "prompts_in_training": len(prompts & seen) if training_pairs is not None else None,
        "training_pairs": len(training_pairs) if training_pairs is not None else None,
        "duplicates": len(keys) - len(known),
        "contradictions": sum(key[::-1] in known for key in keys),
        "sources": dict(Counter(pair.source for pair in pairs if pair.source).most_common()),
        "median_characters": {"chosen": float(lengths[0]), "rejected": float(lengths[1])},
    }


def to_pair(row: Mapping[str, Any], *, source_column: str | None = None) -> Pair:
    """Convert a row with ``chosen``, ``rejected`` and optionally ``prompt`` to a :class:`Pair`.

    A string is converted to one message. The messages of a reply may begin with those of the
    prompt. Without ``prompt``, the prompt consists of the messages with which both conversations
    begin.

    Args:
        row: The row.
        source_column: Name of the column with the origin of the row. By default, the pair has no
            source.

    Raises:
        UserError: A column is missing, a reply has no messages, or there is no prompt.
    """
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise UserError(f"a pair needs the columns chosen and rejected; {missing[0]!r} is missing")
    chosen, rejected = (as_messages(row[key], "assistant") for key in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = with_tools(as_messages(row["prompt"], "user"), row.get("tools"))
        chosen, rejected = (_prepend_prompt(prompt, reply) for reply in (chosen, rejected))
    else:
        prompt = _common_prefix(chosen, rejected)
    if not prompt or min(len(chosen), len(rejected)) <= len(prompt):
        raise UserError("a pair needs a prompt and two replies, each of at least one message")
    return Pair(
        prompt, chosen, rejected, source=str(row.get(source_column, "")) if source_column else ""
    )


def _prepend_prompt(prompt: Conversation, reply: Conversation) -> Conversation:
    """Return ``reply``, with the prompt prepended if the reply does not begin with the prompt."""
    return reply if reply[: len(prompt)] == prompt else [*prompt, *reply]


def _common_prefix(first: Conversation, second: Conversation) -> Conversation:
    """Return the messages with which both conversations begin, without their last messages."""
    pairs = zip(first[:-1], second[:-1], strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
