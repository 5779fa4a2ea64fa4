"""Several reward models as one: mean, worst case, or mean minus their disagreement."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from rlhf.reward_models.checkpoint import read
from rlhf.reward_models.core import Conversation, Reward, Score, Scores, check_names, first_reasons
from rlhf.reward_models.generic_heads import sequence_classifier
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.sidecar import Sidecar

_HOW = ("mean", "worst", "uncertainty")


@dataclasses.dataclass(frozen=True)
class Combine:
    """How M scores of one text become one (Coste et al., 2310.02743).

    ``mean``; ``worst``, the minimum (WCO); ``uncertainty``, mean - penalty * variance (UWO). The
    variance divides by M (ddof=0): published code uses both conventions, and a penalty means
    something else in each. Disagreement is the standard deviation, likewise.
    """

    how: str = "mean"
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if self.how not in _HOW:
            raise ValueError(f"ensemble: how must be one of {', '.join(_HOW)}, got {self.how!r}")
        if self.penalty < 0:
            raise ValueError(f"ensemble: penalty must be >= 0, got {self.penalty}")

    def __call__(self, columns: Sequence[Sequence[Score]]) -> tuple[list[Score], list[Score]]:
        """Combined scores [N] and disagreement [N] of M columns of N scores."""
        values: list[Score] = []
        disagreement: list[Score] = []
        for row in zip(*columns, strict=True):
            known = [score for score in row if score is not None]
            complete = len(known) == len(row)
            values.append(self._one(np.array(known)) if complete else None)
            disagreement.append(float(np.std(known)) if complete else None)
        return values, disagreement

    def _one(self, row: np.ndarray) -> float:
        if self.how == "worst":
            return float(row.min())
        return float(row.mean() - (self.penalty * row.var() if self.how == "uncertainty" else 0.0))


class Ensemble(Reward):
    """Rewards that score the same conversations, combined into one; see :class:`Combine`.

    Components: every member, the ensemble, and ``<name>.disagreement``. Members should share a
    scale: normalise each on samples of the reference policy first.
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
            raise ValueError(f"ensemble: needs at least two members, got {len(members)}")
        self.members, self.name = list(members), name
        self.combine = Combine(how, penalty)
        check_names([leaf for member in members for leaf in member.leaves()])

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
        """An ensemble of the checkpoints at ``paths``, named ``member0``, ``member1``, ...

        ``own_scale`` normalises each by its checkpoint's own reference mean and std.
        """
        members: list[Reward] = []
        for i, path in enumerate(paths):
            member = LearnedReward.load(path, device=device, dtype=dtype, batch_size=batch_size)
            member.name = f"member{i}"
            members.append(member.normalise() if own_scale else member)
        return cls(members, how=how, penalty=penalty)

    def checkpoints(self) -> tuple[LearnedReward, ...]:
        return tuple(found for member in self.members for found in member.checkpoints())

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        results = [member.score(conversations) for member in self.members]
        values, disagreement = self.combine([result.values for result in results])
        components = {k: v for result in results for k, v in result.components.items()}
        components |= {self.name: values, f"{self.name}.disagreement": disagreement}
        counts = sum((r.counts for r in results), Counter())
        return Scores(values, components, counts, first_reasons(results))


class HeadEnsemble(Reward):
    """The outputs of one checkpoint with several heads as an ensemble: one backbone, one pass."""

    def __init__(
        self,
        inner: LearnedReward,
        *,
        how: str = "mean",
        penalty: float = 0.1,
        name: str = "ensemble",
    ):
        self.inner, self.name, self.combine = inner, name, Combine(how, penalty)
        if len(inner.parts) < 2:
            raise ValueError("ensemble: a checkpoint needs at least two heads")

    @classmethod
    def load(
        cls, path: str, *, how: str = "mean", penalty: float = 0.1, device: str | None = None
    ) -> HeadEnsemble:
        """All heads of the checkpoint at ``path``."""
        return cls(
            LearnedReward.load(path, attributes="all", device=device), how=how, penalty=penalty
        )

    def checkpoints(self) -> tuple[LearnedReward, ...]:
        return (self.inner,)

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        inner = self.inner.score(conversations)
        columns = {
            f"{self.name}.{k}": inner.components[f"{self.inner.name}.{k}"] for k in self.inner.parts
        }
        values, disagreement = self.combine(list(columns.values()))
        columns |= {self.name: values, f"{self.name}.disagreement": disagreement}
        return Scores(values, columns, inner.counts, inner.reasons)


def average_weights(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write the mean of the checkpoints' weights as one checkpoint (WARM, 2401.12187).

    The members must share a base model and the way they read text. The first one's tokenizer and
    sidecar are taken along, its calibration removed, because it described another model. Averaging
    gives one cheap, robust reward and loses the members' disagreement.

    Raises:
        ValueError: fewer than two checkpoints, weights that do not match, or different sidecars.
        FileExistsError: ``output`` is not empty.
    """
    output = Path(output)
    if len(paths) < 2:
        raise ValueError("average_weights needs at least two checkpoints")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another folder")
    sidecars = [Sidecar.read(path) for path in paths]
    policies = {s and (s.template_hash, s.append_eos, s.max_length, s.pooling) for s in sidecars}
    if len(policies) > 1:
        raise ValueError("these checkpoints read text in different ways (reward_model.json)")
    models = [read(read(sequence_classifier, path).from_pretrained, path) for path in paths]
    _average_into_first(models)
    models[0].save_pretrained(output)
    AutoTokenizer.from_pretrained(paths[0]).save_pretrained(output)
    if sidecars[0] is not None:
        dataclasses.replace(sidecars[0], temperature=1.0, mean=None, std=None).write(output)
    return output


def _average_into_first(models: Sequence[PreTrainedModel]) -> None:
    states = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "these checkpoints have different weights; averaging needs one architecture"
        )
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name].double() for state in states]).mean(0))
