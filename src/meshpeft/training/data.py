"""Data files to records.

:func:`load_records` reads a file, :func:`split_held_out` sets some of its records aside for evaluation;
``documents.py`` makes tokens of them, ``packing.py`` rows and ``batches.py`` the batches of each rank.
All of these are pure functions of their arguments, so every rank gets the same data in the same order.
"""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshpeft.parallel.errors import MeshPEFTError

__all__ = [
    "ACCEPTED_COLUMNS",
    "DataError",
    "Record",
    "RecordFormat",
    "load_records",
    "record_format",
    "seeded_permutation",
    "split_held_out",
]

Record = Mapping[str, Any]
"""One example: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}`` (with ``"tools"`` at will)."""

RecordFormat = Literal["messages", "prompt/completion", "text"]

_REQUIRED: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL: dict[RecordFormat, tuple[str, ...]] = {"messages": ("tools",), "prompt/completion": (), "text": ()}
ACCEPTED_COLUMNS = '"text", or "prompt" and "completion", or "messages"'
_SUFFIXES = ".jsonl, .json, .csv, .parquet"


class DataError(MeshPEFTError):
    """The data cannot be used as given; the message is one sentence for the user."""


class _Row(NamedTuple):
    where: str
    """Where the row is, for messages: ``line 3`` or ``row 3``, counted from 1."""
    values: Mapping[str, Any]


def record_format(columns: Sequence[str]) -> RecordFormat | None:
    """The format that these columns hold: the first of chat, prompt/completion and text that is complete."""
    for name, required in _REQUIRED.items():
        if all(column in columns for column in required):
            return name
    return None


def load_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a data file into records that hold the columns of one format and nothing else.

    The suffix says how the file is read: ``.jsonl`` (one object per line), ``.json`` (a list of objects,
    or lines), ``.csv`` (with a header) or ``.parquet``. The first row decides which format the file has
    (see :func:`record_format`), and every row must have its columns, with a value.

    JSON and CSV are read by the standard library: the readers of ``datasets`` infer column types, which
    turns a completion ``2020-01-01`` into ``2020-01-01 00:00:00``, ``007`` into 7 and ``NA`` into nothing.
    Parquet carries its types and is streamed by ``datasets``, which leaves no cache behind.

    Args:
        path: the file.

    Returns:
        the records in the order of the file; at least one.

    Raises:
        DataError: the file is missing, empty, of another kind or cannot be parsed, it has no usable
            column, or a row lacks a value; the message names the file and, where there is one, the row.
    """
    path = Path(path)
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if not path.is_file():
        problem = "is not a file" if path.exists() else "no such file"
        raise DataError(f"{path}: {problem}; give a file that ends in one of {_SUFFIXES}.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; use one of {_SUFFIXES}.")
    records: list[dict[str, Any]] = []
    found: RecordFormat | None = None
    try:
        for row in reader(path):
            if found is None:
                found = record_format(list(row.values))
                if found is None:
                    columns = ", ".join(map(repr, row.values)) or "none"
                    raise DataError(f"{path}: no usable column; found {columns}, expected {ACCEPTED_COLUMNS}.")
            records.append(_checked(row, found, path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not records:
        raise DataError(f"{path}: holds no records; at least one is needed.")
    return records


def _read_json_lines(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(_parsed(line, path, f"line {number}"), path, f"line {number}")


def _read_json(path: Path) -> Iterator[_Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # More after a complete object: JSON Lines by another name.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_json_lines(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    for number, value in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _object(value, path, f"row {number}")


def _parsed(line: str, path: Path, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, {where}: not valid JSON ({error.msg} at column {error.colno}).") from error


def _object(value: Any, path: Path, where: str) -> _Row:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{path}, {where}: expected an object with named columns, found a {kind}.")
    return _Row(where, value)


def _read_csv(path: Path) -> Iterator[_Row]:
    # Documents are often longer than the csv module's default of 128 KiB per field.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns of its header have the same name: {', '.join(header)}.")
            for number, cells in enumerate(filter(None, rows), start=1):
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; "
                        "quote the cells that contain a comma."
                    )
                # CSV cannot tell an empty string from a missing value; both are a hole in the data.
                values = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield _Row(f"row {number}", values)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[_Row]:
    # Imported here: they take half a second, in every worker, that other files need not wait for.
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Read the footer first: `datasets` refuses a file without row groups with an obscure message.
        if pq.read_metadata(path).num_rows == 0:
            return
        names = pq.read_schema(path).names
        found = record_format(names)
        if found is None:
            yield _Row("row 1", dict.fromkeys(names))
            return
        columns = [name for name in (*_REQUIRED[found], *_OPTIONAL[found]) if name in names]
        stream = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path)), split="train", streaming=True, columns=columns
        )
        for number, values in enumerate(stream, start=1):
            yield _Row(f"row {number}", _without_nulls(values))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object of a column the keys of all of them, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(content) for key, content in value.items() if content is not None}
    if isinstance(value, list):
        return [_without_nulls(content) for content in value]
    return value


def _checked(row: _Row, found: RecordFormat, path: Path) -> dict[str, Any]:
    """The columns of the format, each with a value of the right kind."""
    at = f"{path}, {row.where}"
    record: dict[str, Any] = {}
    for column in _REQUIRED[found]:
        value = row.values.get(column)
        if value is None:
            raise DataError(f"{at}: {column!r} has no value; every row of a {found} file needs one.")
        record[column] = _checked_messages(value, at) if column == "messages" else _checked_text(value, column, at)
    for column in _OPTIONAL[found]:
        value = row.values.get(column)
        if value is not None:
            if not isinstance(value, list):
                raise DataError(f"{at}: {column!r} is of type {type(value).__name__}; expected a list.")
            record[column] = value
    return record


def _checked_text(value: Any, column: str, at: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at}: {column!r} is of type {type(value).__name__}; expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: {column!r} holds half a surrogate pair, which is not text.") from error
    return value


def _checked_messages(value: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{at}: 'messages' must be a list, not empty, of objects with 'role' and 'content'.")
    messages = []
    for number, given in enumerate(value, start=1):
        message = {key: content for key, content in given.items() if content is not None}
        for key in ("role", "content"):
            if key == "content" and "tool_calls" in message and key not in message:
                continue
            if key not in message:
                raise DataError(f"{at}: message {number} has no {key!r}.")
            _checked_text(message[key], key, f"{at}, message {number}")
        messages.append(message)
    return messages


def seeded_permutation(count: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on its arguments alone.

    It must not change with the version of NumPy, or a resumed run would see other data: the legacy
    ``RandomState`` and ``SeedSequence`` are the generators whose streams NumPy has frozen (NEP 19).

    Args:
        count: number of elements.
        seed: the run's seed, not negative.
        stream: further non-negative integers that tell independent uses of one seed apart.
    """
    if seed < 0:
        raise DataError(f"seed: {seed} is negative; use 0 or more.")
    source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *stream])))
    return source.permutation(count).astype(np.int64, copy=False)


def split_held_out(
    records: Sequence[Record], fraction: float = 0.05, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Set records aside for evaluation.

    Args:
        records: at least two.
        fraction: the part to set aside, between 0 and 1; at least one record goes to each side.
        seed: chooses the records.

    Returns:
        the training records and the held-out records, each in the order given.

    Raises:
        DataError: the fraction is not between 0 and 1, or there are fewer than two records.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"held-out fraction: {fraction} is not between 0 and 1.")
    count = len(records)
    if count < 2:
        raise DataError(f"number of records: {count} cannot be split into training and held-out data; use 2 or more.")
    held = min(max(1, round(count * fraction)), count - 1)
    is_held = np.zeros(count, dtype=bool)
    is_held[seeded_permutation(count, seed)[:held]] = True
    return (
        [record for record, out in zip(records, is_held, strict=True) if not out],
        [record for record, out in zip(records, is_held, strict=True) if out],
    )
