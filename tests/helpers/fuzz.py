"""Hostile files made of good ones, and a guard that watches what reading them does.

A fuzz test takes a valid file, mutates it with a fixed seed, and reads it inside of `guarded`::

    @MANY
    def test_no_data_file_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
        for rng in generators("data", count):
            path.write_bytes(mutated_json(GOOD, rng))
            with guarded(tmp_path, rng):
                load_records(path)

Good input may come out of a mutation; what may not happen is another error than ours, a hang, memory without bound, or
something written elsewhere.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["MANY", "Generator", "Outcome", "generators", "guarded", "json_bytes", "mutated_bytes", "mutated_json"]

MANY = pytest.mark.parametrize("count", (100, pytest.param(2000, marks=pytest.mark.slow)))
"""100 inputs in `make test`, 2,000 (with the same 100 first) in `make test-all`."""

SECONDS, MEGABYTES = 5.0, 1024
# By the clock, on a machine with other work.
PATIENCE = 8


class Raw(str):
    """JSON text to be written as it is, which no value of Python's stands for."""

    __slots__ = ()


def _raw(depth: int, opening: str, closing: str) -> Raw:
    return Raw(opening * depth + "1" + closing * depth)


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 1e-320, [], {}, "", [[]], [{}], [None], {"": None},
    2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**12, 10**18, 10**30, -(10**18),
    "0", "1", "-1", "1e9", "null", "true", "nan", "inf", "32", "float32", "torch.float99", "cuda", "auto",
    "a" * 100_000, "\x00", "a\x00b", "\ud83d", "x\udfff", "\u202e", "\x1b[2J", "é", "\ufeff", "\n", " ", "\r\n",
    "..", "../../outside", "/etc/passwd", "/dev/zero", "/dev/stdin", "~", "a/b", "model.layers.0", "C:\\x",
    "(a+)+$", "(a|aa)+$", "[", "(", "*", "\\", ".*" * 50, "%s", "{0}", "{{ 9 ** (9 ** 9) }}", "__class__",
    list(range(10_000)), {str(number): number for number in range(1_000)}, ["a"] * 10_000, {"a": {"b": {"c": []}}},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5_000), Raw("-" + "9" * 5_000),
    Raw("1e-" + "9" * 20), Raw('{"a": 1, "a": 2}'), _raw(500, "[", "]"), _raw(100_000, "[", "]"),
    _raw(500, '{"a":', "}"), _raw(100_000, '{"a":', "}"), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("0x10"), Raw("'a'"),
)  # fmt: skip
_FRAGMENTS = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"{", b"[", b"]}", b"\n", b"\r", b",", b"\\u",
    b"9" * 400, b"PAR1", b"\x80\x00\x00\x00", b"\xff" * 8, b"\x7f" * 8, b"NaN", b"1e999",
)  # fmt: skip


class Generator(random.Random):
    """The chance of one input, which has a name for messages."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def generators(name: str, count: int) -> Iterator[Generator]:
    """A generator for each input of a test: the same in every run, another for every test and input."""
    for number in range(count):
        yield Generator(f"{name} {number}")


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """The file of this JSON value after one to three changes somewhere within it; rarely, of its bytes too.

    Values are replaced by hostile ones of every type, moved, doubled and wrapped; keys are removed and renamed.
    """
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(holder, rng)
    data = json_bytes(holder[0])
    return mutated_bytes(data, rng) if rng.random() < 0.05 else data


def json_bytes(value: Any) -> bytes:
    """JSON of a value that may hold `Raw` text, lone surrogates and integers of any length."""
    raw: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            raw.append(str(part))
            return f"\ue000{len(raw) - 1}\ue000"
        if isinstance(part, dict):
            return {str(marked(key)): marked(content) for key, content in part.items()}
        return [marked(content) for content in part] if isinstance(part, list) else part

    pieces = json.dumps(marked(value), ensure_ascii=False).split("\ue000")
    for at in range(1, len(pieces), 2):
        quoted = pieces[at - 1].endswith('"') and pieces[at + 1].startswith('"')
        if quoted:
            pieces[at - 1], pieces[at + 1] = pieces[at - 1][:-1], pieces[at + 1][1:]
        pieces[at] = raw[int(pieces[at])]
    return "".join(pieces).encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four changes: flipped, cut off, cut out, doubled, overwritten, or with others put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not changed:
            return bytes(changed)
        start = rng.randrange(len(changed))
        end = min(len(changed), start + rng.choice((1, 2, 8, 100, len(changed))))
        kind = rng.randrange(7)
        if kind == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[start:]
        elif kind == 2:
            del changed[start:end]
        elif kind == 3:
            changed[start:start] = changed[start:end]
        elif kind == 4:
            changed[start:start] = rng.choice(_FRAGMENTS)
        elif kind == 5:
            fragment = rng.choice(_FRAGMENTS)
            changed[start : start + len(fragment)] = fragment
        else:
            changed[start : start + 4] = rng.randbytes(4)
    return bytes(changed)


def _change(holder: list[Any], rng: random.Random) -> None:
    """One change to a place within, all places being alike."""
    places = list(_places(holder))
    container, key = rng.choice(places)
    value = container[key]
    kind = rng.randrange(10)
    if kind < 5:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind == 5:
        other, at = rng.choice(places)
        container[key] = copy.deepcopy(other[at])
    elif kind == 6:
        container[key] = rng.choice(([value], {"a": value}, [value, value], str(value)[:1000]))
    elif kind == 7 and isinstance(value, int | float):
        container[key] = rng.choice((-value, value + 1, value * 2, value / 3, value * 10**9, float(value), str(value)))
    elif kind == 8 and isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        insert = rng.choice([part for part in HOSTILE if isinstance(part, str) and not isinstance(part, Raw)])
        container[key] = value[:place] + insert + value[place:]
    elif isinstance(container, dict):
        moved = container.pop(key)
        if rng.random() < 0.5:
            container[rng.choice(("", "a", key.upper(), key + " ", "\ud83d", "a" * 1000, "__class__"))] = moved
    elif container is not holder:
        del container[key]


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    pending = [container]
    while pending:
        container = pending.pop()
        keys = range(min(len(container), 50)) if isinstance(container, list) else list(container)[:200]
        for key in keys:
            yield container, key
            if isinstance(container[key], list | dict):
                pending.append(container[key])


class Outcome:
    """What became of an input. `error`: the sentence that refused it."""

    error: MeshPEFTError | None = None


class _Watch:
    """What the process does to files and the network, as Python's audit events tell."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # there is no way to remove one

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            inside = self._inside(path)
            if (changes and not inside) or (inside and str(path).endswith(".py")):
                self.seen.append(f"{event} {str(path)[:200]}")
        elif event in ("os.rename", "os.link", "os.symlink"):
            if not all(self._inside(path) for path in arguments[:2]):
                self.seen.append(f"{event} {arguments[:2]}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"):
            if not self._inside(arguments[0]):
                self.seen.append(f"{event} {str(arguments[0])[:200]}")
        elif event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        name = os.path.abspath(os.fsdecode(path))
        # What an import leaves is Python's own.
        return name.startswith((str(self.directory), "/dev/null", "/proc/self")) or "__pycache__" in name


_watch = _Watch()


@contextmanager
def guarded(
    directory: Path, what: Generator | str, *, seconds: float = SECONDS, megabytes: int = MEGABYTES
) -> Iterator[Outcome]:
    """Check what a block does with a hostile file: it ends well or in a `MeshPEFTError`, soon, and within bounds.

    Args:
        directory: the only place where the block may write; Python files in it may not be read.
        what: names the input in a failure.
        seconds: of processor time, this process's and its children's.
        megabytes: by which the process's peak may grow.

    Raises:
        AssertionError: the block broke one of these rules.
    """
    outcome = Outcome()
    label = what if isinstance(what, str) else what.name
    started, peak = _cpu_seconds(), _peak_megabytes()
    previous = signal.signal(signal.SIGALRM, _too_long)
    faulthandler.dump_traceback_later(4 * PATIENCE * seconds, exit=True)  # for a hang that no signal ends
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    _watch.directory, _watch.seen = str(directory.resolve()), []
    try:
        yield outcome
    except MeshPEFTError as error:
        outcome.error = error
    except _TooLongError:
        raise AssertionError(f"{label}: no end after {PATIENCE * seconds:g} s") from None
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()
        _watch.directory = None
    taken, growth = _cpu_seconds() - started, _peak_megabytes() - peak
    assert taken < seconds, f"{label}: took {taken:.1f} s"
    assert growth < megabytes, f"{label}: took {growth:.0f} MB"
    assert not _watch.seen, f"{label}: {_watch.seen[:5]}"
    if outcome.error is not None:
        said = str(outcome.error)
        assert 0 < len(said) < 2000, f"{label}: a message of {len(said):,} characters: {said[:300]}"


class _TooLongError(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLongError


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_megabytes() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
