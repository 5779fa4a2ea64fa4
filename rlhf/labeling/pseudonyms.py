"""Replace the ids of annotators by pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

_MIN_KEY_CHARACTERS = 16


def pseudonym_of(annotator: str, key_file: str | Path) -> str:
    """Return a pseudonym that is always the same for an annotator and a secret key.

    The pseudonym is the start of the HMAC-SHA256 of the annotator's id. Without the key, nobody can
    find the annotator by trying ids.

    Args:
        annotator: The annotator's id.
        key_file: File of the key. If it does not exist, it is created with a random key.

    Raises:
        UserError: The key is too short, or the file is not text.
    """
    path = Path(key_file)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    try:
        key = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"pseudonym_key: {path} is not a text file") from None
    if len(key) < _MIN_KEY_CHARACTERS:
        raise UserError(
            f"pseudonym_key: {path} needs a key of at least {_MIN_KEY_CHARACTERS} characters; "
            "name a new file to create one"
        )
    digest = hmac.new(key.encode(), annotator.encode(errors="backslashreplace"), hashlib.sha256)
    return f"p-{digest.hexdigest()[:12]}"


def with_numbered_annotators(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of labels whose annotators are named A1, A2, ... in the order of appearance."""
    names: dict[str, str] = {}
    return [
        {**row, "annotator": names.setdefault(row["annotator"], f"A{len(names) + 1}")}
        for row in rows
    ]
