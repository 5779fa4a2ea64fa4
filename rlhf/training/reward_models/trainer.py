"""Trainer of the native engine for reward models on decoders, with the Bradley-Terry loss."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.metrics import MetricSums
from rlhf.config.optimization import RewardOptions
from rlhf.models.activation_checkpointing import checkpoint_activations
from rlhf.models.architecture import is_adapter_weight, trunk_of, unwrap_peft
from rlhf.models.fast.packing import count_computed_tokens, flat_states_and_token_index, packs_rows
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.saving import restore_model, save_model
from rlhf.models.sharding.modules import ShardedModules
from rlhf.reward_models.losses import add_centering_penalty, bradley_terry_loss
from rlhf.training.dpo import pair_metric_sums
from rlhf.training.supervised import SupervisedTrainer


class TrainableRewardModel:
    """A decoder in training as a reward model. Its output at the last token is the score."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.sharding: ShardedModules | None = None
        self.supports_packing = enable_fast_paths(model)

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules with trained parameters, by name."""
        return {"model": self.model}

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def checkpoint_activations(self) -> None:
        """Recompute the activations of the decoder in backward passes from now on."""
        checkpoint_activations(trunk_of(self.model))

    def shard(self) -> None:
        """Shard the weights of the decoder over all processes.

        Every process must call this method, before an optimizer is made. The head and adapters,
        which are small, are not sharded.
        """
        inner, trunk = unwrap_peft(self.model), trunk_of(self.model)
        in_trunk = {p for name, p in trunk.named_parameters() if not is_adapter_weight(name)}
        self.sharding = ShardedModules(
            {"model": inner},
            (trunk,),
            replicated=[p for p in inner.parameters() if p not in in_trunk],
            device=self.device,
        )

    def save(self, directory: Path, *, base: Path | None = None) -> None:
        """Write the model to a folder that ``from_pretrained`` can load.

        Args:
            directory: The folder.
            base: See ``save_model``.
        """
        save_model(self.model, self.tokenizer, directory, base=base)

    def restore(self, directory: Path) -> None:
        """Load the weights, in place, from a folder that ``save`` wrote."""
        restore_model(self.model, directory)

    def count_computed_tokens(self, tokens: Tensor, attention_mask: Tensor) -> int:
        """Return the number of tokens in a forward pass over a batch.

        Without packing, padding is included. With packing, shared prefixes count once.
        """
        packed = self.packs_rows(attention_mask.sum(1))
        return count_computed_tokens(tokens, attention_mask, packed=packed)

    def packs_rows(self, row_lengths: Tensor) -> bool:
        """Return whether a forward pass packs rows with these lengths [B]."""
        return packs_rows(trunk_of(self.model), row_lengths)

    def score(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the score of each text, [B], with gradients.

        Args:
            tokens: [B, T] token ids, padded on the right.
            attention_mask: [B, T], True for tokens that are not padding.
        """
        score = functools.partial(self._score, tokens, attention_mask)
        return score() if self.sharding is None else self.sharding.run(score)

    def _score(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the result of `score`.

        If the model is sharded, `ShardedModules.run` calls this method.
        """
        hidden, index = flat_states_and_token_index(self.model, tokens, attention_mask)
        last = index.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        return self.model.score(hidden.index_select(0, last))[:, 0]


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model with one output on pairs, with the Bradley-Terry loss."""

    options: RewardOptions
    model: TrainableRewardModel
    model_class = TrainableRewardModel
    with_margins = True

    def loss_denominators(self, batch: TrainingBatch) -> Tensor:
        """Return the denominator of the loss, which is the number of pairs in the batch."""
        return batch.require("chosen").sum()

    def loss(
        self, micro_batch: TrainingBatch, *, denominators: Tensor
    ) -> tuple[Tensor, MetricSums]:
        scores = self.model.score(micro_batch.tokens, micro_batch.attention_mask)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        losses = bradley_terry_loss(chosen, rejected, margin=micro_batch.require("margins")[::2])
        centering = self.options.center_rewards_coefficient or 0.0
        losses = add_centering_penalty(losses, chosen, rejected, coef=centering)
        return losses.sum() / denominators, pair_metric_sums(losses, chosen, rejected)
