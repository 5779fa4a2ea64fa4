"""Read rows from a file, a folder or the Hugging Face Hub.

Error messages are one line with the file name and, if possible, the line number.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from rlhf.common.files import expand_user, open_text, read_json, read_jsonl
from rlhf.common.names import did_you_mean
from rlhf.config.data import DataSpec
from rlhf.errors import UserError

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def read_rows(spec: DataSpec) -> Sequence[Row]:
    """Return all rows of `spec.path`, before their conversion to canonical rows.

    A local path takes precedence over a Hugging Face Hub id with the same name.

    Raises:
        UserError: The content is malformed, there are no rows, or the path is neither a file, nor a
            folder, nor a dataset on the hub that can be loaded.
    """
    path = existing_path_or_hub_id(spec)
    rows = read_file(path) if path.is_file() else _read_with_datasets(spec, path)
    if len(rows) == 0:
        raise UserError(f"{spec.path}: the dataset is empty")
    return rows


def existing_path_or_hub_id(spec: DataSpec) -> Path:
    """Return `spec.path` as a `Path`, after a check that it can name a source.

    Raises:
        UserError: The path is neither a file, nor a folder, nor in the form of an id on the hub.
    """
    path = expand_user(spec.path)
    is_hub_id = _HUB_ID.fullmatch(spec.path) and data_suffix(path) not in READERS
    try:
        exists = path.exists()
    except OSError:  # a text is too long for the name of a file
        exists = False
    if not exists and not is_hub_id:
        raise UserError(_missing_file_message(path))
    return path


def read_file(path: str | Path) -> list[Row]:
    """Return all rows of a data file.

    The format is determined by the suffix, without a final `.gz`.

    Raises:
        UserError: The format is unknown, or the content is malformed.
    """
    path = Path(path)
    suffix = data_suffix(path)
    if suffix not in READERS:
        raise UserError(f"{path}: unknown file format {suffix!r}, use one of {', '.join(READERS)}")
    with decoding_errors_as_user_errors(path):
        return READERS[suffix](path)


@contextlib.contextmanager
def decoding_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Return a context manager that converts errors of the encoding and of gzip to UserErrors."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None


def _read_json(path: Path) -> list[Row]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, found a {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {index}: expected an object, found {type(row).__name__}")
    return rows


def _read_csv(path: Path) -> list[Row]:
    return list(iterate_csv(path))


def iterate_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file.

    Raises:
        UserError: The content is malformed.
    """
    csv.field_size_limit(2**31 - 1)
    with decoding_errors_as_user_errors(path), open_text(path, newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            names = reader.fieldnames or []
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"{path}: the header names column {repeated[0]!r} twice")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: the number of fields differs from that "
                        "of the header"
                    )
                yield row
        except csv.Error as error:
            line = reader.reader.line_num
            raise UserError(f"{path}, line {line}: broken CSV, {error}") from None


def _read_text(path: Path) -> list[Row]:
    """Return one row per paragraph, or one per line if the file has no blank lines."""
    with open_text(path) as stream:
        content = stream.read().strip()
    blocks = re.split(r"\n\s*\n", content)
    if len(blocks) == 1:
        blocks = content.split("\n")
    return [{"text": block.strip("\n")} for block in blocks if block.strip()]


def _read_parquet(path: Path) -> list[Row]:
    return list(iterate_parquet(path))


def iterate_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: The content is malformed.
    """
    import pyarrow.parquet as pq

    with parquet_errors_as_user_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from map(columnar_row_to_json_form, batch.to_pylist())


@contextlib.contextmanager
def parquet_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Return a context manager that converts the errors of a Parquet file to UserErrors."""
    import pyarrow as pa

    try:
        with decoding_errors_as_user_errors(path):
            yield
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({one_line(error)})") from None
    except OSError as error:
        if error.errno is not None:  # an error of the file system, not of the content
            raise
        raise UserError(f"{path}: damaged Parquet file ({one_line(error)})") from None


_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")


def columnar_row_to_json_form(row: Row) -> dict[str, Any]:
    """Convert a row of a columnar file, such as Parquet, to the form of a row in a JSON file.

    In a columnar file, all objects of a column have the same keys, and keys that an object lacks
    have the value null. Keys with the value null are therefore removed from tools and tool calls.
    Decimals are converted to floats.
    """
    return {
        key: _columnar_cell_to_json_form(cell, in_tools=key in _TOOL_KEYS)
        for key, cell in row.items()
    }


def _columnar_cell_to_json_form(cell: Any, *, in_tools: bool) -> Any:
    if isinstance(cell, Mapping):
        return {
            key: _columnar_cell_to_json_form(item, in_tools=in_tools or key in _TOOL_KEYS)
            for key, item in cell.items()
            if not (in_tools and item is None)
        }
    if isinstance(cell, list):
        return [_columnar_cell_to_json_form(item, in_tools=in_tools) for item in cell]
    return float(cell) if isinstance(cell, Decimal) else cell


READERS = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_text,
}
"""File suffix (before a .gz) -> function that reads the rows of a file."""


def data_suffix(path: Path) -> str:
    """Return the suffix of a data file in lower case, without a final `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _read_with_datasets(spec: DataSpec, path: Path) -> Sequence[Row]:
    """Load data files in a folder, a `save_to_disk` folder, or a hub id with `datasets`."""
    import datasets

    rows = open_with_datasets(spec, path, streaming=False)
    rows = cast(datasets.Dataset, rows).with_transform(_columnar_batch_to_json_form)
    return cast(Sequence[Row], rows)


def open_with_datasets(spec: DataSpec, path: Path, *, streaming: bool) -> Any:
    """Open data files in a folder, a `save_to_disk` folder, or a hub id with `datasets`.

    Args:
        spec: The source.
        path: Path of the source as a local path.
        streaming: Whether the rows are read while they are iterated over, without a copy.

    Returns:
        A dataset of the library `datasets`, with rows in the form of columnar files.

    Raises:
        UserError: The source does not exist or cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if path.is_dir() and _is_save_to_disk_folder(path):
            rows = datasets.load_from_disk(str(path))
            rows = rows[spec.split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            source = str(path) if path.is_dir() else spec.path
            options = _options_to_read_csv_as_text(path) if path.is_dir() else {}
            options |= {"streaming": True} if streaming else {}
            rows = datasets.load_dataset(
                source,
                spec.name,
                data_dir=spec.data_dir,
                split=spec.split,
                **options,
            )
    except (DatasetGenerationError, ValueError, KeyError) as error:
        cause = error.__cause__ or error
        raise UserError(f"dataset {spec.path!r}: {one_line(cause)}") from None
    except (OSError, HfHubHTTPError) as error:
        if path.is_dir():
            raise UserError(f"data folder {path}: {one_line(error)}") from None
        raise UserError(
            f"dataset {spec.path!r} is not a local path and cannot be loaded from the hub "
            f"({one_line(error)}); if you are offline, set data.path to a local file with one of "
            f"the suffixes {', '.join(READERS)}"
        ) from None
    return rows


def _options_to_read_csv_as_text(folder: Path) -> dict[str, Any]:
    """Return options of `datasets` that keep the cells of CSV files, such as 007 or NA, as strings.

    The result is empty unless all data files of the folder are CSV files.
    """
    import datasets

    files = [f for f in folder.rglob("*") if f.is_file() and data_suffix(f) in READERS]
    if not files or any(data_suffix(file) != ".csv" for file in files):
        return {}
    with open_text(min(files), newline="") as stream:
        names = next(csv.reader(stream), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False}


def _columnar_batch_to_json_form(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Apply `columnar_row_to_json_form` to rows that `datasets` passes as columns."""
    return {
        name: [columnar_row_to_json_form({name: cell})[name] for cell in cells]
        for name, cells in batch.items()
    }


def _is_save_to_disk_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def one_line(error: BaseException | str, max_length: int = 200) -> str:
    """Return the message of an error in one line of at most `max_length` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def _missing_file_message(path: Path) -> str:
    folder, shown = path.parent, one_line(str(path))
    has_suffix = re.fullmatch(r"\.[a-zA-Z]\w*", path.suffix)
    may_be_prompt = not has_suffix and (" " in shown or path.name == str(path))
    row = '; if this text is a prompt, write it as a row: {"prompt": ...}' if may_be_prompt else ""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return f"no data file {shown}: the folder {one_line(str(folder))} does not exist{row}"
    near = did_you_mean(path.name, names)
    return f"no data file {shown} (a hub id has the form org/name){near}{row}"
