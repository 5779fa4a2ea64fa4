"""Process rewards: one score per step of a solution, and one number for the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.reward_models.checkpoint import find_sidecar, heads_in_fp32, read, refuse_adapter
from rlhf.reward_models.core import Conversation, Reward, Scores, Unscorable, last_reply
from rlhf.reward_models.encoding import render, template_hash
from rlhf.reward_models.generic_heads import token_classifier
from rlhf.reward_models.losses import IGNORED

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda steps: steps[-1],
}
"""How P(right) of the steps becomes one reward."""


@dataclass(frozen=True)
class StepEncoding:
    """Token ids of a solution, and the token at which each step ends."""

    ids: list[int]
    ends: list[int]
    """[S] positions of the separators, in order."""

    def labels(self, right: Sequence[bool]) -> list[int]:
        """Labels [T] for ``losses.step_ends``: 0 or 1 at the step ends, ignored elsewhere."""
        if len(right) != len(self.ends):
            raise ValueError(f"{len(right)} labels for {len(self.ends)} steps")
        labels = [IGNORED] * len(self.ids)
        for end, good in zip(self.ends, right, strict=True):
            labels[end] = int(good)
        return labels


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, separator: str = "\n\n"
) -> StepEncoding:
    """Split the last reply at ``separator`` and tokenise each step by itself, separator included.

    Step by step, so that a step ends on the same token wherever it stands; the prompt is rendered
    as for scoring, the reply follows as plain text. The tokens of the separator end every step, the
    last one too. Raises :class:`Unscorable` if the reply holds no step.
    """
    steps = [step for step in last_reply(conversation).split(separator) if step.strip()]
    if not steps:
        raise Unscorable("no steps")
    prompt = render(tokenizer, conversation[:-1]) if len(conversation) > 1 else ""
    ids = list(tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None)["input_ids"])
    ends = []
    for step in steps:
        ids += list(tokenizer(step + separator, add_special_tokens=False)["input_ids"])
        ends.append(len(ids) - 1)
    return StepEncoding(ids, ends)


class ProcessReward(Reward):
    """P(step is right) at every step end of a two-class token classifier, aggregated.

    Class 1 is "right". ``aggregate``: ``min`` (a chain is as good as its weakest step), ``product``
    or ``last``. Steps trained on Monte-Carlo labels predict success from here on, which is a value,
    not correctness: best-of-n with them can mislead (2501.07301).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        aggregate: str = "min",
        separator: str = "\n\n",
        name: str = "process",
    ):
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"process: aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
            )
        if model.config.num_labels != 2:
            raise ValueError(f"process: needs two classes, this has {model.config.num_labels}")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.aggregate, self.separator = aggregate, separator

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        aggregate: str = "min",
        separator: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> ProcessReward:
        """A token-classification checkpoint; the separator is the sidecar's, else an empty line.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: weights are missing, it does not have two classes, or it was trained with
                another template or separator.
        """
        refuse_adapter(path)
        model, info = read(
            read(token_classifier, path).from_pretrained,
            path,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"{path} has no trained step head (missing weights)")
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        heads_in_fp32(model)
        tokenizer = read(AutoTokenizer.from_pretrained, path)
        sidecar = find_sidecar(path)
        if sidecar is not None:
            given = {"template_hash": template_hash(tokenizer), "separator": separator}
            for key, value in given.items():
                if value is not None and value != getattr(sidecar, key):
                    raise ValueError(
                        f"{path} was trained with {key}={getattr(sidecar, key)!r}, but here it is "
                        f"{value!r}; scores would not mean the same"
                    )
            separator = sidecar.separator
        return cls(model, tokenizer, aggregate=aggregate, separator=separator or "\n\n")

    @torch.no_grad()
    def step_scores(self, conversation: Conversation) -> list[float]:
        """P(right) of every step; :class:`Unscorable` if there is none."""
        steps = encode_steps(self.tokenizer, conversation, separator=self.separator)
        ids = torch.tensor([steps.ids], device=self.model.device)
        logits = self.model(ids).logits[0, steps.ends].float()
        return logits.softmax(-1)[:, 1].tolist()

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        values, fewest, reasons = [], [], []
        for conversation in conversations:
            steps, missing = [], None
            try:
                steps = self.step_scores(conversation)
            except Unscorable as reason:
                missing = f"{self.name}: {reason}"
            reasons.append(missing)
            values.append(AGGREGATES[self.aggregate](steps) if steps else None)
            fewest.append(float(len(steps)))
        counts = Counter(reason for reason in reasons if reason)
        components = {self.name: values, f"{self.name}.steps": fewest}
        return Scores(values, components, counts, reasons)
