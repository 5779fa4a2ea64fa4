"""Read and write ``reward_model.json``, the description of a reward checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rlhf.common.files import read_json, write_text
from rlhf.common.ranges import PositiveInt, convert_to_type
from rlhf.errors import UserError

FILE_NAME = "reward_model.json"


@dataclass(frozen=True)
class Sidecar:
    """Description of a reward checkpoint: encoding of texts, pooling and calibration.

    The file is next to the weights, which can be loaded without it.

    Raises:
        UserError: A value is outside its range, or only one of ``mean`` and ``std`` is given.
    """

    template_hash: str
    """Hash of the chat template, its options and EOS, from `chat_template.template_hash`."""
    append_eos: bool
    """Whether every text ends with EOS."""
    max_length: PositiveInt | None
    """Maximum number of tokens. Longer texts are truncated on the left. None means no limit."""
    pooling: str
    """With ``last``, the head reads the last token. With ``model``, the model's own pooling is
    used. With ``steps``, the head reads the token that ends each step."""
    temperature: float = 1.0
    """Temperature T, fitted on held-out pairs: P(a is better than b) =
    sigmoid((score(a) - score(b)) / T)."""
    mean: float | None = None
    """Mean raw score on samples of the reference policy."""
    std: float | None = None
    """Standard deviation of the raw score on samples of the reference policy."""
    kind: str = "learned"
    """Kind of the reward in a configuration, such as "learned" or "cost"."""
    scope: str = "conversation"
    """With ``conversation``, the model scores the whole conversation. With ``reply``, it was
    trained on texts without prompts and scores only the last reply."""
    separator: str | None = None
    """Text that ends each step of a solution; only process rewards have it."""

    def __post_init__(self) -> None:
        if self.pooling not in ("last", "model", "steps"):
            raise UserError(f"pooling must be last, model or steps, got {self.pooling!r}")
        if self.scope not in ("conversation", "reply"):
            raise UserError(f"scope must be 'conversation' or 'reply', got {self.scope!r}")
        if not self.temperature > 0:
            raise UserError(f"temperature must be > 0, got {self.temperature}")
        if (self.mean is None) != (self.std is None):
            raise UserError(f"{FILE_NAME}: set both mean and std, or neither")
        if self.std is not None and not self.std > 0:
            raise UserError(f"std must be > 0, got {self.std}")

    def write(self, checkpoint: str | Path) -> Path:
        """Write this sidecar into the folder ``checkpoint`` and return its path."""
        path = Path(checkpoint) / FILE_NAME
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, checkpoint: str | Path) -> Sidecar | None:
        """Return the sidecar of the folder ``checkpoint``, or None if there is none.

        Raises:
            UserError: The file is not a JSON object, has missing or unknown keys, or has a value of
                another type or outside its range.
        """
        path = Path(checkpoint) / FILE_NAME
        if not path.is_file():
            return None
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} is not a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        required = {"template_hash", "append_eos", "max_length", "pooling"}
        if not required <= set(content) <= known:
            odd = sorted(required - set(content)) + sorted(set(content) - known)
            raise UserError(f"{path} has missing or unknown keys: {', '.join(odd)}")
        try:
            return convert_to_type(cls, content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
