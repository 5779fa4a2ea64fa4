"""Describe the meaning of the scores of each kind of reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.reward_models.sidecar import Sidecar

_PAIR = (
    "The output is a score. The model was trained on pairs with the Bradley-Terry loss: the "
    "difference of the scores of two replies to one prompt is the log-odds that the first reply is "
    "preferred. Only differences of scores of replies to the same prompt are meaningful: scores of "
    "different prompts are not comparable, and the score 0 has no meaning."
)

MEANINGS: dict[str, str] = {
    "preference": _PAIR,
    "smoothed": f"{_PAIR} The labels were smoothed, because some pairs have a wrong label.",
    "unbiased": f"{_PAIR} The loss corrects the expected share of pairs with a wrong label.",
    "scaled": f"{_PAIR} Each pair was weighted by the strength of the preference.",
    "length_debiased": (
        f"{_PAIR} A second output learned the effect of the length of the replies, and was removed "
        "after training."
    ),
    "cost": (
        "The output is a cost: a reply with a cost above 0 is predicted to be unsafe, and a higher "
        "cost is worse. Subtract the cost from a reward, or use it as a constraint."
    ),
    "ranking": (
        "The output is a score. The model was trained on rankings with the Plackett-Luce loss: the "
        "scores of the replies to one prompt are the logits of the choice of the best reply. Only "
        "differences of scores of replies to the same prompt are meaningful."
    ),
    "best_of": (
        "The output is a score. The scores of the replies to one prompt are the logits of the "
        "choice of the best reply. Only differences of scores of replies to the same prompt are "
        "meaningful."
    ),
    "pairwise": (
        "The model reads a prompt and two replies in one text, and its output is the log-odds that "
        "the first reply is better. It does not score single replies."
    ),
    "regression": (
        "Each output predicts the rating in one column of the training data, on the scale of that "
        "column (squared-error loss)."
    ),
    "classification": (
        "The model classifies a single text. With two classes, the output is the log-odds of the "
        "second class; with more classes, the outputs are the logits of the classes."
    ),
    "multilabel": (
        "Each output is the log-odds that one label applies to the text. The labels are predicted "
        "separately, so that several or none may apply."
    ),
    "process": (
        "The model reads a solution in steps. At the end of each step, its outputs are the logits "
        "of the classes wrong and correct. Its outputs for tokens inside a step have no meaning."
    ),
}
"""Kind of `rlhf reward` -> meaning of the outputs."""

_KIND_OF_SCORER = {"cost": "cost", "pairwise": "pairwise", "process": "process"}
"""Kind of a sidecar -> kind of `rlhf reward`, if only one kind writes such sidecars."""


def reward_meaning(config: Mapping[str, Any], sidecar: Sidecar | None) -> str:
    """Return a description of the outputs of a reward model.

    Args:
        config: Configuration of the run of `rlhf reward`; empty if there is none.
        sidecar: Description of the reward model, if the folder has one.
    """
    kind = config.get("kind") if config.get("command") == "reward" else None
    if kind is None and sidecar is not None:
        kind = _KIND_OF_SCORER.get(sidecar.kind)
    if kind in MEANINGS:
        meaning = MEANINGS[str(kind)]
    elif kind is not None:
        meaning = f"The kind of the reward model is `{kind}`, which a plug-in defines."
    else:
        meaning = "The folder does not record how the model was trained, so the meaning of its "
        meaning += "outputs is unknown."
    if sidecar is not None and sidecar.kind == "heads":
        meaning += " The outputs are the heads of an ensemble, each trained on a different sample "
        meaning += "of the rows; their mean is the score."
    return meaning


def encoding_and_calibration_facts(sidecar: Sidecar) -> list[tuple[str, str]]:
    """Return (property, value) pairs on the encoding of texts and the calibration of scores."""
    pooling = {
        "last": "the last token of the text",
        "model": "the pooling of the encoder",
        "steps": "the last token of each step",
    }[sidecar.pooling]
    scope = {"conversation": "the whole conversation", "reply": "only the last reply"}
    facts = [
        ("scored text", scope[sidecar.scope]),
        ("the head reads", pooling),
        ("EOS at the end of a text", "yes" if sidecar.append_eos else "no"),
        ("maximum length in tokens", str(sidecar.max_length or "no limit")),
        ("hash of the chat template", sidecar.template_hash),
    ]
    if sidecar.separator is not None:
        facts.append(("end of a step", repr(sidecar.separator)))
    if sidecar.kind not in ("process",):
        facts.append(("fitted temperature", f"{sidecar.temperature:g}"))
    if sidecar.mean is not None and sidecar.std is not None:
        facts.append(("mean score of the reference policy", f"{sidecar.mean:g}"))
        facts.append(("standard deviation of these scores", f"{sidecar.std:g}"))
    return facts
