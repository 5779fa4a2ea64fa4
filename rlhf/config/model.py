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
    """Maximum size of the tokenizer's vocabulary, which includes 256 bytes, special tokens and
    merges."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights. 0.02 is suitable for wide models. With about 1 /
    sqrt(hidden_size), narrow models learn in fewer steps to attend to earlier tokens."""

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
    """Dropout probability of the adapter's input in `rlhf sft` and `rlhf reward`. Other training
    commands compare log-probabilities of two forward passes, so they do not use dropout."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the modules with adapters, e.g. [q_proj, v_proj]. By default, every linear layer
    except the output head has an adapter."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules, e.g. [lm_head], whose weights are fully trained and are saved with the
    adapters. PEFT compares the end of a module's name, so norm also selects input_layernorm."""
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
    """Id on the Hugging Face Hub, folder, GGUF file, short name (`rlhf models list`), or
    `stage:NAME` in a pipeline."""
    scratch: ScratchSpec | None = None
    """Create a small model with random weights instead of loading a model."""
    lora: LoraSpec | None = None
    """Train low-rank adapters instead of all weights of the model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; saved with the model."""
    fold_system: bool = False
    """Prepend the system message to the first user turn, for chat templates without a system role.
    This setting is saved with the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights. auto: bfloat16 with float32 master weights if the hardware supports
    bf16 matrix products and the model is large enough for a higher speed, otherwise float32.
    float16 is only supported for evaluation and generation, because gradients would underflow."""
    revision: str | None = None
    """Branch, tag or commit of the repository on the Hugging Face Hub; the default is the main
    branch."""
    attn_implementation: str | None = None
    """Attention implementation of Transformers for training and log-probabilities, e.g. eager or
    sdpa. By default, the packed attention of this toolkit is used if the model supports it, and
    the default of Transformers otherwise."""

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
