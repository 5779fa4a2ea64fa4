"""Ensembles of reward models: mean, minimum, or mean minus a penalty on their variance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from rlhf.errors import UserError
from rlhf.reward_models.checkpoint import call_loader
from rlhf.reward_models.core import (
    Conversation,
    Reward,
    Score,
    Scores,
    check_unique_names,
    merged_components_counts_reasons,
)
from rlhf.reward_models.generic_heads import classifier_class
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.sidecar import Sidecar

_METHODS = ("mean", "worst", "uncertainty")


@dataclasses.dataclass(frozen=True)
class ScoreCombination:
    """A rule that combines M scores of one text into one score (Coste et al., 2310.02743).

    ``how`` is ``mean``, ``worst`` (the minimum, WCO) or ``uncertainty`` (mean - penalty * variance,
    UWO). The variance is the population variance (ddof=0), and the disagreement is the standard
    deviation. Published code uses ddof=0 or ddof=1, so penalties are not directly comparable.

    Raises:
        UserError: ``how`` is unknown, or ``penalty`` is negative.
    """

    how: str = "mean"
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if self.how not in _METHODS:
            raise UserError(f"ensemble: how must be one of {', '.join(_METHODS)}, got {self.how!r}")
        if self.penalty < 0:
            raise UserError(f"ensemble: penalty must be >= 0, got {self.penalty}")

    def __call__(self, columns: Sequence[Sequence[Score]]) -> tuple[list[Score], list[Score]]:
        """Return the combined scores [N] and the disagreement [N] of N texts.

        ``columns`` are the scores of M members, [M, N]. If a member's score of a text is None, the
        combined score and the disagreement of this text are nan.
        """
        scores = np.array(columns, dtype=float).T.copy()  # contiguous rows [N, M]; None becomes nan
        values = scores.min(1) if self.how == "worst" else scores.mean(1)
        if self.how == "uncertainty":
            values = values - self.penalty * scores.var(1)
        return values.tolist(), scores.std(1).tolist()


class Ensemble(Reward):
    """Several rewards combined into one reward by a :class:`ScoreCombination`.

    The components are ``NAME.COMPONENT`` for each component of the members, the combined score
    ``NAME``, and ``NAME.disagreement``. The scores of the members should have the same scale, so
    normalize each member on samples of the reference policy first.

    Raises:
        UserError: There are fewer than two members, or two leaves have the same name.
    """

    def __init__(
        self,
        members: Sequence[Reward],
        *,
        how: str = "mean",
        penalty: float = 0.1,
        name: str = "ensemble",
    ):
        if len(members) < 2:
            raise UserError(f"ensemble: at least two members are required, got {len(members)}")
        self.inner_rewards, self.name = tuple(members), name
        self.combine = ScoreCombination(how, penalty)
        check_unique_names([leaf for member in members for leaf in member.leaves()])

    @classmethod
    def load(
        cls,
        paths: Sequence[str],
        *,
        how: str = "mean",
        penalty: float = 0.1,
        own_scale: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> Ensemble:
        """Load an ensemble of the checkpoints at ``paths``, named ``member0``, ``member1``, ...

        If ``own_scale`` is set, the scores of each member are normalized by the mean and the
        standard deviation in its sidecar. :class:`ScoreCombination` describes ``how`` and
        ``penalty``; :meth:`LearnedReward.load` describes the other arguments.
        """
        members: list[Reward] = []
        for i, path in enumerate(paths):
            member = LearnedReward.load(path, device=device, dtype=dtype, batch_size=batch_size)
            member.name = f"member{i}"
            members.append(member.normalize() if own_scale else member)
        return cls(members, how=how, penalty=penalty)

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        results = [member.score(conversations) for member in self.inner_rewards]
        values, disagreement = self.combine([result.values for result in results])
        of_members, counts, reasons = merged_components_counts_reasons(results)
        components = {f"{self.name}.{name}": column for name, column in of_members.items()}
        components |= {self.name: values, f"{self.name}.disagreement": disagreement}
        return Scores(values, components, counts, reasons)


class HeadEnsemble(Reward):
    """An ensemble whose members are the outputs of one checkpoint, computed in one forward pass.

    The components are ``NAME.OUTPUT``, the combined score ``NAME``, and ``NAME.disagreement``.

    Args:
        inner: Checkpoint that is loaded with ``attributes``, which name the members.
        how: See :class:`ScoreCombination`.
        penalty: See :class:`ScoreCombination`.
        name: Name of the component with the combined score.

    Raises:
        UserError: ``attributes`` name fewer than two outputs.
    """

    def __init__(
        self,
        inner: LearnedReward,
        *,
        how: str = "mean",
        penalty: float = 0.1,
        name: str = "ensemble",
    ):
        self.inner, self.inner_rewards, self.name = inner, (inner,), name
        self.combine = ScoreCombination(how, penalty)
        if len(inner.parts) < 2:
            raise UserError("heads: the checkpoint must have at least two heads")

    @classmethod
    def load(
        cls, path: str, *, how: str = "mean", penalty: float = 0.1, device: str | None = None
    ) -> HeadEnsemble:
        """Load the ensemble of all heads of the checkpoint at ``path``."""
        return cls(
            LearnedReward.load(path, attributes="all", device=device), how=how, penalty=penalty
        )

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        inner = self.inner.score(conversations)
        columns = {
            f"{self.name}.{k}": inner.components[f"{self.inner.name}.{k}"] for k in self.inner.parts
        }
        values, disagreement = self.combine(list(columns.values()))
        columns |= {self.name: values, f"{self.name}.disagreement": disagreement}
        return Scores(values, columns, inner.counts, inner.reasons)


def average_weights(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Average the weights of checkpoints and save the result as a checkpoint (WARM, 2401.12187).

    The checkpoints must have the same base model and encode text in the same way. The tokenizer and
    the sidecar are copied from the first checkpoint, but the calibration in the sidecar is reset.
    Scoring with the averaged model needs one forward pass, but gives no disagreement.

    Returns:
        The path ``output``.

    Raises:
        UserError: There are fewer than two checkpoints, or they differ in the shapes of their
            parameters or in the encoding of texts.
        FileExistsError: ``output`` is not empty.
    """
    output = Path(output)
    if len(paths) < 2:
        raise UserError("average_weights needs at least two checkpoints")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another folder")
    sidecars = [Sidecar.read(path) for path in paths]
    keys = ("template_hash", "append_eos", "max_length", "pooling", "scope", "separator")
    if len({s and tuple(getattr(s, key) for key in keys) for s in sidecars}) > 1:
        raise UserError(
            f"the checkpoints encode texts differently: {', '.join(keys)} in their "
            "reward_model.json must be equal"
        )
    models = [
        call_loader(call_loader(classifier_class, path).from_pretrained, path) for path in paths
    ]
    _average_into_first(models)
    models[0].save_pretrained(output)
    AutoTokenizer.from_pretrained(paths[0]).save_pretrained(output)
    if sidecars[0] is not None:
        dataclasses.replace(sidecars[0], temperature=1.0, mean=None, std=None).write(output)
    return output


def _average_into_first(models: Sequence[PreTrainedModel]) -> None:
    """Replace the floating-point weights of the first model by the means over all models.

    Raises:
        UserError: The models differ in the names or shapes of their parameters.
    """
    states = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            "the parameter names or shapes of the checkpoints differ; averaging needs checkpoints "
            "of the same architecture"
        )
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name].double() for state in states]).mean(0))
