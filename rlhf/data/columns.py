"""Assign the columns of a table to fields, by the user's mapping or by the column names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.names import did_you_mean
from rlhf.config.data import DataSpec, Kind
from rlhf.errors import UserError

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Field -> column, or path to a value inside a column such as `reward_model.ground_truth`."""

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "inputs", "input"),
    "context": ("context", "input", "passage", "body"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "completion": ("completion", "response", "output", "targets", "solution", "answer"),
    "reasoning": ("reasoning_content", "reasoning", "thinking", "complex_cot"),
    "chosen": ("chosen", "chosen_response", "preferred_output", "preferred"),
    "rejected": ("rejected", "rejected_response", "non_preferred_output", "dispreferred"),
    "margin": ("margin",),
    "chosen_score": (
        "score_chosen",
        "chosen_score",
        "chosen_rating",
        "chosen-rating",
        "rating_chosen",
    ),
    "rejected_score": (
        "score_rejected",
        "rejected_score",
        "rejected_rating",
        "rejected-rating",
        "rating_rejected",
    ),
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "labels", "score", "kto_tag"),
    "text": ("text", "sentence", "review", "content"),
    "turns": ("turns",),
    "replies": ("replies", "responses", "completions"),
    "steps": ("steps", "completions"),
    "labels": ("labels",),
    "answer": (
        "ground_truth",
        "reward_model.ground_truth",
        "final_answer",
        "expected_answer",
        "reference_answer",
        "final",
        "answer",
        "answers",
        "solution",
    ),
    "tests": ("tests", "test_list"),
}
"""Field -> column names that are recognized without a mapping, in order of preference.

A field without an entry is recognized by its own name.
"""

_PROMPT_PARTS = ("system", "history", "tools", "context")


@dataclass(frozen=True)
class KindFields:
    """The required and optional fields of a kind of rows."""

    required: tuple[tuple[str, ...], ...]
    """Sets of required fields. A row is read with the first set for which it has all fields."""
    optional: tuple[str, ...]
    example: str
    """Example of a mapping, for error messages; names in capitals are placeholders."""


KIND_FIELDS: dict[Kind, KindFields] = {
    "sft": KindFields(
        (("messages",), ("prompt", "completion"), ("text",)),
        (*_PROMPT_PARTS, "reasoning"),
        "prompt: QUESTION, completion: ANSWER",
    ),
    "preference": KindFields(
        (
            ("chosen", "rejected"),
            ("response_a", "response_b", "winner"),
            ("response_a", "response_b", "score_a", "score_b"),
        ),
        ("prompt", "messages", *_PROMPT_PARTS, "margin", "chosen_score", "rejected_score"),
        "prompt: QUESTION, chosen: BETTER, rejected: WORSE} or {prompt: QUESTION, "
        "response_a: ONE, response_b: OTHER, winner: WHICH",
    ),
    "label": KindFields(
        (("prompt", "completion", "label"), ("messages", "label")),
        (*_PROMPT_PARTS, "reasoning"),
        "prompt: QUESTION, completion: ANSWER, label: GOOD",
    ),
    "prompt": KindFields(
        (("prompt",), ("messages",), ("chosen",), ("turns",), ("text",)),
        (*_PROMPT_PARTS, "answer", "tests"),
        "prompt: QUESTION, answer: REFERENCE",
    ),
    "text": KindFields((("text",),), (), "text: TEXT"),
    "classification": KindFields(
        (("text", "label"), ("prompt", "completion", "label"), ("messages", "label")),
        (*_PROMPT_PARTS, "reasoning"),
        "text: TEXT, label: CLASS",
    ),
    "rated": KindFields(
        (("text",), ("prompt", "completion"), ("messages",)),
        (*_PROMPT_PARTS, "reasoning"),
        "prompt: QUESTION, completion: ANSWER",
    ),
    "ranking": KindFields(
        (("prompt", "replies"),), _PROMPT_PARTS, "prompt: QUESTION, replies: REPLIES"
    ),
    "steps": KindFields(
        (("prompt", "steps", "labels"),),
        _PROMPT_PARTS,
        "prompt: QUESTION, steps: STEPS, labels: LABELS",
    ),
}

FACT_FIELDS = ("answer", "tests")
"""Fields that are stored on the last user message of a prompt, for rewards."""

_OLD_NAMES = {"input": "context"}
"""Former name of a field -> current name."""


@dataclass(frozen=True)
class ColumnAssignment:
    """Assignment of columns to the fields of a row."""

    required_fields: tuple[str, ...]
    columns: dict[str, str]
    """Required or optional field -> column, or path to a value inside a column."""


def find_column_assignments(
    kind: Kind,
    table: Sequence[Row],
    column_names: Collection[str],
    spec: DataSpec,
    *,
    with_answer_and_tests: bool,
) -> list[ColumnAssignment]:
    """Return the layouts with which rows of the table can be read, in order of preference.

    The user's mapping takes precedence over column names. Layouts with more mapped fields come
    first. The result has only layouts with the field `text`, or only layouts without it.

    Args:
        kind: Kind of rows.
        table: Rows of the source, to check mapped paths and for error messages.
        column_names: Names of all columns.
        spec: Specification of the source, with the mapping.
        with_answer_and_tests: Whether every kind has the optional fields `answer` and `tests`.

    Raises:
        UserError: The mapping has an unknown field or column, a mapped path has no value in the
            first rows, or each set of required fields has a field without a column.
    """
    mapping = {
        _OLD_NAMES.get(field, field): column for field, column in (spec.columns or {}).items()
    }
    optional_fields = tuple(
        dict.fromkeys(KIND_FIELDS[kind].optional + (FACT_FIELDS if with_answer_and_tests else ()))
    )
    _check_mapping(
        kind,
        table,
        column_names,
        mapping=mapping,
        source=spec.path,
        optional_fields=optional_fields,
    )
    complete = []
    for fields in sorted(
        KIND_FIELDS[kind].required, key=lambda fields: -len(mapping.keys() & set(fields))
    ):
        columns = {field: column_of(field, column_names, mapping) for field in fields}
        if all(columns.values()) and mapping.keys() <= {*fields, *optional_fields}:
            complete.append(
                ColumnAssignment(
                    fields, _with_optional_columns(columns, optional_fields, column_names, mapping)
                )
            )
    if not complete:
        raise UserError(_missing_columns_message(kind, table, column_names, source=spec.path))
    # Plain text and conversations are not mixed, because training treats them differently.
    is_text = "text" in complete[0].required_fields
    return [layout for layout in complete if ("text" in layout.required_fields) == is_text]


def _with_optional_columns(
    columns: dict[str, str | None],
    optional_fields: Sequence[str],
    column_names: Collection[str],
    mapping: Columns,
) -> dict[str, str]:
    """Add the columns of the optional fields `optional_fields` to those of the required fields.

    Fields without a column are omitted.
    """
    for field in optional_fields:
        if field not in columns:
            taken = {column for column in columns.values() if column}
            columns[field] = column_of(field, column_names, mapping, taken_columns=taken)
    return {field: column for field, column in columns.items() if column}


def column_of(
    field: str,
    column_names: Collection[str],
    mapping: Columns,
    *,
    taken_columns: Collection[str] = (),
) -> str | None:
    """Return the mapped column of a field, else the first free column with one of its names.

    Args:
        field: Name of the field.
        column_names: Names of all columns.
        mapping: The user's mapping; its columns are not free for other fields.
        taken_columns: Columns that are not free because other fields use them.

    Returns:
        The column or path; None if there is no such column.
    """
    if field in mapping:
        return mapping[field]
    free = [
        name for name in column_names if name not in mapping.values() and name not in taken_columns
    ]
    for alias in ALIASES.get(field, (field,)):
        if alias in free or (alias.partition(".")[0] in free and "." in alias):
            return alias
        match = next((name for name in free if name.casefold() == alias), None)
        if match is not None:
            return match
    return None


def cell_of(row: Row, path: str) -> Any:
    """Return the value in a column, or at a path such as `column.key.0`; None if it is missing."""
    if path in row:
        return row[path]
    cell: Any = row
    for step in path.split("."):
        if isinstance(cell, Mapping):
            cell = cell.get(step)
        elif isinstance(cell, Sequence) and not isinstance(cell, str) and _is_index(step):
            index = int(step)
            cell = cell[index] if -len(cell) <= index < len(cell) else None
        else:
            return None
    return cell


def _is_index(step: str) -> bool:
    return step.removeprefix("-").isdigit()


def root_column(path: str, column_names: Collection[str]) -> str:
    """Return the column that contains a path; `column_names` are the names of all columns."""
    return path if path in column_names else path.partition(".")[0]


def _check_mapping(
    kind: Kind,
    table: Sequence[Row],
    column_names: Collection[str],
    *,
    mapping: Columns,
    source: str,
    optional_fields: Sequence[str],
) -> None:
    """Check the user's mapping, see `find_column_assignments`.

    Raises:
        UserError: A field or column is unknown, or a path has no value in the first rows.
    """
    allowed = {field for fields in KIND_FIELDS[kind].required for field in fields} | set(
        optional_fields
    )
    for field, column in mapping.items():
        if field not in allowed:
            raise UserError(
                f"{source}: data.columns.{field} is not a field of {kind} data "
                f"(fields: {', '.join(sorted(allowed))})"
            )
        if root_column(column, column_names) not in column_names:
            raise UserError(
                f"{source}: data.columns.{field} names column {column!r}, which does not exist; "
                f"columns found: {', '.join(sorted(column_names))}"
                f"{did_you_mean(column, column_names)}"
            )
        if column not in column_names and all(
            cell_of(row, column) is None for row in _first_rows(table)
        ):
            raise UserError(
                f"{source}: data.columns.{field}: {column!r} has no value in the first rows; "
                f"columns found: {describe_columns(table, column_names)}"
            )


def _first_rows(table: Sequence[Row], count: int = 100) -> list[Row]:
    return [table[index] for index in range(min(count, len(table)))]


def describe_columns(table: Sequence[Row], column_names: Collection[str]) -> str:
    """Return the column names as text, with the keys of columns that contain objects."""
    rows, names = _first_rows(table, 20), []
    for name in sorted(column_names):
        cell = next((row.get(name) for row in rows if row.get(name) is not None), None)
        prefix = name
        if isinstance(cell, list) and cell and isinstance(cell[0], Mapping):
            prefix, cell = f"{name}.0", cell[0]
        keys = [f"{prefix}.{key}" for key in cell] if isinstance(cell, Mapping) else []
        names.append(f"{name} ({', '.join(keys)})" if keys else name)
    return ", ".join(names)


def _missing_columns_message(
    kind: Kind, table: Sequence[Row], column_names: Collection[str], *, source: str
) -> str:
    fields = KIND_FIELDS[kind]
    needed = " or ".join(" + ".join(names) for names in fields.required)
    return (
        f"{source}: {kind} data needs {needed}; columns found: "
        f"{describe_columns(table, column_names)}; "
        f"map them with data.columns: {{{fields.example}}}, where capitals are your column names "
        "and a dot selects a key inside a column"
    )
