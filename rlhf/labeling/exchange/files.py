"""Write labels to files of other tools, and read them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.common.files import atomic_path, read_json, write_text
from rlhf.config.data import DataSpec
from rlhf.config.labeling import LabelFormat
from rlhf.data.columns import Row
from rlhf.data.files import read_rows
from rlhf.data.labels import LABEL_COLUMNS, labels_not_undone
from rlhf.data.load import load
from rlhf.data.messages import RowDropped
from rlhf.data.reader import columns_of
from rlhf.errors import UserError, first_line
from rlhf.labeling.exchange import ForeignNames
from rlhf.labeling.exchange.argilla import from_argilla, to_argilla
from rlhf.labeling.exchange.label_studio import from_label_studio, to_label_studio
from rlhf.labeling.exchange.rows import ForeignLabel, label_row
from rlhf.labeling.pseudonyms import with_other_annotator
from rlhf.labeling.store import check_label_rows
from rlhf.runs.checksums import write_file_list

_CONVERTERS_TO = {"argilla": to_argilla, "label-studio": to_label_studio}
DATASET_MARKER = ".rlhf-labels"
"""File in the folder of an exported dataset, so that only such a folder is replaced."""
_CONVERTERS_FROM = {"argilla": from_argilla, "label-studio": from_label_studio}


def export_labels(rows: Sequence[Row], path: Path, form: LabelFormat) -> Counter[str]:
    """Write the labels that were not undone to a file.

    Args:
        rows: Labels, see `rlhf.data.labels`.
        path: A JSON file; for `datasets` a Parquet file, or else a folder.
        form: Format of the file.

    Returns:
        Reason -> number of labels that the format cannot express completely.

    Raises:
        UserError: A column cannot be stored in a dataset.
    """
    problems: Counter[str] = Counter()

    def count(reason: str) -> None:
        problems[reason] += 1

    if form == "datasets":
        _write_dataset(labels_not_undone(rows), path)
    else:
        content = _CONVERTERS_TO[form](rows, count)
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return problems


def _write_dataset(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        dataset = Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:
        raise UserError(f"{path}: a column cannot be stored: {first_line(error)}") from error
    with atomic_path(path) as partial:
        if path.suffix == ".parquet":
            dataset.to_parquet(partial)
        else:
            dataset.save_to_disk(partial)
            write_file_list(partial, DATASET_MARKER)


def import_labels(
    path: str, form: LabelFormat, *, names: ForeignNames, annotator: str | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Read labels from a file of another tool.

    Args:
        path: A JSON file; for `datasets`, a file, a folder or an id on the Hugging Face Hub, with
            exported labels or with preference pairs.
        form: Format of the file.
        names: Name of a field or question in this toolkit -> its name in the file.
        annotator: Annotator of all labels; None for the annotators in the file. Pairs of `datasets`
            do not name one.

    Returns:
        The labels, and reason -> number of labels that cannot be read.

    Raises:
        UserError: The file cannot be read or has no labels, or it has pairs and `annotator` is
            None.
    """
    problems: Counter[str] = Counter()

    def count(reason: str) -> None:
        problems[reason] += 1

    rows = []
    for label in _labels_in_file(path, form, names, annotator, count):
        try:
            rows.append(label if isinstance(label, dict) else label_row(label))
        except RowDropped as reason:
            count(str(reason))
    if not rows:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in problems.items())
        raise UserError(f"{path}: no label can be read as {form} ({reasons or 'it is empty'})")
    return rows, problems


def _labels_in_file(
    path: str, form: LabelFormat, names: ForeignNames, annotator: str | None, count_problem: Any
) -> Iterator[ForeignLabel | dict[str, Any]]:
    """Yield the labels of a file; labels of an exported dataset are yielded as rows.

    Raises:
        UserError: See `import_labels`.
    """
    if form == "datasets":
        yield from _dataset_labels(path, names, annotator)
        return
    if not Path(path).exists():
        raise UserError(f"path: {path} does not exist")
    content = read_json(Path(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: expected the list of {form} records, found another value")
    for label in _CONVERTERS_FROM[form](content, names, count_problem):
        yield label if annotator is None else replace(label, annotator=annotator)


def _without_nulls(row: Row) -> dict[str, Any]:
    """Return a label without the nulls with which Arrow fills missing columns and message keys."""
    present = {name: value for name, value in row.items() if value is not None}
    for name in {"prompt", "response_a", "response_b", "completion"} & present.keys():
        present[name] = _messages_without_nulls(present[name])
    if isinstance(present.get("replies"), list):
        present["replies"] = [_messages_without_nulls(reply) for reply in present["replies"]]
    return present


def _messages_without_nulls(messages: Any) -> Any:
    """Return messages without nulls, and values that are not messages unchanged.

    `check_label_rows` refuses the latter.
    """
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        return messages
    return [{key: part for key, part in turn.items() if part is not None} for turn in messages]


def _dataset_labels(
    path: str, names: ForeignNames, annotator: str | None
) -> Iterator[ForeignLabel | dict[str, Any]]:
    """Yield the rows of an exported dataset, or labels from a dataset of preference pairs.

    With another `annotator`, undone labels are omitted.

    Raises:
        UserError: The rows are invalid, or they are pairs and `annotator` is None.
    """
    spec = DataSpec(path, columns=dict(names) or None)
    table = read_rows(spec)
    if columns_of(table) >= LABEL_COLUMNS:
        rows = [_without_nulls(row) for row in table]
        check_label_rows(Path(path), rows)
        if annotator is not None:
            rows = [with_other_annotator(row, annotator) for row in labels_not_undone(rows)]
        yield from rows
        return
    if annotator is None:
        raise UserError(f"{path}: the pairs do not name an annotator; set --annotator")
    for row in load(spec, "preference", seed=None).rows:
        replies = [row["chosen"], row["rejected"]]
        margin = row.get("margin")
        yield ForeignLabel("pairs", annotator, row["prompt"], replies, winner=0, margin=margin)
