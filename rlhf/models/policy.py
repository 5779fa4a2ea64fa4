"""The policy with its value head, and the frozen reference policy."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from rlhf.models.activation_checkpointing import checkpoint_activations
from rlhf.models.architecture import is_adapter_weight, trunk_of, unwrap_peft
from rlhf.models.fast.chunked_logprobs import target_logprobs_and_entropies
from rlhf.models.fast.packing import count_computed_tokens, flat_states_and_token_index, packs_rows
from rlhf.models.fast.tied_embedding import make_tied_embedding
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.load_balancing import balancing_loss_weight, states_index_and_balancing_loss
from rlhf.models.output_head import (
    copy_head_check_result,
    head_is_weight_product,
    hidden_state_size,
)
from rlhf.models.saving import restore_model, save_model
from rlhf.models.sharding.deferred import deferred_weights_of, device_of
from rlhf.models.sharding.modules import ShardedModules
from rlhf.models.sharding.processes import this_process_writes
from rlhf.models.sharding.saving import write_safetensors
from rlhf.models.sharding.tensors import StoredWeights, WholeTensors, copy_rows
from rlhf.models.trainable import copy_model, make_frozen, make_trainable

VALUE_FILE = "value_head.safetensors"


class TokenLogprobsAndValues(NamedTuple):
    """Outputs of one forward pass over a batch.

    Index t of a [B, T] tensor describes token t. Elements outside the action mask are 0.
    """

    logprobs: torch.Tensor  # [B, T] log p(tokens[t] | tokens[<t])
    entropy: torch.Tensor  # [B, T] entropy of the distribution of token t, in nats
    values: torch.Tensor | None  # [B, T] value of the state before token t
    last_value: torch.Tensor | None  # [B] value of the state after the last token
    balancing_loss: torch.Tensor | None = None  # weighted load-balancing loss, a scalar


class ValueHead(nn.Module):
    """A linear layer from hidden states to values.

    Its weights are initialized to 0, so values are 0 before the first update.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the values [...] of hidden states [..., D]."""
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class Policy:
    """A causal model with its tokenizer, and with a value head if the algorithm has a critic.

    Args:
        model: Causal model.
        tokenizer: Tokenizer of the model, whose pad token differs from EOS.
        critic: "none", "shared" or "separate". With "shared", the value head is on the policy's
            decoder. With "separate", it is on a second decoder, which is initialized as a copy of
            the policy's decoder.
    """

    def __init__(self, model: Any, tokenizer: Any, *, critic: str = "none") -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = device_of(model)
        self.sharding: ShardedModules | None = None
        self.supports_packing = enable_fast_paths(model)
        self.balancing_loss_weight = balancing_loss_weight(model)
        self.value_head: ValueHead | None = None
        self.value_trunk: nn.Module | None = None
        if critic != "none":
            width = hidden_state_size(model)
            self.value_head = ValueHead(width).to(self.device, self.logprob_dtype)
        if critic == "separate":
            # All parameters of the critic are trained, even if the policy has adapters.
            self.value_trunk = make_trainable(copy_model(trunk_of(model)))

    @property
    def is_lora(self) -> bool:
        """Whether the policy has LoRA adapters, which are trained instead of the base weights."""
        return self.model is not unwrap_peft(self.model)

    @property
    def logprob_dtype(self) -> torch.dtype:
        """Dtype of log-probabilities and values: float32, or float64 for a float64 model."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def checkpoint_activations(self) -> None:
        """Recompute the activations of the policy and of a separate critic in backward passes."""
        for trunk in (trunk_of(self.model), self.value_trunk):
            if trunk is not None:
                checkpoint_activations(trunk)

    def shard(self) -> None:
        """Shard the weights over all processes; load the rows of this process if necessary.

        Every process must call this method, before an optimizer is made. Value heads and adapters,
        which are small, are not sharded.
        """
        inner = unwrap_peft(self.model)
        head_is_weight_product(self.model)  # sharded models cannot be compared with themselves
        make_tied_embedding(self.model)
        critic = () if self.value_trunk is None else (self.value_trunk,)
        adapters = [p for name, p in inner.named_parameters() if is_adapter_weight(name)]
        head = [] if self.value_head is None else self.value_head.parameters()
        trunk_path = next(name for name, m in inner.named_modules() if m is trunk_of(self.model))
        self.sharding = ShardedModules(
            {**self.modules(), "model": inner},
            (trunk_of(self.model), *critic),
            replicated=[*adapters, *head],
            device=self.device,
            deferred=deferred_weights_of(self.model),
            prefixes={"value_trunk": f"{trunk_path}." if trunk_path else ""},
        )
        inner.deferred_weights = None

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which each process holds the whole weights, to sample."""
        if self.sharding is None:
            return contextlib.nullcontext()
        return self.sharding.whole_weights()

    def modules(self) -> dict[str, nn.Module]:
        """Return by name the model and, if they exist, the value head and the critic's decoder."""
        named = {
            "model": self.model,
            "value_head": self.value_head,
            "value_trunk": self.value_trunk,
        }
        return {name: module for name, module in named.items() if module is not None}

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters that require gradients."""
        parameters = (p for module in self.modules().values() for p in module.parameters())
        return [p for p in parameters if p.requires_grad]

    def score(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        action_mask: torch.Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
        with_balancing_loss: bool = False,
    ) -> TokenLogprobsAndValues:
        """Compute log-probabilities, entropies and values of the sampled tokens of a batch.

        If the policy is sharded, every process must call this method.

        Args:
            tokens: [B, T], padded on the right.
            attention_mask: [B, T], True for tokens that are not padding.
            action_mask: [B, T], True for sampled tokens. It must be False at position 0.
            temperature: Sampling temperature of the tokens.
            with_entropy: Whether to compute entropies. If False, they are 0, and the computation is
                faster.
            with_balancing_loss: Whether to compute the load-balancing loss if the model's
                configuration enables it. If it is computed, rows are padded instead of packed.
        """
        score = functools.partial(
            self._score,
            tokens,
            attention_mask,
            action_mask,
            temperature=temperature,
            with_entropy=with_entropy,
            with_balancing_loss=with_balancing_loss,
        )
        return score() if self.sharding is None else self.sharding.run(score)

    def _score(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        action_mask: torch.Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        with_balancing_loss: bool,
    ) -> TokenLogprobsAndValues:
        """Compute the result of `score`.

        If the policy is sharded, the weights outside the transformer blocks must be gathered, as
        in `ShardedModules.run`.
        """
        tied, balance = make_tied_embedding(self.model), None
        if with_balancing_loss and self.balancing_loss_weight:
            hidden, index, balance = states_index_and_balancing_loss(
                self.model, tokens, attention_mask, tied=tied
            )
            balance = self.balancing_loss_weight * balance
        else:
            hidden, index = flat_states_and_token_index(
                self.model, tokens, attention_mask, tied=tied
            )
        before = index[:, :-1][action_mask[:, 1:]]  # state after token t-1, which predicts token t
        selected, entropies = target_logprobs_and_entropies(
            self.model,
            hidden.index_select(0, before),
            tokens[action_mask],
            temperature=temperature,
            with_entropy=with_entropy,
            head_weight=tied.head if tied else None,
        )
        logprobs = _scatter_to_actions(selected, action_mask)
        entropy = _scatter_to_actions(entropies, action_mask)
        if self.value_head is None:
            return TokenLogprobsAndValues(logprobs, entropy, None, None, balance)
        if self.value_trunk:
            hidden, _ = flat_states_and_token_index(
                self.model, tokens, attention_mask, trunk=self.value_trunk
            )
        values = _scatter_to_actions(self.value_head(hidden.index_select(0, before)), action_mask)
        last = index.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        end = self.value_head(hidden.index_select(0, last))
        return TokenLogprobsAndValues(logprobs, entropy, values, end, balance)

    def count_computed_tokens(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Return the number of tokens in a forward pass over a batch (see ``packing``)."""
        packed = self.packs_rows(attention_mask.sum(1))
        return count_computed_tokens(tokens, attention_mask, packed=packed)

    def packs_rows(self, row_lengths: torch.Tensor) -> bool:
        """Return whether a forward pass packs rows with these lengths [B]."""
        return packs_rows(trunk_of(self.model), row_lengths)

    def save(self, directory: Path, *, base: Path | None = None) -> None:
        """Write a folder that ``from_pretrained`` can load. The critic is in a separate file.

        Args:
            directory: The folder.
            base: See `save_adapter`.

        If the policy is sharded, every process must call this method, and the first one writes.
        """
        save_model(self.model, self.tokenizer, directory, base=base)
        if self.value_head is not None:
            parts = {"head": self.value_head, "trunk": self.value_trunk}
            state = {
                f"{part}.{name}": weight
                for part, module in parts.items()
                if module is not None
                for name, weight in module.state_dict(keep_vars=True).items()
            }
            if self.sharding is None:
                tensors = {name: weight.detach().contiguous() for name, weight in state.items()}
                save_file(tensors, directory / VALUE_FILE)
            else:
                writes = this_process_writes(self.model)
                write_safetensors(directory / VALUE_FILE, WholeTensors(state), writes=writes)

    def restore(self, directory: Path) -> None:
        """Load the weights that ``save`` wrote, in place."""
        restore_model(self.model, directory)
        self.restore_critic(directory)

    def restore_critic(self, directory: Path) -> None:
        """Load the weights of the critic that ``save`` wrote, in place, if the policy has one."""
        if self.value_head is None:
            return
        stored = StoredWeights(directory, VALUE_FILE)
        parts = {"head.": self.value_head, "trunk.": self.value_trunk}
        for prefix, module in parts.items():
            if module is not None:
                for name, weight in module.state_dict(keep_vars=True).items():
                    copy_rows(weight, stored, prefix + name)


def _scatter_to_actions(values: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """Return a [B, T] tensor with values [N] at the masked tokens and 0 elsewhere."""
    zeros = torch.zeros(action_mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(action_mask, values)


class ReferencePolicy:
    """The frozen policy from the start of training. The KL of the policy from it is 0 at step 0.

    The weights are copied from the policy's model. With LoRA, the policy's own model with disabled
    adapters is used instead, which needs no additional memory.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        if not policy.is_lora:
            model = make_frozen(copy_model(policy.model))
            copy_head_check_result(policy.model, model)
            self.policy = Policy(model, policy.tokenizer)

    def shard(self) -> None:
        """Shard the weights over all processes, unless they are those of the policy's model."""
        if not self.policy.is_lora:
            self.policy.shard()

    @torch.no_grad()
    def logprobs(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        action_mask: torch.Tensor,
        *,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Return the log-probabilities [B, T] of the sampled tokens under the reference policy.

        They are 0 for other tokens; see `Policy.score`.
        """
        model = self.policy.model
        base = model.disable_adapter() if self.policy.is_lora else contextlib.nullcontext()
        with base:
            scored = self.policy.score(
                tokens, attention_mask, action_mask, temperature=temperature, with_entropy=False
            )
        return scored.logprobs
