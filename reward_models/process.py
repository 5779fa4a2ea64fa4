"""Process rewards, which score each step of a solution and combine the scores into a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.common.conversation import up_to_last_reply
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import render_conversation, template_hash
from rlhf.reward_models.checkpoint import (
    check_sidecar,
    find_sidecar,
    load_checkpoint,
    max_input_tokens,
)
from rlhf.reward_models.core import (
    Conversation,
    Reward,
    Scores,
    Unscorable,
    last_reply,
    score_each,
)

STEP_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda steps: steps[-1],
}
"""Name -> function that computes the reward from the probabilities that the steps are right."""


@dataclass(frozen=True)
class StepEncoding:
    """Token ids of a solution, and the position of the last token of each step."""

    ids: list[int]
    """Token ids, [T]."""
    ends: list[int]
    """Position of the last token of each step, [S]."""


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, separator: str = "\n\n"
) -> StepEncoding:
    """Split the last reply at ``separator``, and encode each step separately with a separator.

    Because of the separate encoding, the tokens at the end of a step do not depend on the position
    of the step. The prompt is rendered by
    :func:`~rlhf.reward_models.chat_template.render_conversation`, and the reply follows as plain
    text. The last step also ends with the separator. Blank steps are omitted.

    Raises:
        Unscorable: There is no reply, the reply has no step, or the prompt cannot be rendered.
    """
    steps = [step for step in last_reply(conversation).split(separator) if step.strip()]
    if not steps:
        raise Unscorable("no steps")
    turns = up_to_last_reply(conversation)[:-1]
    prompt = render_conversation(tokenizer, turns) if turns else ""
    ids = list(tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None)["input_ids"])
    ends = []
    for step in steps:
        ids += list(tokenizer(step + separator, add_special_tokens=False)["input_ids"])
        ends.append(len(ids) - 1)
    return StepEncoding(ids, ends)


class ProcessReward(Reward):
    """Reward that combines the probabilities that the steps are right.

    The model is a token classifier with two classes; class 1 is "right". ``aggregate`` is ``min``
    (the probability of the worst step), ``product`` or ``last`` (the probability of the last step).
    The component ``<name>.steps`` is the number of scored steps, 0 without a score. A model that
    was trained on Monte-Carlo labels predicts the probability that the continuation succeeds, not
    whether the step is correct. Best-of-n selection with such a model can therefore be misleading
    (Zhang et al. 2025, arXiv:2501.07301).

    Raises:
        UserError: ``aggregate`` is unknown, or the model does not have two classes.
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
        if aggregate not in STEP_AGGREGATES:
            raise UserError(
                f"process: aggregate must be one of {', '.join(STEP_AGGREGATES)}, got {aggregate!r}"
            )
        if model.config.num_labels != 2:
            raise UserError(
                f"process: the model must have two classes, got {model.config.num_labels}"
            )
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.aggregate, self.separator = aggregate, separator
        self.max_tokens = max_input_tokens(model, tokenizer)
        """Number of tokens that the model can read; None if it is unknown."""

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
        """Load a token-classification checkpoint.

        Args:
            path: Folder or Hugging Face Hub id.
            aggregate: A key of ``STEP_AGGREGATES``.
            separator: Text that ends each step; by default the separator in the sidecar. Without a
                sidecar, the default is an empty line.
            device: Device of the model; by default the GPU if there is one.
            dtype: Type of the weights outside the head.

        Raises:
            FileNotFoundError: There is no valid checkpoint.
            UserError: Weights are missing, the number of classes is not two, or the checkpoint was
                trained with another template or separator.
        """
        model, tokenizer = load_checkpoint(path, dtype=dtype, device=device, per_token=True)
        sidecar = find_sidecar(path)
        if sidecar is not None:
            check_sidecar(
                path, sidecar, template_hash=template_hash(tokenizer), separator=separator
            )
            separator = sidecar.separator
        return cls(model, tokenizer, aggregate=aggregate, separator=separator or "\n\n")

    @torch.no_grad()
    def step_scores(self, conversation: Conversation) -> list[float]:
        """Return the probability that each step is right, [S].

        Raises:
            Unscorable: The reply has no step, the prompt cannot be rendered, or the conversation
                has more tokens than the model can read.
        """
        steps = encode_steps(self.tokenizer, conversation, separator=self.separator)
        if self.max_tokens is not None and len(steps.ids) > self.max_tokens:
            raise Unscorable(f"longer than the {self.max_tokens} tokens that the model can read")
        ids = torch.tensor([steps.ids], device=self.model.device)
        logits = self.model(ids).logits[0, steps.ends].float()
        return logits.softmax(-1)[:, 1].tolist()

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        steps, reasons, counts = score_each(self.step_scores, conversations, name=self.name)
        values = [STEP_AGGREGATES[self.aggregate](row) if row else None for row in steps]
        num_steps = [float(len(row or ())) for row in steps]
        components = {self.name: values, f"{self.name}.steps": num_steps}
        return Scores(values, components, counts, reasons)
