"""Hostile data files: a sentence or good records, never a traceback, a hang or a full memory."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.fuzz import MANY, Generator, generators, guarded, json_bytes, mutated_bytes, mutated_json

from meshpeft.data import documents, files
from meshpeft.data.documents import tokenize_records
from meshpeft.data.files import DataError
from meshpeft.data.records import load_records
from meshpeft.data.templates import chat_templates

TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}{% endfor %}"
)
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "yes", "reasoning_content": "so", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
RECORDS: tuple[list[dict[str, Any]], ...] = (
    [{"text": "one", "n": 1}, {"text": "two", "n": None}],
    [{"prompt": "a", "completion": "b", "x": [1]}, {"prompt": "c", "completion": "007"}],
    [CHAT],
)


def _lines(records: list[dict[str, Any]], rng: Generator) -> bytes:
    place = rng.randrange(len(records))
    lines = [json_bytes(record) for record in records]
    lines[place] = mutated_json(records[place], rng)
    return b"\n".join(lines)


def _csv(records: list[dict[str, Any]], rng: Generator) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, sorted({name for record in records for name in record}))
    writer.writeheader()
    writer.writerows(records)
    return mutated_bytes(out.getvalue().encode(), rng)


def _parquet(records: list[dict[str, Any]], rng: Generator) -> bytes:
    out = io.BytesIO()
    if rng.random() < 0.5:  # another type of column
        column = rng.choice(list(records[0]))
        values = rng.choice(([None], [1.5, float("nan")], [b"\xff\xfe"], [[1]], [{"a": [{"b": "c"}]}], ["a" * 10_000]))
        records = [{**record, column: rng.choice(values)} for record in records]
    pq.write_table(pa.Table.from_pylist(records), out, compression=rng.choice(("none", "snappy", "zstd")))
    return mutated_bytes(out.getvalue(), rng) if rng.random() < 0.8 else out.getvalue()


WRITERS = {".jsonl": _lines, ".json": mutated_json, ".csv": _csv, ".parquet": _parquet}


@MANY
@pytest.mark.parametrize("suffix", WRITERS)
def test_no_data_file_ends_in_a_traceback(suffix: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    tokenizer = byte_tokenizer(TEMPLATE)
    with chat_templates(None):
        tokenize_records([CHAT], tokenizer, 64)
        for rng in generators(suffix, count):
            path.write_bytes(WRITERS[suffix](rng.choice(RECORDS), rng))
            with guarded(tmp_path, rng):
                tokenize_records(load_records(path), tokenizer, 64)


def _message(**fields: Any) -> Any:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


def _called(arguments: Any) -> Any:
    return _message(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


DEEP = "[" * 100_000 + "]" * 100_000
LINES: dict[str, tuple[str, str]] = {
    "nested deep": (f'{{"text": "a", "x": {DEEP}}}', "line 1: cannot be read .it is nested too deep"),
    "digits": ('{"text": "a", "x": ' + "9" * 5000 + "}", "line 1: cannot be read .a number has more than 4,300"),
    "twice": ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
    "half a pair": ('{"text": "\\ud83d"}', "'text' holds half a surrogate pair"),
    "in a role": (json.dumps({"messages": [{"role": "\ud83d", "content": "a"}]}), "'role' holds half a surrogate"),
    "in arguments": (json.dumps(_called({"x": ["\ud83d"]})), "message 2, 'tool_calls', .* half a surrogate"),
    "in a key": (json.dumps(_message(x={"\ud83d": 1})), "message 2, 'x': a key holds half a surrogate"),
    "in arguments as text": (json.dumps(_called(json.dumps({"x": "\ud83d"}))), "arguments of a call, 'x' holds half"),
    "in tools": (json.dumps({**_message(), "tools": [{"x": "\ud83d"}]}), "'tools', 'x' holds half a surrogate"),
    "not a number": (json.dumps(_called({"x": float("nan")})), "is nan, which JSON has no number for"),
    "depth 100": (json.dumps(_message(x=json.loads("[" * 100 + "]" * 100))), "nested deeper than 64"),
    "depth as text": (json.dumps(_called('{"x": ' + "[" * 100 + "]" * 100 + "}")), "nested deeper than 64"),
    "list": ("[1, 2]", "expected an object"),
    "no text": ('{"text": ["a"]}', "is of type list; expected a string"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("suffix", (".jsonl", ".json"))
def test_a_bad_record_is_a_sentence_with_its_place(name: str, suffix: str, tmp_path: Path) -> None:
    line, said = LINES[name]
    path = tmp_path / f"data{suffix}"
    path.write_text(f"[{line}]" if suffix == ".json" else f"{line}\n")
    if suffix == ".json":
        said = said.replace("line 1: cannot be read .", "line 1: not valid JSON .")
    with guarded(tmp_path, name), pytest.raises(DataError, match=said) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}, ")


def _long(kind: str, size: int) -> bytes:
    text = b"a" * size
    return {
        ".jsonl": b'{"text": "' + text + b'"}\n',
        ".json": b'[{"text": "' + text + b'"}]',
        ".csv": b"text,n\n" + text + b",1\n",
        ".csv quoted": b'text,n\n"' + b"a\n" * (size // 2) + b'",1\n',
        ".csv cells": b"text,n\n" + b'"\n",' * (size // 4) + b"1\n",
        ".json spaces": b" " * size + b'[{"text": "a"}]',
    }[kind]


@pytest.mark.parametrize("kind", (".jsonl", ".json", ".csv", ".csv quoted", ".csv cells"))
def test_a_record_without_an_end_is_refused_before_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_ROW_CHARACTERS", 2**18)
    monkeypatch.setattr(files, "_CHUNK", 2**16)
    path = tmp_path / f"data{kind.partition(' ')[0]}"
    path.write_bytes(_long(kind, 2**24))
    with guarded(tmp_path, kind, megabytes=12), pytest.raises(DataError, match=r"more than|longer than") as error:
        load_records(path)
    assert "line" in str(error.value) and "split" in str(error.value)


@pytest.mark.parametrize("kind", (".jsonl", ".json", ".csv", ".parquet"))
def test_a_text_that_is_too_long_for_a_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    size = files.MOST_CHARACTERS + 1
    if kind == ".parquet":
        pq.write_table(pa.table({"text": ["a", "a" * size]}), path)
    else:
        path.write_bytes(_long(kind, size))
    row = "row 2" if kind == ".parquet" else "line 1" if kind == ".jsonl" else "row 1"
    with pytest.raises(DataError, match=f"{row}: 'text' has 4,194,305 characters; split it"):
        load_records(path)


def test_a_chat_that_is_too_long_for_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    messages = [{"role": role, "content": "a" * (files.MOST_CHARACTERS // 3)} for role in ("user", "assistant") * 2]
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r"line 1: 'messages' have .* characters up to message 3; expected 4,194,304"):
        load_records(path)


def test_long_texts_are_not_tokenised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 10)
    monkeypatch.setattr(documents, "_TOKENIZER_BATCH", 3)
    for lengths, expected in (
        ([4, 4, 4, 12, 1, 9, 10], [[4, 4], [4], [12], [1, 9], [10]]),
        ([1] * 7, [[1] * 3, [1] * 3, [1]]),
        ([11], [[11]]),
    ):
        batches = documents._batches([{"text": "a" * length} for length in lengths])
        assert [[len(record["text"]) for record in batch] for batch in batches] == expected


def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(0)
    records = [{"text": 'é\\"\n' * rng.randrange(1, 40), "n": rng.choice((1, -1.5e10, None, True))} for _ in range(200)]
    path = tmp_path / "data.json"
    for chunk in (1, 7, 64, 2**20):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        for indent in (None, 1):
            path.write_text(json.dumps(records, indent=indent))
            assert [record["text"] for record in load_records(path)] == [record["text"] for record in records]
        path.write_text(json.dumps(records[0], indent=2))
        assert load_records(path) == [{"text": records[0]["text"]}]
        path.write_text("\n".join(map(json.dumps, records)))
        assert len(load_records(path)) == 200
        for text, said in (
            ('[{"text": "a"},\n{"text": "b" "c"}]', "line 2: not valid JSON .Expecting ',' delimiter"),
            ('[{"text": "a"}\n', "line 2: not valid JSON"),
            ('[{"text": "a"},\n\n]', "line 3: not valid JSON"),
            ('[{"text": "a"}]\n]', "line 2: not valid JSON .Extra data"),
            ('[{"text": "a\n"}]', "line 1: not valid JSON .Invalid control character"),
            ('[{"text": "a', "line 1: not valid JSON .Unterminated string"),
            ("[12", "row 1: expected an object with named columns, found a int"),
            ("[]", "holds no records"),
        ):
            path.write_text(text)
            with pytest.raises(DataError, match=said):
                load_records(path)


@pytest.mark.parametrize("end", ("", "\n", "\r\n"))
def test_a_line_that_breaks_off_is_blamed_where_it_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(('{"text": "a"}\n{"text": ' + end).encode())
    with pytest.raises(DataError, match=r"line 2: not valid JSON \(Expecting value at column 1[01]\)"):
        load_records(path)


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    (tmp_path / "folder.jsonl").mkdir()
    device = tmp_path / "zero.jsonl"
    device.symlink_to("/dev/zero")
    for path, said in (
        (pipe, "a pipe or a device is not a file"),
        (device, "a pipe or a device is not a file"),
        (tmp_path / "folder.jsonl", "a directory is not a file"),
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "none.jsonl" / "x.jsonl", "no such file"),
        (tmp_path / ("a" * 300), "cannot be read: File name too long"),
        (Path("a\0b.jsonl"), "no such file"),
    ):
        with guarded(tmp_path, said), pytest.raises(DataError, match=said):
            load_records(path)


def test_a_file_that_may_not_be_read_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    for suffix in WRITERS:
        path = tmp_path / f"data{suffix}"
        path.write_bytes(b"x")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refused)
            patch.setattr(pq, "ParquetFile", refused)
            with pytest.raises(DataError, match="cannot be read: Permission denied"):
                load_records(path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refused)
            with pytest.raises(DataError, match="cannot be read: Permission denied"):
                load_records(path)


def test_parquet_needs_no_cache_and_holds_types_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    path = tmp_path / "data.parquet"
    given = datetime.datetime(2024, 1, 1)
    pq.write_table(pa.Table.from_pylist([_message(), _called({"x": given})]), path)
    with pytest.raises(DataError, match=r"row 2, message 2, 'tool_calls', .* is of type datetime; expected text"):
        load_records(path)
    pq.write_table(pa.Table.from_pylist([{"text": str(number)} for number in range(1000)]), path, row_group_size=77)
    assert [record["text"] for record in load_records(path)] == [str(number) for number in range(1000)]
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match="two of its columns have the same name"):
        load_records(path)
    assert not list(home.iterdir())
