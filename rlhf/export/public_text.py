"""Remove local paths and secrets from the text of cards, which are published."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from rlhf.common.text import SECRET_KEY, SECRET_MASK, mask_secrets

_PATH_IN_TEXT = re.compile(
    r"(?<![\w./\\<~-])"  # neither a URL, nor a fraction, nor the end tag of HTML
    r"(?:file://)?"
    r"(?:~[^\s/\\]*[/\\]|[A-Za-z]:[\\/]|/[^\s/'\"`<>|,;()\[\]{}]+/|\\\\)"
    r"(?:[^\s/\\'\"`<>|,;()\[\]{}]+[/\\])*"
    r"(?P<name>[^\s/\\'\"`<>|,;()\[\]{}]*)"
)
"""Pattern of an absolute path with at least two components, or of a path in a home folder."""
_ABSOLUTE = re.compile(r"(?:file://)?(?:[~/]|[A-Za-z]:[\\/]|\\\\).*[/\\][^/\\]")
"""Pattern of the start of a text that begins like an absolute path."""
_UNINFORMATIVE_NAMES = frozenset({"final", "best", "checkpoints"})
"""Names of subfolders of a run. The name of the run is shown instead."""


def without_paths_and_secrets(text: str) -> str:
    """Return a text in which absolute paths are replaced by their last component.

    Secrets are masked, see `rlhf.common.text.mask_secrets`.

    >>> without_paths_and_secrets("rows of /home/ann/data/rows.jsonl, see https://example.org/a/b")
    'rows of rows.jsonl, see https://example.org/a/b'
    """
    masked = mask_secrets(text)
    return _PATH_IN_TEXT.sub(lambda match: match["name"] or "…", masked)


def public_name(path: str) -> str:
    """Return the name of a local file or folder in a card: the last component of its path.

    For a subfolder of a run with a model, such as `final` or a checkpoint, the result is the name
    of the run.

    >>> public_name("/home/ann/runs/sft/final")
    'sft'
    """
    pure = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    parts = [part for part in pure.parts if part != pure.anchor]
    while len(parts) > 1 and (
        parts[-1] in _UNINFORMATIVE_NAMES or parts[-1].startswith(("step-", "checkpoint-"))
    ):
        parts.pop()
    return parts[-1] if parts else "…"


def config_without_paths_and_secrets(tree: Any, local: Collection[str], key: str = "") -> Any:
    """Return a copy of a configuration without local paths and secrets.

    Args:
        tree: The configuration, as plain data.
        local: Dotted keys whose values are paths of local files or folders.
        key: Dotted key of ``tree``.
    """
    if isinstance(tree, Mapping):
        return {
            without_paths_and_secrets(str(name)): config_without_paths_and_secrets(
                value, local, f"{key}.{name}" if key else str(name)
            )
            for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [
            config_without_paths_and_secrets(value, local, f"{key}.{index}" if key else str(index))
            for index, value in enumerate(tree)
        ]
    if not isinstance(tree, str):
        return tree
    if tree and SECRET_KEY.fullmatch(key.rpartition(".")[2]):
        return SECRET_MASK
    is_path = key in local or ("\n" not in tree and _ABSOLUTE.match(tree) is not None)
    return public_name(tree) if is_path else without_paths_and_secrets(tree)
