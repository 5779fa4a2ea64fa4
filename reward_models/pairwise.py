"""Pairwise preference models, which read two replies and predict which one is better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.common.conversation import up_to_last_reply
from rlhf.reward_models.chat_template import render_conversation
from rlhf.reward_models.core import (
    Conversation,
    Reward,
    Scores,
    Unscorable,
    last_reply,
    scatter_scores,
    score_each,
)
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.targets import ReferenceAnswerSource

_HEADINGS = ("\n\n[REPLY A]\n", "\n\n[REPLY B]\n")


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    first: str,
    second: str,
    *,
    max_length: int,
) -> list[int]:
    """Return the token ids of a prompt and two replies with the headings A and B.

    If there are more than ``max_length`` tokens, tokens are first removed from the start of the
    prompt. If this is not enough, tokens are removed from the end of the longer reply, and then
    from the end of both replies.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    plain = tokenizer.chat_template is None  # a template adds its own special tokens at the start
    opening = _first_known_id(tokenizer.cls_token_id, tokenizer.bos_token_id) if plain else []
    closing = _first_known_id(tokenizer.sep_token_id, tokenizer.eos_token_id)
    available = max_length - len(opening) - len(closing)
    replies = [ids(head + reply) for head, reply in zip(_HEADINGS, (first, second), strict=True)]
    limit = max(available - min(map(len, replies)), available // 2)
    replies = [reply[:limit] for reply in replies]
    left = available - sum(map(len, replies))
    context = ids(render_conversation(tokenizer, prompt))
    context_ids = context[len(context) - min(left, len(context)) :]
    return [*opening, *context_ids, *replies[0], *replies[1], *closing]


def _first_known_id(*ids: Any) -> list[int]:
    """Return a list of the first id that is not None; an empty list if there is none."""
    return [i for i in ids if i is not None][:1]


class PairModel(Reward):
    """Reward that is the log-odds that a reply is better than a reference reply.

    The log-odds are averaged over the two orders of the replies. The component
    ``<name>.consistent`` is 1.0 if the model prefers the same reply in both orders, else 0.0. The
    reference reply is read from a file of prompts and answers or from the key ``answer`` of a
    message; see :class:`~rlhf.reward_models.targets.ReferenceAnswerSource`.
    :meth:`log_odds_and_consistency` compares any two replies.
    """

    def __init__(
        self, inner: LearnedReward, *, reference: ReferenceAnswerSource, name: str = "pairwise"
    ):
        self.inner, self.inner_rewards, self.name = inner, (inner,), name
        self.reference = reference

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        answers: str | Path | None = None,
        device: str | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
    ) -> PairModel:
        """Load the preference model at ``path``, a folder or a Hugging Face Hub id.

        ``answers`` is a JSON Lines file of reference replies; see
        :class:`~rlhf.reward_models.targets.ReferenceAnswerSource`.
        """
        inner = LearnedReward.load(path, device=device, batch_size=batch_size, dtype=dtype)
        return cls(inner, reference=ReferenceAnswerSource(answers=answers))

    def log_odds_and_consistency(
        self, prompts: Sequence[Conversation], first: Sequence[str], second: Sequence[str]
    ) -> tuple[list[float], list[bool]]:
        """Compare two replies to each of N prompts.

        Returns:
            - The log-odds that the first reply is better, averaged over the two orders, [N].
            - Whether the model prefers the same reply in both orders, [N].
        """
        limit = self.inner.sidecar.max_length or 512
        rows = []
        for prompt, a, b in zip(prompts, first, second, strict=True):
            for one, other in ((a, b), (b, a)):
                tokenizer = self.inner.tokenizer
                rows.append(encode_pair(tokenizer, prompt, one, other, max_length=limit))
        logits = self.inner.logits_of_token_ids(rows)[:, 0].reshape(-1, 2)
        agree = (logits[:, 0] > 0) == (logits[:, 1] < 0)
        return ((logits[:, 0] - logits[:, 1]) / 2).tolist(), agree.tolist()

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        comparisons, reasons, counts = score_each(
            self._prompt_reply_and_reference, conversations, name=self.name
        )
        known = {i: comparison for i, comparison in enumerate(comparisons) if comparison}
        log_odds, agree = (
            self.log_odds_and_consistency(*zip(*known.values(), strict=True)) if known else ([], [])
        )
        values = scatter_scores(log_odds, known, len(conversations))
        consistent = scatter_scores([float(same) for same in agree], known, len(conversations))
        components = {self.name: values, f"{self.name}.consistent": consistent}
        return Scores(values, components, counts, reasons)

    def _prompt_reply_and_reference(
        self, conversation: Conversation
    ) -> tuple[Conversation, str, str]:
        """Return the prompt, the reply and the reference reply.

        Raises:
            Unscorable: One of them is missing, or the prompt cannot be rendered.
        """
        prompt, reply = up_to_last_reply(conversation)[:-1], last_reply(conversation)
        if not prompt:
            raise Unscorable("no prompt")
        render_conversation(
            self.inner.tokenizer, prompt
        )  # raises if the template cannot render the prompt
        return prompt, reply, self.reference.reference_answer(conversation)
