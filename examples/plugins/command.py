"""A command: ``rlhf longest RUN`` prints the longest completion in the samples of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.common.files import read_jsonl
from rlhf.plugins import register_command

plugin_api = 1


@dataclass(frozen=True)
class LongestConfig:
    """Configuration of `rlhf longest`."""

    directory: str
    """Directory of the run."""


@register_command("longest", "print the longest completion of a run", arguments=("directory",))
def longest(config: LongestConfig) -> Iterator[str]:
    """Yield the completion."""
    samples = read_jsonl(Path(config.directory) / "samples.jsonl")
    yield max((row["messages"][-1]["content"] for row in samples), key=len)
