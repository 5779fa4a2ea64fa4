"""Replace the ids of annotators by pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.data.labels import label_id_of, live_labels
from rlhf.errors import UserError

_MIN_KEY_CHARACTERS = 16


def pseudonym_of(annotator: str, key_file: str | Path) -> str:
    """Return a pseudonym that is always the same for an annotator and a secret key.

    The pseudonym is the start of the HMAC-SHA256 of the annotator's id. Without the key, the id
    cannot be found by trying all possible ids.

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
    """Return the labels that were not undone, with annotators A1, A2, ... in order of appearance.

    The ids of labels and the orders in which replies were shown are computed from the annotator's
    id, so this id could be found by trying all possible ids. Therefore the ids of labels are
    computed from the new names, and the orders are omitted.
    """
    names: dict[str, str] = {}
    return [
        {
            key: value
            for key, value in with_other_annotator(
                row, names.setdefault(row["annotator"], f"A{len(names) + 1}")
            ).items()
            if key not in ("shown_first", "shown_order")
        }
        for row in live_labels(rows)
    ]


def with_other_annotator(row: Mapping[str, Any], annotator: str) -> dict[str, Any]:
    """Return a copy of a label with another annotator and the id that belongs to this annotator.

    The label must not have been undone.
    """
    return {
        **row,
        "label_id": label_id_of(annotator, row["item_id"]),
        "annotator": annotator,
    }
