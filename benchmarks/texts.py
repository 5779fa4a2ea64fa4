"""Generate rows of random words with fixed lengths.

The toolkit and TRL are measured on the same rows, and every step of an offline workload uses the
same rows. The tokens, lengths and padding are therefore the same for the toolkit and TRL and in
every step, regardless of shuffling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from rlhf.reward_models.chat_template import encode_conversation
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import encode_example

# Words that are one token after a space in common vocabularies.
TEXT = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government
    number night point home water room mother area money story fact month lot right study book
    eye job word business issue side kind head house service friend father power hour game line
    end member law car city community name president team minute idea body information back
"""
WORDS = TEXT.split()

Message = dict[str, str]


def random_words(count: int, rng: random.Random) -> str:
    """Return a text of about ``count`` tokens."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def lognormal_lengths(count: int, total: int, *, sigma: float = 0.6) -> list[int]:
    """Return ``count`` quantiles of a lognormal distribution, scaled to a sum of about ``total``.

    ``sigma`` is the standard deviation of the logarithm.
    """
    normal = NormalDist()
    shares = [2.718281828 ** (sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [max(2, round(total * share / sum(shares))) for share in shares]


def user_message(text: str) -> list[Message]:
    """Return a conversation of one user message."""
    return [{"role": "user", "content": text}]


def assistant_message(text: str) -> list[Message]:
    """Return a completion of one assistant message."""
    return [{"role": "assistant", "content": text}]


def random_sft_rows(rng: random.Random, *, mean_words: int = 98) -> list[dict[str, Any]]:
    """Return eight documents with short prompts.

    ``mean_words`` is the mean number of words of a completion. Chat templates add about 42 tokens
    to each document.
    """
    lengths = lognormal_lengths(8, 8 * mean_words)
    return [
        {
            "prompt": user_message(random_words(8, rng)),
            "completion": assistant_message(random_words(n, rng)),
        }
        for n in lengths
    ]


def random_reward_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Return four pairs, whose eight texts have about 920 tokens in total."""
    return _random_pairs(rng, prompt_words=8, reply_words=73)


def random_dpo_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Return four pairs with prompts of about 128 tokens and replies of about 64 on average."""
    return _random_pairs(rng, prompt_words=100, reply_words=63)


def _random_pairs(
    rng: random.Random, *, prompt_words: int, reply_words: int
) -> list[dict[str, Any]]:
    """Return four pairs with these numbers of words per prompt and (on average) per reply."""
    lengths = lognormal_lengths(8, 8 * reply_words)
    rng.shuffle(lengths)
    return [
        {
            "prompt": user_message(random_words(prompt_words, rng)),
            "chosen": assistant_message(random_words(one, rng)),
            "rejected": assistant_message(random_words(other, rng)),
        }
        for one, other in zip(lengths[:4], lengths[4:], strict=True)
    ]


ROWS_BY_COMMAND = {"sft": random_sft_rows, "reward": random_reward_rows, "dpo": random_dpo_rows}


def decreasing_density_lengths(count: int, *, most: int) -> list[int]:
    """Return ``count`` reply lengths up to ``most``, with the mean ``most`` / 3.

    The lengths are quantiles of a density that decreases linearly from length 0 to ``most``.
    """
    return [max(1, round(most * (1 - (1 - (i + 0.5) / count) ** 0.5))) for i in range(count)]


def encode_for_trl(
    command: str, rows: Sequence[dict[str, Any]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Return rows for TRL with the toolkit's token ids; rows for DPO are returned as text."""
    if command == "dpo":
        return list(rows)
    if command == "reward":
        return [
            {
                f"{name}_ids": encode_conversation(
                    tokenizer, [*row["prompt"], *row[name]], append_eos=True
                )
                for name in ("chosen", "rejected")
            }
            for row in rows
        ]
    chat_format = ChatFormat(tokenizer)
    pairs = [encode_example(chat_format, row["prompt"], row["completion"]) for row in rows]
    return [
        {
            "input_ids": ids,
            "labels": [i if own else -100 for i, own in zip(ids, is_action, strict=True)],
        }
        for ids, is_action in pairs
    ]


def count_tokens(rows: Sequence[dict[str, Any]], tokenizer: Any) -> int:
    """Return the number of tokens of rows, excluding padding; the prompt of a pair counts twice."""
    chat_format = ChatFormat(tokenizer)
    texts = [
        (row["prompt"], row[name])
        for row in rows
        for name in ("completion", "chosen", "rejected")
        if name in row
    ]
    return sum(len(encode_example(chat_format, prompt, reply)[0]) for prompt, reply in texts)
