"""Replace the ids of annotators by pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import add_path_to_write_errors
from rlhf.data.labels import label_id_of, labels_not_undone
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
        _create_key_file(path)
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


def _create_key_file(path: Path) -> None:
    """Create a file with a random key, unless another process creates it at the same time.

    The file is never incomplete, because it gets its name when its content is on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with add_path_to_write_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".key-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(name, path)
            except OSError:  # the file exists, or the file system has no hard links
                if not path.exists():
                    os.rename(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


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
        for row in labels_not_undone(rows)
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
