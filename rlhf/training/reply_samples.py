"""Replies to held-out prompts before and after offline training, as lines of ``samples.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from rlhf.config.rollout import RolloutSpec
from rlhf.errors import UserError
from rlhf.models.trainable import set_dropout
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.rollout.completions import sample_completions
from rlhf.runs.directory import Run

NUM_PROMPTS = 4
"""Maximum number of held-out prompts whose replies are recorded."""
MAX_NEW_TOKENS = 64
"""Maximum number of tokens of a recorded reply."""
_MAX_ROWS = 64
"""Maximum number of held-out rows among which prompts are searched."""

log = logging.getLogger(__name__)


def prompts_to_sample(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return up to `NUM_PROMPTS` different prompts of the first held-out rows."""
    prompts: list[Any] = []
    for row in islice(rows, _MAX_ROWS):
        prompt = prompt_with_tools(row) if row.get("prompt") else None
        if prompt and prompt not in prompts:
            prompts.append(prompt)
    return prompts[:NUM_PROMPTS]


def write_reply_samples(
    run: Run, model: Any, tokenizer: Any, prompts: Sequence[Any], *, step: int, before_or_after: str
) -> None:
    """Sample a reply to each prompt, with the same seeds for every model, and write transcripts.

    If sampling fails, a warning is logged, because training does not need the replies. A process
    that does not write the run directory does nothing; otherwise, dropout of the model is turned
    off.

    Args:
        run: The run directory.
        model: The language model, which this process holds as a whole.
        tokenizer: Tokenizer of the model.
        prompts: Prompts, as message lists.
        step: Number of training steps of the model.
        before_or_after: "before" or "after" training.
    """
    if not prompts or not run.writes:
        return
    set_dropout(model, active=False)
    spec = RolloutSpec(max_new_tokens=MAX_NEW_TOKENS)
    try:
        rollouts = sample_completions(model, tokenizer, prompts, spec, samples=1, seed=0)
    except UserError as error:
        log.warning("no replies of the model are recorded: %s", error)
        return
    for seed, rollout in enumerate(rollouts):
        row = {
            "step": step,
            "split": before_or_after,
            "seed": seed,
            "messages": rollout.conversation,
        }
        run.write_sample(row)
