"""Data files to rows, one after another and within bounds.

A file may be of any size; a row may not. What is read at a time is bounded whatever the file holds: a line without an
end, a cell whose quote is never closed, a list nested a million deep, a number of as many digits. JSON and CSV are read
by the standard library and Parquet by PyArrow, in pieces; no reader infers types, uses a network or writes a cache.
"""

from __future__ import annotations

import csv
import json
import math
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from meshpeft.parallel.errors import MeshPEFTError, first_line, shown

__all__ = ["MOST_CHARACTERS", "DataError", "Row", "check_plain", "check_text", "resolved", "read_rows"]

MOST_ROW_CHARACTERS = 16 * 2**20
"""Most characters in a line, or in an object of a list, with all its columns."""
MOST_CHARACTERS = 4 * 2**20
"""Most characters in a text, and in the messages of a chat together: a tokenizer takes some 200 bytes for each."""
MOST_DEPTH = 64
_CHUNK = 2**20
# Rows that Parquet decodes at once: each may be long.
_PARQUET_ROWS = 64

_SUFFIXES = ".jsonl, .json, .csv or .parquet"


class DataError(MeshPEFTError):
    """The data cannot be used as given; the message is one sentence for the user."""


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        where: Its place for messages: `line 3` or `row 3`, counted from 1.
        values: Values by column.
        unread: Columns that were not read, being of no use.
    """

    where: str
    values: Mapping[str, Any]
    unread: Sequence[str] = ()


Choice = Callable[[Sequence[str]], Collection[str] | None]
"""Chooses the columns to read among those of a file; `None` where none is of use."""


def read_rows(path: Path, choose: Choice) -> Iterator[Row]:
    """Read the rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    Args:
        path: Path of the file.
        choose: Chooses the columns to read, where the file's format lists them before its rows.

    Raises:
        DataError: There is no such file, or it cannot be read; the message names it, and the line or row.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": lambda path: _read_parquet(path, choose),
    }
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in its name
        raise DataError(f"{path}: no such file; expected one that ends in {_SUFFIXES}.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DataError(f"{path}: {kind} is not a file; expected one that ends in {_SUFFIXES}.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; expected {_SUFFIXES}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def resolved(path: Path) -> Path:
    """Return what two names of one file have in common."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # it cannot be read either, which its reader reports better
        return path


def check_text(value: Any, at: str) -> str:
    """Check a text of a row.

    Args:
        value: Value of a column or field.
        at: Its name, for messages.

    Raises:
        DataError: It is of another type, no text, or too long.
    """
    if not isinstance(value, str):
        raise DataError(f"{at} is of type {type(value).__name__}; expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at} holds half a surrogate pair, which is not text.") from error
    if len(value) > MOST_CHARACTERS:
        raise DataError(f"{at} has {len(value):,} characters; split it into records of {MOST_CHARACTERS:,} at most.")
    return value


def check_plain(value: Any, at: str) -> int:
    """Check a nested value of a row, which templates and tokenizers get: JSON's types, text throughout, within bounds.

    Returns:
        Its characters.

    Raises:
        DataError: It holds anything else; the message names the place.
    """
    characters = _checked_size(value, at, MOST_DEPTH)
    if characters > MOST_CHARACTERS:
        raise DataError(f"{at} has {characters:,} characters; expected {MOST_CHARACTERS:,} at most.")
    return characters


def _checked_size(value: Any, at: str, depth: int) -> int:
    """Check all parts of a value, and count its characters."""
    if isinstance(value, str):
        return len(check_text(value, at))
    if value is None or isinstance(value, bool | int):
        return 1
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{at} is {value}, which JSON has no number for; expected a finite one, or null.")
        return 1
    if not depth:
        raise DataError(f"{at} is nested deeper than {MOST_DEPTH} levels; flatten it.")
    if isinstance(value, list):
        return 1 + sum(_checked_size(content, at, depth - 1) for content in value)
    if isinstance(value, dict):
        size = 1
        for key, content in value.items():
            if not isinstance(key, str):
                raise DataError(f"{at} has the key {shown(key)} of type {type(key).__name__}; expected a string.")
            inner = f"{at}, {shown(key)}"
            size += len(check_text(key, f"{at}: a key")) + _checked_size(content, inner, depth - 1)
        return size
    raise DataError(
        f"{at} is of type {type(value).__name__}; expected text, a number, true, false, a list or an object."
    )


class _DuplicateError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateError(f"the key {shown(twice)} is given twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _fault(error: Exception) -> str:
    """Describe why text is no value, for the exceptions of `json` other than its own error."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, _DuplicateError):
        return str(error)
    return "a number has more than 4,300 digits"


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            where = f"line {number}"
            if line.strip():
                try:
                    # Without its end: a line that breaks off would be blamed on column 1 of the line behind it.
                    value = _DECODER.decode(line.rstrip("\r\n"))
                except json.JSONDecodeError as error:
                    said = f"{error.msg} at column {error.colno}"
                    raise DataError(f"{path}, {where}: not valid JSON ({said}).") from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, {where}: cannot be read ({_fault(error)}).") from error
                yield _object(value, path, where)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(MOST_ROW_CHARACTERS + 1):
        number += 1
        if len(line) > MOST_ROW_CHARACTERS:
            raise DataError(
                f"{path}, line {number}: longer than {MOST_ROW_CHARACTERS:,} characters; split its text into several "
                "records, one a line."
            )
        yield line


def _object(value: Any, path: Path, where: str) -> Row:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{path}, {where}: expected an object with named columns, found a {kind}.")
    return Row(where, value)


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        text = _JsonText(file, path)
        first = text.next_character()
        if not first:
            return
        if first != "[":
            row = _object(text.value(), path, "row 1")
            if not text.next_character():
                yield row
                return
        else:
            yield from _list_items(text, path)
            return
    # More after a complete object: JSON Lines by another name.
    yield from _read_json_lines(path)


def _list_items(text: _JsonText, path: Path) -> Iterator[Row]:
    text.take("[")
    number = 0
    if text.next_character() != "]":
        while True:
            number += 1
            text.next_character()
            yield _object(text.value(), path, f"row {number}")
            if text.next_character() != ",":
                break
            text.take(",")
    text.take("]")
    if text.next_character():
        raise text.error("Extra data")


class _JsonText:
    """JSON text of which a window is in memory.

    Args:
        file: File, open at its beginning.
        path: Path of the file, for messages.
    """

    # A text that is cut off is at fault near its end, or where its last string begins.
    _NEAR = 16

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0
        self._line, self._ended = 1, False

    def next_character(self) -> str:
        """Return the next character that is not white space, without going past it; an empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go on behind this character, which must be the next."""
        if self.next_character() != character:
            raise self.error("Expecting ',' delimiter" if character == "]" else f"Expecting '{character}'")
        self._at += 1

    def value(self) -> Any:
        """Parse the value that begins at the next character."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - self._NEAR
                if cut and self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(_fault(error)) from error
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._at = end
            return value

    def error(self, what: str, at: int | None = None) -> DataError:
        """Make the error of the text at a place, by default the next character."""
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        return DataError(f"{self._path}, line {line}: not valid JSON ({what}).")

    def _more(self) -> bool:
        """Read on, unless the file has ended; what is done is forgotten."""
        rest = len(self._text) - self._at
        if rest > MOST_ROW_CHARACTERS:
            line = self._line + self._text.count("\n", 0, self._at)
            raise DataError(
                f"{self._path}, line {line}: a record of more than {MOST_ROW_CHARACTERS:,} characters; split its text "
                "into several records."
            )
        # As much again: what was parsed in vain is at most what is parsed in the end.
        part = "" if self._ended else self._file.read(max(_CHUNK, rest))
        self._ended = not part
        if part:
            self._line += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + part, 0
        return bool(part)


def _read_csv(path: Path) -> Iterator[Row]:
    # Documents are often longer than the csv module's default of 128 KiB per field.
    limit = csv.field_size_limit(MOST_ROW_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _CsvLines(file, path)
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns of its header have the same name: {shown(header)}.")
            number = 0
            for cells in rows:
                lines.characters = 0
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, row {number}: {len(cells):,} cells under {len(header):,} columns; "
                        "quote the cells that contain a comma."
                    )
                # CSV cannot tell an empty string from a missing value; both are a hole in the data.
                values = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield Row(f"row {number}", values)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)


class _CsvLines:
    """The lines of a CSV file; many may be one row. `characters`: those since the last row."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._lines, self._path = _lines(file, path), path
        self._number = self.characters = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self.characters += len(line)
        if self.characters > MOST_ROW_CHARACTERS:
            raise DataError(
                f"{self._path}, line {self._number}: a row has more than {MOST_ROW_CHARACTERS:,} characters; "
                "close the quote of its cell, or split its text into several rows."
            )
        return line


def _read_parquet(path: Path, choose: Choice) -> Iterator[Row]:
    # Imported here: it takes a while, in every worker, that other files need not wait for.
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two of its columns have the same name: {shown(names)}.")
            if not file.metadata.num_rows:
                return
            chosen = choose(names)
            if chosen is None:
                yield Row("row 1", dict.fromkeys(names))
                return
            unread = [name for name in names if name not in chosen]
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(chosen), use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", _without_nulls(values), unread)
    except (DataError, UnicodeDecodeError):
        raise
    except PermissionError:
        raise
    except Exception as error:  # PyArrow's errors are of many types, and files make more
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}).") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object of a column the keys of all of them, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(content) for key, content in value.items() if content is not None}
    if isinstance(value, list):
        return [_without_nulls(content) for content in value]
    return value
