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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training.messages import check_messages, is_blank, is_learned

__all__ = [
    "ACCEPTED_COLUMNS",
    "DataError",
    "FileRecord",
    "Findings",
    "Record",
    "RecordFormat",
    "load_records",
    "nothing_to_learn",
    "place_of",
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

# Columns that say what is learned, or belong to the example: to leave them out would train on something else.
_REFUSED: dict[str, str] = {
    **dict.fromkeys(("weight", "weights", "loss_weight", "loss_mask", "loss", "train", "trainable", "mask", "labels"),
                    "says what is learned, and is read in messages only ('weight': 0 or 1)"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "cannot be learned from; only text can"),
    **dict.fromkeys(("system", "history"), "belongs to the example; put it into the messages, or into the prompt"),
    **dict.fromkeys(("chosen", "rejected"), "is for learning from preferences, which finetune does not do"),
    **dict.fromkeys(("functions", "function_call"), "is an older form; give 'tools' and 'tool_calls' beside messages"),
    **dict.fromkeys(("documents", "chat_template_kwargs"), "is not handed to the chat template"),
}  # fmt: skip
_REFUSED_BESIDE: dict[RecordFormat, dict[str, str]] = {
    "messages": {},
    "prompt/completion": {
        "tools": "is read beside messages only",
        "label": "marks completions as good or bad, which finetune does not tell apart",
    },
    "text": {"tools": "is read beside messages only"},
}
ACCEPTED_COLUMNS = '"text", or "prompt" and "completion", or "messages"'
_SUFFIXES = ".jsonl, .json, .csv, .parquet"


class DataError(MeshPEFTError):
    """The data cannot be used as given; the message is one sentence for the user."""


class FileRecord(dict[str, Any]):
    """A record that knows where it is from.

    Attributes:
        where: its file, and its line or row there, counted from 1.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def place_of(record: Record, number: int) -> str:
    """Where a record is from, for messages; of one that is from no file, its number."""
    if isinstance(record, FileRecord):
        return record.where
    return f"{'chat' if 'messages' in record else 'record'} {number}"


@dataclass(frozen=True)
class Findings:
    """What is to be said of the records: how often each thing was found, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str, count: int = 1) -> None:
        """Count what was found at a place."""
        self.counts[what] += count
        self.first.setdefault(what, where)

    def update(self, other: Findings) -> None:
        """Add what others found."""
        for what, count in other.counts.items():
            self.add(what, other.first[what], count)

    def lines(self) -> list[str]:
        """A line for each thing."""
        return [f"{count:,} {what} (first: {self.first[what]})" for what, count in self.counts.items()]


class _Row(NamedTuple):
    where: str
    """Where the row is, for messages: ``line 3`` or ``row 3``, counted from 1."""
    values: Mapping[str, Any]
    unread: Sequence[str] = ()
    """Columns that were not read, being of no use."""


def record_format(columns: Sequence[str]) -> RecordFormat | None:
    """The format that these columns hold: the first of chat, prompt/completion and text that is complete."""
    for name, required in _REQUIRED.items():
        if all(column in columns for column in required):
            return name
    return None


def load_records(*paths: str | Path, findings: Findings | None = None) -> list[dict[str, Any]]:
    """Read data files into records that hold the columns of one format and nothing else.

    The suffix says how the file is read: ``.jsonl`` (one object per line), ``.json`` (a list of objects,
    or lines), ``.csv`` (with a header) or ``.parquet``. The first row decides which format the files have
    (see :func:`record_format`), and every row must have its columns, with a value.

    JSON and CSV are read by the standard library: the readers of ``datasets`` infer column types, which
    turns a completion ``2020-01-01`` into ``2020-01-01 00:00:00``, ``007`` into 7 and ``NA`` into nothing.
    Parquet carries its types and is streamed by ``datasets``, which leaves no cache behind.

    Args:
        paths: files of one format; at least one.
        findings: is told which columns are left out.

    Returns:
        the records (:class:`FileRecord`) in the order of the files; at least one of each.

    Raises:
        DataError: a file is missing, empty, of another kind or cannot be parsed, it has no usable
            column, a row lacks a value, or a column or a field of a message says what is learned in a way that
            cannot be honoured; the message names the file and, where there is one, the line or row.
    """
    records: list[dict[str, Any]] = []
    found: RecordFormat | None = None
    unread: Counter[str] = Counter()
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise DataError(f"{path}: given twice; its records would be learned twice.")
        seen.add(path.resolve())
        before = len(records)
        for row in _rows(path):
            here = record_format(list(row.values)) if len(records) == before else found
            if here is None:
                columns = ", ".join(map(repr, row.values)) or "none"
                raise DataError(f"{path}: no usable column; found {columns}, expected {ACCEPTED_COLUMNS}.")
            if found not in (None, here):
                raise DataError(f"{path}: holds {here}, but {paths[0]} holds {found}; give files of one format.")
            found = here
            records.append(_checked(row, found, path))
            unread.update(name for name, value in row.values.items() if value is not None and name not in records[-1])
            unread.update(row.unread)
        if len(records) == before:
            raise DataError(f"{path}: holds no records; at least one is needed.")
    if findings is not None and unread:
        findings.add(
            f"columns of {found} files not read: {', '.join(map(repr, sorted(unread)))}", str(paths[0]), len(unread)
        )
    return records


def _rows(path: Path) -> Iterator[_Row]:
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if not path.is_file():
        problem = "is not a file" if path.exists() else "no such file"
        raise DataError(f"{path}: {problem}; give a file that ends in one of {_SUFFIXES}.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; use one of {_SUFFIXES}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


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
        asked = {*_REQUIRED[found], *_OPTIONAL[found], *_REFUSED, *_REFUSED_BESIDE[found]}
        columns = [name for name in names if name in asked]
        unread = [name for name in names if name not in asked]
        stream = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path)), split="train", streaming=True, columns=columns
        )
        for number, values in enumerate(stream, start=1):
            yield _Row(f"row {number}", _without_nulls(values), unread)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object of a column the keys of all of them, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(content) for key, content in value.items() if content is not None}
    if isinstance(value, list):
        return [_without_nulls(content) for content in value]
    return value


def _checked(row: _Row, found: RecordFormat, path: Path) -> FileRecord:
    """The columns of the format, each with a value of the right kind."""
    at = f"{path}, {row.where}"
    record = FileRecord({}, at)
    for column in _REQUIRED[found]:
        value = row.values.get(column)
        if value is None:
            raise DataError(f"{at}: {column!r} has no value; every row of a {found} file needs one.")
        record[column] = _checked_messages(value, at) if column == "messages" else _checked_text(value, column, at)
    for column in _OPTIONAL[found]:
        value = row.values.get(column)
        if value is not None:
            record[column] = _checked_tools(value, column, at)
    for column, why in (*_REFUSED.items(), *_REFUSED_BESIDE[found].items()):
        if row.values.get(column) not in (None, [], {}, ""):
            raise DataError(f"{at}: the column {column!r} {why}. Remove it if it is not meant.")
    return record


def _checked_tools(value: Any, column: str, at: str) -> list[dict[str, Any]]:
    given = value
    if isinstance(value, str):  # as tables hold them, whose columns have one type
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        kind = type(given).__name__
        raise DataError(f"{at}: {column!r} is of type {kind}; expected a list of objects, or the JSON text of one.")
    return value


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
            if key == "content" and message.get("tool_calls") and key not in message:
                continue
            if key not in message:
                raise DataError(f"{at}: message {number} has no {key!r}.")
            _checked_text(message[key], key, f"{at}, message {number}")
        messages.append(message)
    try:
        check_messages(messages)
    except ValueError as error:
        raise DataError(f"{at}, {error}") from error
    return messages


def nothing_to_learn(record: Record) -> str | None:
    """Why nothing can be learned from a record, or None: it holds no answer, or one that is blank.

    A blank answer would teach the model to say nothing.
    """
    if "messages" not in record:
        column = "completion" if "prompt" in record else "text"
        return None if record[column].strip() else f"blank {column}"
    messages = record["messages"]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = sorted({str(message["role"]) for message in messages})
        return f"no message of role 'assistant', which is what is learned (only {', '.join(map(repr, roles))})"
    kept = [message for message in answers if is_learned(message)]
    if not kept:
        return "every assistant message has weight 0"
    return "every assistant message is blank" if all(map(is_blank, kept)) else None


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
