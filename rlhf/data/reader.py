"""Read the rows of a table as canonical rows, and record the columns that are not used."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from rlhf.common.foreign import (
    CodeLocation,
    describe_exception,
    location_text,
    set_default_location,
    user_code_location,
)
from rlhf.common.guards import is_mapping
from rlhf.common.names import did_you_mean
from rlhf.common.user_code import definition_location, guarded_call
from rlhf.config.data import FIELDS, DataSpec, Kind
from rlhf.data.columns import (
    FACT_FIELDS,
    ColumnAssignment,
    Row,
    cell_of,
    column_of,
    find_column_assignments,
    root_column,
)
from rlhf.data.formats import canonical_row, check_row_has_weight
from rlhf.data.labels import RANGE_COLUMNS
from rlhf.data.messages import Notes, RowDropped, is_filled
from rlhf.data.schemas import SAFETY_SCHEMA, Schema, find_schema, schemas_by_precedence
from rlhf.errors import UserError

RowOrDropped = dict[str, Any] | RowDropped
"""A canonical row, or the reason why the row is dropped."""
_WEIGHT_COLUMN = "weight"
_WEIGHTED_KINDS: tuple[Kind, ...] = ("sft", "preference", "label", "ranking", "steps")
"""Kinds whose column `weight` is a weight of the row. In other kinds, it can be a rating."""


class TableReader:
    """Reads the rows of a table, and records dropped rows and unused columns.

    Attributes:
        rows: The canonical rows that were read.
        dropped: Reason -> indices of the rows of `table` that were dropped for this reason.
        total: Number of rows that were read, dropped, or not read because of the limit.
        ignored: Description of an ignored part of a cell -> number of rows.

    Args:
        table: The rows of the source.
        kind: Kind of canonical rows.
        spec: Specification of the source, with its mapping and system message.
        keep: Names of additional columns to include in the rows.
        with_answer_and_tests: Whether to add the answer and the tests of a row to its last user
            message. They are always added in rows of kind "prompt".
        column_names: Names of the columns of the whole source, if `table` contains only its first
            rows.

    Raises:
        UserError: The columns cannot be assigned to fields, or a column of `keep` or a reward
            column does not exist.
    """

    def __init__(
        self,
        table: Sequence[Row],
        kind: Kind,
        spec: DataSpec,
        *,
        keep: tuple[str, ...] = (),
        with_answer_and_tests: bool = False,
        column_names: Collection[str] | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.spec, self.keep = spec, keep
        self.column_names = columns_of(table) if column_names is None else set(column_names)
        self.schema = self._recognized_schema(table)
        self.plugin_location = definition_location(self.schema.read) if self.schema else None
        self.with_answer_and_tests = with_answer_and_tests or kind == "prompt"
        self.layouts: list[ColumnAssignment] = []
        if self.schema is None:
            self.layouts = find_column_assignments(
                kind,
                table,
                self.column_names,
                spec,
                with_answer_and_tests=self.with_answer_and_tests,
            )
            if column_names is None and self.winner_column is not None:
                self.check_winners_count_from_zero(winner_values(table, self.winner_column))
        self._check_kept_columns()
        self.reward_columns = tuple(spec.reward_columns or ())
        self._check_reward_columns()
        self.table = table
        if column_names is None and self.schema is not None and self.schema.gather is not None:
            self.table = self.schema.gather(table)
        self.total = len(self.table)
        self.rows: list[dict[str, Any]] = []
        self.dropped: dict[str, list[int]] = defaultdict(list)
        self.ignored: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        """Column -> number of rows with a value in it that were read with a layout without it."""
        self.used_columns = {name for name in keep if name in self.column_names}

    @property
    def num_dropped(self) -> Counter[str]:
        """Reason -> number of dropped rows."""
        return Counter({reason: len(indices) for reason, indices in self.dropped.items()})

    @property
    def unused_columns(self) -> tuple[str, ...]:
        """The columns that were not used for any row."""
        return tuple(sorted(self.column_names - self.used_columns))

    def read(self, indices: Iterable[int]) -> None:
        """Read the rows of `table` with these indices in this order, up to the source's limit.

        The results are in the attributes.
        """
        for index in indices:
            if len(self.rows) == self.spec.limit:
                break
            outcomes = list(self.convert_table_row(self.table[index]))
            self.total += len(outcomes) - 1
            for outcome in outcomes:
                if isinstance(outcome, RowDropped):
                    self.dropped[str(outcome)].append(index)
                elif len(self.rows) != self.spec.limit:
                    self.rows.append(outcome)
        self.ignored.update(notes_on_skipped_cells(self.skipped, self.used_columns))

    def convert_table_row(self, row: Row) -> Iterator[RowOrDropped]:
        """Yield canonical rows for a row of `table`, and reasons why rows are dropped.

        `ignored`, `skipped` and `used_columns` are updated.
        """
        if self.schema is None:
            yield self._convert(self._read_layout_cells(row), row)
            return
        self.used_columns |= self.schema.columns & self.column_names
        self.ignored.update(self.schema.unread_keys(row))
        facts = self._answer_and_tests_cells(self.schema, row)
        try:
            for item in self._schema_items(self.schema, row):
                yield item if isinstance(item, RowDropped) else self._convert(facts | item, row)
        except RowDropped as reason:
            yield reason
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            location = self.plugin_location
            why = f" ({_describe_failure(error, location)})" if location else ""
            yield RowDropped(f"rows that do not have the {self.schema.name} format{why}")

    def _schema_items(self, schema: Schema, row: Row) -> Iterable[Any]:
        """Return the cells of the canonical rows of a row.

        The function of a plug-in gets a copy of the row.

        Raises:
            TypeError: The function of a plug-in yielded something else than cells.
        """
        if self.plugin_location is None:
            return schema.read(row, self.kind)
        with guarded_call(schema.read, what=f"data format {schema.name!r}"):
            items: list[Any] = list(schema.read(copy.deepcopy(row), self.kind))
            for item in items:
                if not is_mapping(item) and not isinstance(item, RowDropped):
                    raise TypeError(
                        f"a {type(item).__name__} was yielded, not a dictionary of cells"
                    )
        return items

    def _convert(self, cells: dict[str, Any], row: Row) -> RowOrDropped:
        """Return the canonical row of some cells of `row`, or the reason why it is dropped.

        `ignored` and `used_columns` are updated.
        """
        notes: Notes = set()
        try:
            if self.has_row_weights:
                self.used_columns.add(_WEIGHT_COLUMN)
                check_row_has_weight(row.get(_WEIGHT_COLUMN), notes)
            canonical = canonical_row(
                cells,
                self.kind,
                system=self.spec.system,
                notes=notes,
                reward_cells=self._reward_cells(row),
            )
        except RowDropped as reason:
            return reason
        self.ignored.update(notes)
        ranges = {name: cells[name] for name in RANGE_COLUMNS.values() if name in cells}
        extra = {name: cells.get(name, row.get(name)) for name in self.keep}
        return canonical | {"source": self.spec.path} | ranges | extra

    def _reward_cells(self, row: Row) -> dict[str, Any]:
        """Return the cells of the reward columns as JSON values, null if a row has no value."""
        self.used_columns |= set(self.reward_columns)
        return {name: self._json_value(row.get(name), name) for name in self.reward_columns}

    def _json_value(self, value: Any, column: str) -> Any:
        """Return a cell as a JSON value. nan (null in pandas and Parquet) and infinities are null.

        Raises:
            UserError: The cell has a type that JSON does not have.
        """
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): self._json_value(item, column) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._json_value(item, column) for item in value]
        raise UserError(
            f"{self.spec.path}: reward column {column!r} has a value of type "
            f"{type(value).__name__}, which JSON does not have; convert it to text or a number"
        )

    @property
    def has_row_weights(self) -> bool:
        """Whether the column `weight` contains the weights of the rows."""
        taken = {*self.keep, *(self.spec.columns or {}).values()}
        if self.schema is not None and self.schema.gather is not None:
            return False
        is_weighted = self.kind in _WEIGHTED_KINDS and _WEIGHT_COLUMN in self.column_names
        return is_weighted and _WEIGHT_COLUMN not in taken

    def _read_layout_cells(self, row: Row) -> dict[str, Any]:
        """Return the cells of a row.

        The row is read with the first layout for which it has all required fields. If there is no
        such layout, the row is read with the first layout.
        """
        for number in (*range(len(self.layouts)), 0):
            layout = self.layouts[number]
            cells = {field: cell_of(row, column) for field, column in layout.columns.items()}
            if all(cells[field] is not None for field in layout.required_fields):
                break
        roots, others = self._read_and_skipped_columns[number]
        self.skipped.update(name for name in others if is_filled(row.get(name)))
        self.used_columns |= roots
        cells = {
            f: cell for f, cell in cells.items() if f in layout.required_fields or cell is not None
        }
        if layout.columns.get("answer") == "solution":
            cells["answer_is_solution"] = True
        return cells

    @cached_property
    def _read_and_skipped_columns(self) -> list[tuple[frozenset[str], list[str]]]:
        """For each layout, the columns that it reads, and the columns that only others read."""
        roots = [
            frozenset(root_column(path, self.column_names) for path in layout.columns.values())
            for layout in self.layouts
        ]
        every = frozenset().union(*roots)
        return [(names, sorted(every - names)) for names in roots]

    def _answer_and_tests_cells(self, schema: Schema, row: Row) -> dict[str, Any]:
        """Return the cells of the answer and tests columns, unless the schema uses the columns."""
        if not self.with_answer_and_tests:
            return {}
        columns = {
            f: column_of(f, self.column_names, {}, taken_columns=schema.columns)
            for f in FACT_FIELDS
        }
        facts = {f: cell_of(row, column) for f, column in columns.items() if column}
        self.used_columns |= {
            root_column(column, self.column_names) for column in columns.values() if column
        }
        return {f: cell for f, cell in facts.items() if cell is not None}

    def _recognized_schema(self, table: Sequence[Row]) -> Schema | None:
        """Return the public schema of the table; None if none matches or the spec has a mapping."""
        if self.spec.columns:
            return None
        flags = set(SAFETY_SCHEMA.gives) & set(self.keep)
        if flags and not flags <= self.column_names and self.column_names >= SAFETY_SCHEMA.needs:
            return SAFETY_SCHEMA
        return find_schema(self.kind, table, self.column_names)

    def _check_kept_columns(self) -> None:
        """Raise UserError if a column of `keep` does not exist or has a reserved name."""
        reserved = {*FIELDS, "source"} - {"input", "messages", "context", "history", "reasoning"}
        computed = self.schema.gives if self.schema else ()
        for name in self.keep:
            if name in reserved:
                raise UserError(
                    f"{self.spec.path}: column {name!r} cannot be kept, because {self.kind} rows "
                    "use that name"
                )
            if name not in self.column_names and name not in computed:
                raise UserError(
                    f"{self.spec.path}: no column {name!r} to keep; columns found: "
                    f"{', '.join(sorted(self.column_names))}"
                )

    def _check_reward_columns(self) -> None:
        """Check that the reward columns exist, and that rewards can read them in these rows.

        Raises:
            UserError: A column does not exist, or the rows have no answers and tests or are merged.
        """
        if not self.reward_columns:
            return
        what = f"{self.spec.path}: reward_columns"
        if not self.with_answer_and_tests:
            raise UserError(
                f"{what} has no effect on {self.kind} data, because no reward scores these rows; "
                "remove it"
            )
        if self.schema is not None and self.schema.gather is not None:
            raise UserError(
                f"{what}: a prompt of the {self.schema.name} format is made of several rows, so it "
                "has no columns; remove it"
            )
        for name in self.reward_columns:
            if name not in self.column_names:
                root = name.partition(".")[0]
                advice = (
                    f"; name the whole column {root!r}, whose value can be an object"
                    if root in self.column_names
                    else did_you_mean(name, self.column_names)
                )
                raise UserError(
                    f"{what} names column {name!r}, which does not exist; columns found: "
                    f"{', '.join(sorted(self.column_names))}{advice}"
                )

    @property
    def winner_column(self) -> str | None:
        """Column of the winners of pairs; None if the rows are not read with one."""
        return self.layouts[0].columns.get("winner") if self.layouts else None

    def check_winners_count_from_zero(self, values: Collection[str]) -> None:
        """Check that the numbers of the winner column are not counted from 1.

        Args:
            values: Result of `winner_values` for the whole source.

        Raises:
            UserError: The column contains 2, or only 1.
        """
        if "2" in values or set(values) == {"1"}:
            raise UserError(
                f"{self.spec.path}: data.columns.winner: the numbers of column "
                f"{self.winner_column!r} are ambiguous: write a, b or tie, or 0 for the first and "
                "1 for the second reply"
            )


def _describe_failure(error: Exception, location: CodeLocation) -> str:
    """Describe an exception of a plug-in that reads a row, for the count of dropped rows.

    The message of a ValueError usually contains a value of the row, so it would be another one for
    each row.

    Args:
        error: The exception.
        location: Its location if no line of it is in the plug-in, for example if a cell is missing.
    """
    if user_code_location(error) is None:
        set_default_location(error, location)
    if isinstance(error, ValueError):
        return f"{type(error).__name__}{location_text(user_code_location(error))}"
    return describe_exception(error)


def winner_values(rows: Iterable[Row], column: str) -> set[str]:
    """Return the distinct values of a winner column as texts, integral numbers without ".0"."""
    return {str(cell_of(row, column)).removesuffix(".0") for row in rows}


def notes_on_skipped_cells(
    skipped_counts: Mapping[str, int], used_columns: Collection[str]
) -> dict[str, int]:
    """Return notes on values that were skipped, because the layout of their row lacks the column.

    Args:
        skipped_counts: Column -> number of rows with a value in it that were read with a layout
            without it.
        used_columns: Columns that were used for any row.
    """
    return {f"{column} column": n for column, n in skipped_counts.items() if column in used_columns}


def columns_of(table: Sequence[Row]) -> set[str]:
    """Return the column names of a table; the rows of a file can have different columns."""
    if isinstance(table, list):
        return {name for row in table for name in row}
    return set(table[0])


def guess_kind(table: Sequence[Row], spec: DataSpec) -> Kind:
    """Guess the kind of the rows of a table from its columns.

    Raises:
        UserError: The columns match no kind.
    """
    column_names = columns_of(table)
    if not spec.columns:
        for schema in schemas_by_precedence():
            if find_schema(schema.kinds[0], table, column_names) is schema:
                return schema.kinds[0]
    for kind in KINDS_BY_SPECIFICITY:
        try:
            find_column_assignments(kind, table, column_names, spec, with_answer_and_tests=False)
        except UserError:
            continue
        return kind
    raise UserError(
        f"{spec.path}: the columns do not match any kind of data; give --kind, and --columns if "
        f"the names differ; columns found: {', '.join(sorted(column_names))}"
    )


KINDS_BY_SPECIFICITY: tuple[Kind, ...] = (
    "preference",
    "steps",
    "ranking",
    "label",
    "classification",
    "sft",
    "prompt",
)
"""Kinds that `guess_kind` tries, from the most specific columns to the least specific."""
