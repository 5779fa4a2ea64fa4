"""Implements `rlhf labels agreement`, `rlhf labels export` and `rlhf labels import`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from rlhf.common.text import count_text, reason_counts_text
from rlhf.config.base import CommandConfig
from rlhf.config.labeling import LabelFormat
from rlhf.errors import UserError


@dataclass(frozen=True)
class LabelAgreementConfig(CommandConfig):
    """Configuration of `rlhf labels agreement`."""

    files: list[str]
    """Files of labels, for example one for each annotator."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class LabelExportConfig(CommandConfig):
    """Configuration of `rlhf labels export`."""

    files: list[str]
    """Files of labels."""
    path: str
    """File to write: .json, or for datasets .parquet or a folder."""
    format: LabelFormat
    """argilla: records of Argilla 2; label-studio: tasks with annotations; datasets: a dataset of
    the library datasets."""
    pseudonyms: bool = False
    """Name the annotators A1, A2, ... in the order of appearance."""
    overwrite: bool = False
    """Replace an existing file, or the folder of a dataset that this command wrote."""


@dataclass(frozen=True)
class LabelImportConfig(CommandConfig):
    """Configuration of `rlhf labels import`."""

    path: str
    """File to read: JSON of Argilla 2 or of Label Studio; for datasets a file, a folder or an id on
    the Hugging Face Hub."""
    format: LabelFormat
    """Format of the file, as in `rlhf labels export`."""
    output: str
    """JSONL file to which the labels are appended."""
    names: dict[str, str] = field(default_factory=dict)
    """Name in this toolkit -> name of the field, question or column in the file, for example
    {response_a: text1, preference: which}."""
    annotator: str | None = None
    """Annotator of all labels. By default, the annotator in the file."""


def report_agreement(config: LabelAgreementConfig) -> Iterator[str]:
    """Yield a table of annotators, a table of their pairs, and Fleiss' kappa; or JSON.

    Raises:
        UserError: A file is not a file of labels, or the labels differ in mode or scale.
    """
    from rlhf.data.labels import check_labels_have_one_scale
    from rlhf.labeling.agreement import agreement_report

    rows = _read_labels_of_one_mode(config.files)
    check_labels_have_one_scale(
        rows, "files", ["scale"]
    )  # the strength of a preference has no effect
    report = agreement_report(rows)
    if config.json:
        yield json.dumps(_json_value(report), indent=2, ensure_ascii=False)
        return
    from rlhf.commands.tables import table_text

    yield table_text(
        [_printed_values(_dataclass_values(row)) for row in report.annotators],
        [*_dataclass_values(report.annotators[0])],
    )
    if report.pairs:
        yield table_text(
            [_printed_values(_dataclass_values(row)) for row in report.pairs],
            [*_dataclass_values(report.pairs[0])],
        )
    if report.fleiss is None:
        yield "No item has labels of several annotators, so there is no agreement to measure."
    else:
        kappa = _printed_value(report.fleiss)
        yield f"Fleiss' kappa of {report.shared_items} shared items: {kappa}"


def export_label_files(config: LabelExportConfig) -> Iterator[str]:
    """Write labels to a file or folder; yield a line with their number.

    Raises:
        UserError: The path has a wrong ending or cannot be replaced, a file is not a file of
            labels, or the labels differ in mode or scale.
    """
    from rlhf.data.labels import check_labels_have_one_scale, labels_not_undone
    from rlhf.labeling.exchange.files import DATASET_MARKER, export_labels
    from rlhf.labeling.pseudonyms import with_numbered_annotators
    from rlhf.runs.checksums import check_folder_is_unchanged

    path = Path(config.path)
    needed = {"datasets": (".parquet", "")}.get(config.format, (".json",))
    if path.suffix not in needed:
        ending = " or ".join(filter(None, needed)) + (" or be a folder" if "" in needed else "")
        raise UserError(f"path: {path} must end in {ending} for format: {config.format}")
    if path.exists() and not config.overwrite:
        raise UserError(f"path: {path} exists; choose another path or set --overwrite")
    if path.is_dir():
        check_folder_is_unchanged(path, DATASET_MARKER, "a dataset of `rlhf labels export`")
    rows = _read_labels_of_one_mode(config.files)
    if config.format != "datasets":  # it keeps the column with the range
        check_labels_have_one_scale(rows, "files")
    if config.pseudonyms:
        rows = with_numbered_annotators(rows)
    problems = export_labels(rows, path, config.format)
    count = count_text(len(labels_not_undone(rows)), "label")
    yield f"{count} written to {path}{_problem_counts_text(problems)}"


def import_label_file(config: LabelImportConfig) -> Iterator[str]:
    """Append the new labels of a file to the file ``output``; yield a line with their number.

    A label is not new if ``output`` has its id, or a label of the annotator for the item.

    Raises:
        UserError: A file cannot be read, or the labels differ in mode or scale.
    """
    from rlhf.data.labels import check_labels_have_one_scale, labels_not_undone
    from rlhf.labeling.exchange.files import import_labels
    from rlhf.labeling.store import LabelFile

    rows, problems = import_labels(
        config.path, config.format, names=config.names, annotator=config.annotator
    )
    with LabelFile(config.output) as file:
        modes = {row["mode"] for row in [*file.rows, *rows]}
        if len(modes) > 1:
            raise UserError(
                f"output: labels of the modes {', '.join(sorted(modes))} cannot be in one file"
            )
        check_labels_have_one_scale([*file.rows, *rows], "output")
        known = {row["label_id"] for row in file.rows}
        # The id of a label that replaced an undone one is not the same in every format.
        labeled = {(row["annotator"], row["item_id"]) for row in labels_not_undone(file.rows)}
        new = {
            row["label_id"]: row
            for row in rows
            if row["label_id"] not in known and (row["annotator"], row["item_id"]) not in labeled
        }
        for row in new.values():
            file.append(row)
    problems["already in the file"] += len(rows) - len(new)
    count = count_text(len(new), "label")
    yield f"{count} appended to {config.output}{_problem_counts_text(+problems)}"


def _read_labels_of_one_mode(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return the labels of several files of one mode.

    Raises:
        UserError: A file cannot be read or does not contain labels, or the modes differ.
    """
    from rlhf.common.files import read_log
    from rlhf.labeling.store import check_label_rows

    rows = []
    for file in files:
        path = Path(file)
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"files: {path} {what}")
        labels = read_log(path)  # another process can be writing
        check_label_rows(path, labels)
        rows += labels
    if not rows:
        raise UserError(f"files: {', '.join(files) or 'none'}: there is no label")
    if len(modes := {row["mode"] for row in rows}) > 1:
        raise UserError(f"files: the labels have different modes: {', '.join(sorted(modes))}")
    return rows


def _dataclass_values(row: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without converting their values."""
    return {f.name: getattr(row, f.name) for f in fields(row)}


def _printed_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _printed_value(value) for name, value in values.items()}


def _printed_value(value: Any) -> Any:
    """Return a value as it is printed; an interval as its value and its bounds."""
    from rlhf.reports.markup import interval_text, number_text
    from rlhf.stats import Interval

    if isinstance(value, Interval):
        return f"{number_text(value.value)} {interval_text(value)}"
    return value


def _json_value(value: Any) -> Any:
    """Return a report as plain data, with intervals as in the files of runs."""
    from rlhf.stats import Interval

    if isinstance(value, Interval):
        return value.as_dict()
    if is_dataclass(value):
        return {name: _json_value(part) for name, part in _dataclass_values(value).items()}
    return [_json_value(part) for part in value] if isinstance(value, tuple) else value


def _problem_counts_text(problems: Counter[str]) -> str:
    text = reason_counts_text(problems)
    return f"; {text}" if text else ""
