"""Configuration of `rlhf export`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from rlhf.common.languages import check_languages
from rlhf.common.ranges import PositiveFloat
from rlhf.config.base import CommandConfig

CONVERTED_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that llama.cpp's converter writes; the other types need llama-quantize."""

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""Form of the names of licenses on the Hugging Face Hub."""

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]


@dataclass(frozen=True)
class GGUFSpec:
    """Conversion to GGUF files with the programs of llama.cpp."""

    converter: str
    """Path of llama.cpp's convert_hf_to_gguf.py, or of a llama.cpp checkout that contains it."""
    types: list[GGUFType] = field(default_factory=lambda: ["f16"])
    """Types of the weights; a file is written for each type."""
    quantizer: str | None = None
    """Path of llama.cpp's llama-quantize, which the types q6_k, q5_k_m and q4_k_m need."""

    def __post_init__(self) -> None:
        if not self.types:
            raise ValueError("gguf.types is empty: give at least one type, such as f16")
        if len(set(self.types)) < len(self.types):
            raise ValueError(f"gguf.types: each type must occur once, got {', '.join(self.types)}")
        quantized = [name for name in self.types if name not in CONVERTED_TYPES]
        if quantized and self.quantizer is None:
            raise ValueError(
                f"gguf.types: {quantized[0]} needs gguf.quantizer, the path of llama.cpp's "
                "llama-quantize"
            )
        if self.quantizer is not None and not quantized:
            raise ValueError(
                "gguf.quantizer has no effect: the converter writes "
                f"{', '.join(self.types)} without it"
            )


@dataclass(frozen=True)
class ExportConfig(CommandConfig):
    """Configuration of `rlhf export`: a trained model, and the folder of the export."""

    source: str
    """Run directory, checkpoint of a run, or folder of a model or a LoRA adapter."""
    target: str
    """Folder to write. Its name is the name of the model in the cards."""
    overwrite: bool = False
    """Replace an earlier export in the folder ``target``."""
    evaluations: list[str] = field(default_factory=list)
    """Further results for the model card: folders with a summary.json, such as
    runs/evaluate/evaluation/ppo."""
    license: str | None = None
    """License of the model for the card, as the Hub writes it, such as apache-2.0. By default, that
    of the base model if `rlhf models list` states it."""
    language: list[str] = field(default_factory=list)
    """Languages of the training data for the card: codes of ISO 639 such as en, tags of BCP 47 such
    as pt-BR, multilingual or code."""
    power_watts: PositiveFloat | None = None
    """Power in watts that the devices of a run draw together, for the estimate of energy. By
    default, the power limits of the GPUs, if the run recorded them."""
    gguf: GGUFSpec | None = None
    """Also write GGUF files, for llama.cpp."""
    onnx: bool = False
    """Also write model.onnx, if its logits in onnxruntime differ by at most 1e-4 from those of
    PyTorch. The extra `onnx` installs the packages."""
    validate: bool = False
    """Have the Hugging Face Hub (HF_ENDPOINT) check the metadata of the cards."""
    push: str | None = None
    """Upload the export to this repository on the Hugging Face Hub (OWNER/NAME). The cards are
    checked first."""
    private: bool = True
    """Create the repository of ``push`` as a private one."""

    def __post_init__(self) -> None:
        check_languages(self.language, "language")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            spelled = self.license.strip().lower().replace(" ", "-")
            hint = f"; did you mean {spelled!r}?" if _LICENSE.fullmatch(spelled) else ""
            raise ValueError(
                f"license: {self.license!r} is not a license as the Hugging Face Hub writes it, "
                f"such as apache-2.0{hint}"
            )
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"push must be OWNER/NAME, got {self.push!r}")
        if not self.private and self.push is None:
            raise ValueError("private has no effect without push: set push to OWNER/NAME")
