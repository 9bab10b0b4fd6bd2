"""The guard of the fuzz tests sees what it is there to see."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import fuzz
from helpers.fuzz import generators, guarded, json_bytes, mutated_bytes, mutated_json

from meshpeft.parallel.errors import MeshPEFTError

VALUE = {"a": [1, 2.5, {"b": "text"}], "c": None, "d": True}


def _outside(directory: Path) -> None:
    (directory.parent / "outside").write_text("x")


def _move_outside(directory: Path) -> None:
    (directory / "x").touch()
    (directory / "x").rename(directory.parent / "x")


def _module(directory: Path) -> None:
    (directory / "own.py").write_text("")
    (directory / "own.py").read_text()


def _connect(directory: Path) -> None:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=0.1)


def _error(directory: Path) -> None:
    raise KeyError("x")


def _long(directory: Path) -> None:
    raise MeshPEFTError("x" * 10_000)


def _busy(directory: Path) -> None:
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass


@pytest.mark.parametrize("fault", (_outside, _move_outside, _module, _connect, _error, _long, _busy))
def test_the_guard_sees(fault: Callable[[Path], None], tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(AssertionError, match="input 1: "), guarded(inside, "input 1", seconds=0.1):
        fault(inside)


def test_the_guard_ends_what_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "PATIENCE", 2)
    with pytest.raises(AssertionError, match=r"no end after 0\.2 s"), guarded(tmp_path, "input 1", seconds=0.1):
        time.sleep(5)


def test_the_guard_lets_pass_what_may_be(tmp_path: Path) -> None:
    with guarded(tmp_path, "input 1") as outcome:
        (tmp_path / "a").write_text("x")
        raise MeshPEFTError("no")
    assert str(outcome.error) == "no"


def test_mutations_are_the_same_in_every_run_and_mostly_still_json() -> None:
    first = [mutated_json(VALUE, rng) for rng in generators("x", 300)]
    assert first == [mutated_json(VALUE, rng) for rng in generators("x", 300)]
    assert len(set(first)) > 200
    assert [mutated_bytes(b"abc", rng) for rng in generators("x", 9)] == [
        mutated_bytes(b"abc", rng) for rng in generators("x", 9)
    ]
    readable = 0
    for data in first:
        try:
            json.loads(data.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            continue
        readable += 1
    assert readable > 200
    assert json_bytes({"a": fuzz.Raw("NaN"), "b": ["\ud83d", "x"]}) == b'{"a": NaN, "b": ["\xed\xa0\xbd", "x"]}'
