"""Rows of data files to records of one format: a text, a prompt with its completion, or a chat's messages.

Data sets mark in several ways what is learned. Such a column or field is honoured or refused, never ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meshpeft.data.files import MOST_CHARACTERS, DataError, Row, check_plain, check_text, read_rows, resolved
from meshpeft.parallel.errors import shown

__all__ = [
    "ACCEPTED_COLUMNS",
    "LEARN_KEYS",
    "REASONING_KEYS",
    "FileRecord",
    "Findings",
    "Message",
    "Record",
    "RecordFormat",
    "calls_of",
    "check_messages",
    "function_of",
    "is_blank",
    "is_learned",
    "load_records",
    "nothing_to_learn",
    "parsed_arguments",
    "place_of",
    "record_format",
]

Record = Mapping[str, Any]
"""One example: `{"text"}`, `{"prompt", "completion"}` or `{"messages"}` (with `"tools"` at will)."""

RecordFormat = Literal["messages", "prompt/completion", "text"]

_REQUIRED: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL: dict[RecordFormat, tuple[str, ...]] = {"messages": ("tools",), "prompt/completion": (), "text": ()}

# Columns that mark what is learned, or belong to the example: to leave them out would train on something else.
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


class FileRecord(dict[str, Any]):
    """A record with its place in a file.

    Attributes:
        where: Its file, and its line or row there, counted from 1.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def place_of(record: Record, number: int) -> str:
    """Name the place of a record for messages; the record's number if it comes from no file."""
    if isinstance(record, FileRecord):
        return record.where
    return f"{'chat' if 'messages' in record else 'record'} {number}"


@dataclass(frozen=True)
class Findings:
    """What was found in the records, how often, and where first."""

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
        """Return a line for each finding."""
        return [f"{what}: {count:,} (first: {self.first[what]})" for what, count in self.counts.items()]


def record_format(columns: Sequence[str]) -> RecordFormat | None:
    """Return the format of these columns: the first of chat, prompt/completion and text that is complete."""
    for name, required in _REQUIRED.items():
        if all(column in columns for column in required):
            return name
    return None


def load_records(*paths: str | Path, findings: Findings | None = None) -> list[FileRecord]:
    """Read data files into records that hold the columns of one format and nothing else.

    The suffix says how the file is read: `.jsonl` (one object per line), `.json` (a list of objects,
    or lines), `.csv` (with a header) or `.parquet`. The first row decides which format the files have
    (see `record_format`), and every row must have its columns, with a value.

    JSON and CSV are read by the standard library: the readers of `datasets` infer column types, which
    turns a completion `2020-01-01` into `2020-01-01 00:00:00`, `007` into 7 and `NA` into nothing.
    Parquet carries its types.

    Args:
        paths: Files of one format; at least one.
        findings: Receives the columns that are left out.

    Returns:
        The records (`FileRecord`) in the order of the files; at least one of each.

    Raises:
        DataError: A file is missing, empty, of another kind or cannot be parsed, it has no usable
            column, a row lacks a value, or a column or a field of a message marks what is learned in a way that
            cannot be honoured; the message names the file and, where there is one, the line or row.
    """
    records: list[FileRecord] = []
    found: RecordFormat | None = None
    unread: Counter[str] = Counter()
    unread_at: dict[str, str] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        if resolved(path) in seen:
            raise DataError(f"{path}: given twice; its records would be learned twice.")
        seen.add(resolved(path))
        before = len(records)
        for row in read_rows(path, _chosen):
            here = record_format(list(row.values)) if len(records) == before else found
            if here is None:
                columns = shown(list(row.values)).strip("[]") or "none"
                raise DataError(f"{path}: no usable column; found {columns}, expected {ACCEPTED_COLUMNS}.")
            if found not in (None, here):
                raise DataError(f"{path}: holds {here}, but {paths[0]} holds {found}; give files of one format.")
            found = here
            records.append(_checked(row, found, path))
            others = [name for name, value in row.values.items() if value is not None and name not in records[-1]]
            for name in (*others, *row.unread):
                unread[name] += 1
                unread_at.setdefault(name, records[-1].where)
        if len(records) == before:
            raise DataError(f"{path}: holds no records; at least one is needed.")
    if findings is not None:
        for name, count in sorted(unread.items()):
            findings.add(f"rows with a column {shown(name)} that is not read", unread_at[name], count)
    return records


def _chosen(names: Sequence[str]) -> list[str] | None:
    """Choose the columns to read: those of the format, and those that must not be left out silently."""
    found = record_format(names)
    if found is None:
        return None
    asked = {*_REQUIRED[found], *_OPTIONAL[found], *_REFUSED, *_REFUSED_BESIDE[found]}
    return [name for name in names if name in asked]


def _checked(row: Row, found: RecordFormat, path: Path) -> FileRecord:
    """Return the columns of the format, each with a value of the right kind."""
    at = f"{path}, {row.where}"
    record = FileRecord({}, at)
    for column in _REQUIRED[found]:
        value = row.values.get(column)
        if value is None:
            raise DataError(f"{at}: {column!r} has no value; every row of a {found} file needs one.")
        record[column] = (
            _checked_messages(value, at) if column == "messages" else check_text(value, f"{at}: {column!r}")
        )
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
    check_plain(value, f"{at}: {column!r}")
    return value


def _checked_messages(value: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{at}: 'messages' must be a list, not empty, of objects with 'role' and 'content'.")
    messages = []
    characters = 0
    for number, given in enumerate(value, start=1):
        message = {key: content for key, content in given.items() if content is not None}
        for key in ("role", "content"):
            if key == "content" and message.get("tool_calls") and key not in message:
                continue
            if key not in message:
                raise DataError(f"{at}: message {number} has no {key!r}.")
            check_text(message[key], f"{at}, message {number}: {key!r}")
        characters += check_plain(message, f"{at}, message {number}")
        if characters > MOST_CHARACTERS:
            raise DataError(
                f"{at}: 'messages' have {characters:,} characters up to message {number}; expected "
                f"{MOST_CHARACTERS:,} at most in a chat."
            )
        messages.append(message)
    try:
        check_messages(messages)
        for number, message in enumerate(messages, start=1):
            for call in calls_of(message):  # which may hold them as JSON text
                check_plain(parsed_arguments(call), f"{at}, message {number}: the arguments of a call")
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{at}, {error}") from error
    return messages


def nothing_to_learn(record: Record) -> str | None:
    """Return why nothing can be learned from a record, or None: it holds no answer, or a blank one.

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


Message = Mapping[str, Any]

LEARN_KEYS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Fields of a message that decide whether it is learned: 1 and true, 0 and false."""

_REFUSED_KEYS = {
    **dict.fromkeys(("mask", "masked", "labels", "loss_weight", "loss_scale", "train_detail", "weights"), "learned"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos", "input_audio"), "media"),
    "function_call": "call",
}
_REFUSALS = {
    "learned": f"is not read; say which messages are learned with 'weight': 0 or 1 (or {', '.join(LEARN_KEYS[1:])})",
    "media": "cannot be learned from; only text can",
    "call": "is not read by chat templates; give it as 'tool_calls'",
}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Fields that hold an answer's reasoning."""


def is_learned(message: Message) -> bool:
    """Return whether a message is learned by its fields (`LEARN_KEYS`); without any, an assistant's is.

    Raises:
        ValueError: A field has another value than 0, 1, true and false, or they contradict each other, or ask for a
            message that is not the assistant's.
    """
    said = {}
    for key in LEARN_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{key!r} is {shown(value)}; expected 0 or 1: a turn is learned or it is not")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, said))} contradict each other; give one")
    if message.get("role") == "assistant":
        return all(said.values())
    if any(said.values()):
        raise ValueError(f"{next(iter(said))!r} asks to learn a message of role {shown(message.get('role'))}; "
                         "only the assistant's are learned")  # fmt: skip
    return False


def is_blank(message: Message) -> bool:
    """Return whether a message holds nothing to learn: no text but white space, no reasoning and no call."""
    texts = (message.get(key) for key in ("content", *REASONING_KEYS))
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def check_messages(messages: Sequence[Message]) -> None:
    """Check the fields of a chat's messages that decide what is learned, and the tool calls.

    Raises:
        ValueError: A field cannot be honoured; the message is named.
    """
    for number, message in enumerate(messages, start=1):
        try:
            if not isinstance(message.get("role"), str):
                raise ValueError("there is no 'role', a text")
            for key, kind in _REFUSED_KEYS.items():
                if message.get(key) not in (None, [], {}):
                    raise ValueError(f"{key!r} {_REFUSALS[kind]}")
            is_learned(message)
            for call in calls_of(message):
                parsed_arguments(call)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}.") from error


def calls_of(message: Message) -> list[Mapping[str, Any]]:
    """Return the tool calls of a message."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("'tool_calls' must be a list of objects")
    return calls


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the name and arguments of a tool call, which some formats hold without a `function` around them."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call must hold a 'function' with a 'name' and its 'arguments'")
    return function


def parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a call as an object: OpenAI's format holds them as its JSON text."""
    function = function_of(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of the call of {shown(function['name'])} are text that is not a JSON object: "
                f"{shown(function['arguments'])}"
            )
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise ValueError(
            f"the arguments of the call of {shown(function['name'])} are of type {kind}; expected an object"
        )
    return arguments
