"""Configuration of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from rlhf.common.ranges import FractionBelowOne, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class ScratchSpec:
    """A small Llama model with random weights.

    Its tokenizer is a byte-level BPE that is trained on texts of the task.
    """

    hidden_size: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """Width of the residual stream."""
    num_layers: Annotated[int, Interval(ge=1, le=1024)] = 2
    """Number of transformer blocks."""
    num_heads: Annotated[int, Interval(ge=1, le=1024)] = 4
    """Number of attention heads; must divide hidden_size."""
    context: Annotated[int, Interval(ge=1, le=2**20)] = 256
    """Maximum length of a sequence, in tokens."""
    vocab_size: Annotated[int, Interval(ge=300, le=2**20)] = 512
    """Upper bound on the tokenizer's vocabulary: 256 bytes, special tokens, and merges."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights. 0.02 suits wide models; narrow models learn to
    attend to earlier tokens in fewer steps with about 1 / sqrt(hidden_size)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.scratch.hidden_size must be a multiple of num_heads, "
                f"got {self.hidden_size} and {self.num_heads}"
            )


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Interval(ge=1, le=65_536)] = 16
    """Rank of the low-rank update of each weight."""
    alpha: PositiveInt = 32
    """The low-rank update is multiplied by alpha / rank."""
    dropout: FractionBelowOne = 0.0
    """Dropout probability of the adapter's input in the training of SFT and reward models. Other
    commands compare log-probabilities of two forward passes and do not use dropout."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the modules with adapters, e.g. [q_proj, v_proj]; empty: every linear layer except
    the output head."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules whose weights are all trained and are saved with the adapters, e.g.
    [lm_head]. PEFT matches the end of a name: norm also matches input_layernorm."""
    use_dora: bool = False
    """Train the magnitude of each weight separately from its direction (DoRA, Liu et al. 2024,
    arXiv:2402.09353)."""
    use_rslora: bool = False
    """Multiply the update by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if both := set(self.target_modules) & set(self.modules_to_save):
            raise ValueError(
                f"model.lora: {min(both)} is in both target_modules and modules_to_save; list it "
                "in only one of them"
            )


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model, or a new model with random weights."""

    path: str | None = None
    """Hub id, folder, GGUF file, short name (`rlhf models list`), or `stage:NAME` in a pipeline."""
    scratch: ScratchSpec | None = None
    """Create a small model instead of loading one."""
    lora: LoraSpec | None = None
    """Train adapters instead of the weights of the model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; saved with the model."""
    fold_system: bool = False
    """Prepend the system message to the first user turn, for chat templates without a system role.
    This setting is saved with the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights. auto: bfloat16 with float32 master weights if bf16 matmul is
    native and the model is large enough to benefit, else float32. float16 is supported for
    evaluation and generation only, because gradients underflow."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; None: its main branch."""
    attn_implementation: str | None = None
    """transformers attention implementation used for training and scoring, e.g. eager or sdpa;
    None: this toolkit's packed attention if the model supports it, else transformers' default."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("model: give either model.path or model.scratch")
        if self.scratch and self.revision:
            raise ValueError("model.revision has no effect with model.scratch")
        if self.scratch and self.lora:
            raise ValueError(
                "model.lora cannot be combined with model.scratch: all weights of a model with "
                "random weights must be trained; remove model.lora"
            )
