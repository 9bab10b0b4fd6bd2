from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meshpeft.data.batches import seeded_permutation, split_held_out
from meshpeft.data.files import DataError
from meshpeft.data.records import load_records

# What type inference, or a null by another name, would change: none of it may.
PAIRS = [
    {"prompt": "When?", "completion": "2020-01-01"},
    {"prompt": "NA", "completion": "007"},
    {"prompt": "line\nbreak, comma", "completion": '{"a": 1}'},
    {"prompt": "ünï", "completion": "true"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = {key: None for row in rows for key in row}
    pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_every_format_gives_the_same_strings_and_only_the_columns_used(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data [1]*{suffix}"  # a name that must not be read as a pattern
    WRITERS[suffix](path, [row | {"id": number} for number, row in enumerate(PAIRS)])
    assert load_records(path) == PAIRS


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_an_edited_file_is_read_anew(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, [{"text": "one"}])
    load_records(path)
    WRITERS[suffix](path, [{"text": "two"}])
    assert load_records(str(path)) == [{"text": "two"}]


@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".parquet"))
def test_messages_keep_their_own_keys_only(tmp_path: Path, suffix: str) -> None:
    calls = [[{"function": {"name": "f"}}], [{"function": {"name": "g", "strict": True}}]]
    chats = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls[0]}]},
        {"messages": [{"role": "assistant", "content": "so", "tool_calls": calls[1]}]},
        {"messages": [{"role": "assistant", "content": "yo"}], "tools": [{"name": "f"}]},
    ]
    path = tmp_path / f"chats{suffix}"
    WRITERS[suffix](path, [{"text": "not used"} | chat for chat in chats])
    assert load_records(path) == chats


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_jsonl(path, PAIRS)
    assert load_records(path) == PAIRS


BAD_FILES = [
    ("a.txt", b"x", r"a\.txt.*\.jsonl, \.json, \.csv or \.parquet"),
    ("a.jsonl", b"\n \n", r"a\.jsonl: holds no records"),
    ("a.json", b"", r"holds no records"),
    ("a.json", b"[]", r"holds no records"),
    ("a.csv", b"text\n", r"holds no records"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3: not valid JSON"),
    ("a.json", b'[{"text": "a"},\n}]', r"line 2: not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: expected an object .* found a list"),
    ("a.jsonl", b'{"texts": "a", "prompt": "b"}', r"found 'texts', 'prompt', expected \"text\", or"),
    ("a.csv", b"prompt,completions\na,b\n", r"found 'prompt', 'completions'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}', r"line 2: 'text' has no value"),
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', r"line 2: 'completion' has no value"),
    ("a.jsonl", b'{"prompt": "a", "completion": 7}', r"line 1: 'completion' is of type int"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: 'text' holds half a surrogate"),
    ("a.csv", b"prompt,completion\na,b\nc,\n", r"row 2: 'completion' has no value"),
    ("a.csv", b"prompt,completion\na,b, and c\n", r"row 1: 3 cells under 2 columns"),
    ("a.csv", b'prompt,completion\na,"b\n', r"not valid CSV"),
    ("a.csv", b"text,text\na,b\n", r"same name"),
    ("a.csv", b"text\n\xff\n", r"not UTF-8"),
    ("a.parquet", b"PAR1", r"not a readable Parquet file"),
    ("a.jsonl", b'{"messages": []}', r"line 1: 'messages' must be a list, not empty"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', r"message 2 has no 'cont"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": ["a"]}]}', r"message 1: 'content' is of type list"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named_with_the_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_records(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_parquet_tables_are_named_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": "a"}, {"text": None}])
    with pytest.raises(DataError, match="row 2: 'text' has no value"):
        load_records(path)
    write_parquet(path, [{"texts": "a"}])
    with pytest.raises(DataError, match="no usable column; found 'texts'"):
        load_records(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="holds no records"):
        load_records(path)


@pytest.mark.parametrize("name", ("missing.jsonl", "."))
def test_what_is_not_a_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no such file|is not a file"):
        load_records(tmp_path / name)


def test_held_out_split_is_a_partition_drawn_from_the_seed() -> None:
    records = [{"text": str(number)} for number in range(100)]
    train, held_out = split_held_out(records, fraction=0.1, seed=3)
    assert len(held_out) == 10
    assert sorted(train + held_out, key=lambda r: int(r["text"])) == records
    assert (train, held_out) == split_held_out(records, fraction=0.1, seed=3)
    assert held_out != split_held_out(records, fraction=0.1, seed=4)[1]


@pytest.mark.parametrize("fraction", (0.001, 0.999))
def test_held_out_split_leaves_a_record_on_each_side(fraction: float) -> None:
    train, held_out = split_held_out([{"text": "a"}, {"text": "b"}], fraction=fraction)
    assert (len(train), len(held_out)) == (1, 1)


@pytest.mark.parametrize(("count", "fraction"), ((1, 0.5), (0, 0.5), (9, 0.0), (9, 1.0)))
def test_held_out_split_refuses_what_cannot_be_split(count: int, fraction: float) -> None:
    with pytest.raises(DataError):
        split_held_out([{"text": "a"}] * count, fraction=fraction)


def test_permutations_do_not_change_with_the_version_of_numpy() -> None:
    # Written down once: a resumed run depends on them.
    assert seeded_permutation(8, 0).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert seeded_permutation(8, 7, 2, 1).tolist() == [7, 0, 3, 2, 6, 4, 1, 5]
    with pytest.raises(DataError, match="seed: -1"):
        seeded_permutation(8, -1)
