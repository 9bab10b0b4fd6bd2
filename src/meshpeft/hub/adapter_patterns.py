"""peft's matching of module names, for patterns that anyone may have written.

peft gives expressions of an `adapter_config.json` to `re`, in which `(a+)+b` on a name of sixty letters does not end,
and looks through all keys of `rank_pattern` for every module. Here a plain name is looked up, an expression is of a
bounded size and runs against a clock, and what is found is what peft finds.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import regex

from meshpeft.hub.errors import CheckpointError
from meshpeft.parallel.errors import first_line, shown

__all__ = ["Clock", "EndsOfNames", "Expression", "KeyedValues"]

_MOST_CHARACTERS = 16_384
"""Of an expression that is no plain name; compiling takes seconds for more."""
_LARGEST = 200_000
"""Its characters times its counted repetitions, which `regex` writes out when it compiles."""
_SECONDS = 4.0
_PLAIN = re.compile(r"[\w.-]+")
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


class Clock:
    """The processor time that the expressions of one file may take together, while they match.

    Args:
        path: the file, for the message.
        seconds: for all of them; honest ones take milliseconds.
    """

    def __init__(self, path: Path, seconds: float = _SECONDS) -> None:
        self.path, self._left = path, seconds

    def left(self) -> float:
        """What is left of it.

        Raises:
            CheckpointError: nothing.
        """
        if self._left <= 0:
            raise CheckpointError(
                f"{self.path}: its expressions take longer than any honest one to match the model's layers; write "
                "names in their place"
            )
        return self._left

    def take(self, seconds: float) -> None:
        """Take some of it away."""
        self._left -= seconds


class Expression:
    """A regular expression, as `re` reads it.

    Args:
        text: the expression.
        clock: of its file.
        field: where it stands, for messages.
        template: what it is put into before it is compiled.

    Raises:
        CheckpointError: it is none, or larger than any that selects layers.
    """

    def __init__(self, text: str, clock: Clock, field: str, template: str = "{}") -> None:
        self.text, self._clock, self._field, self._template = text, clock, field, template
        self._compiled: regex.Pattern[str] | None = None
        size = len(text)
        for least, most in _COUNTED.findall(text[:_MOST_CHARACTERS]):
            size = min(size * max(int(least[:9] or 0), int(most[:9] or 0), 1), 10**12)
        if len(text) > _MOST_CHARACTERS or size > _LARGEST:
            raise CheckpointError(
                f"{clock.path}: {field}: {shown(text)} is larger than any expression that selects layers: "
                f"{len(text):,} characters, {size:,} with its repetitions; write names in its place"
            )
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                # What will change in a later Python, as a set in a set, is not what peft meant either.
                warnings.simplefilter("error", FutureWarning)
                re.compile(text)
        except (re.error, FutureWarning, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{clock.path}: {field}: {shown(text)} is not a regular expression: {first_line(error)}"
            ) from error
        clock.take(time.process_time() - start)
        # `regex` has fuzzy matching there, `re` a brace.
        if "{" in _COUNTED.sub("", text):
            raise CheckpointError(f"{clock.path}: {field}: {shown(text)}: no module's name has a brace in it")

    def matches(self, name: str) -> bool:
        """Whether it matches all of a name.

        Raises:
            CheckpointError: it takes too long to find out.
        """
        left, start = self._clock.left(), time.process_time()
        try:
            if self._compiled is None:
                self._compiled = regex.compile(self._template.format(self.text), regex.VERSION0)
            return self._compiled.fullmatch(name, timeout=left) is not None
        except TimeoutError as error:
            self._clock.take(left)
            raise CheckpointError(
                f"{self._clock.path}: {self._field}: {shown(self.text)} takes longer than {_SECONDS:.0f} s to match; "
                "write the names of the layers in its place"
            ) from error
        except (regex.error, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{self._clock.path}: {self._field}: {shown(self.text)} is not a regular expression: "
                f"{first_line(error)}"
            ) from error
        finally:
            self._clock.take(time.process_time() - start)


class EndsOfNames:
    """A list of names: those match that are one of them, or end in one after a dot."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def matches(self, name: str) -> bool:
        """Whether the list has a name, or its end."""
        return any(end in self._names for end in _ends(name))


class KeyedValues:
    """`rank_pattern` or `alpha_pattern`: the value of the first key that matches a name, or its end after a dot.

    A key is an expression. Most are plain names, whose dots match any character: they are looked up, by the places of
    their dots.

    Raises:
        CheckpointError: a key is no expression.
    """

    def __init__(self, values: Mapping[str, float], clock: Clock, field: str) -> None:
        self._values = list(values.values())
        self._found: dict[str, int | None] = {}
        self._expressions: list[tuple[int, Expression]] = []
        # Length of a key -> places of its dots -> what stands between them -> the key's number.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, key in enumerate(values):
            if _PLAIN.fullmatch(key):
                dots = tuple(at for at, character in enumerate(key) if character == ".")
                self._plain.setdefault(len(key), {}).setdefault(dots, {}).setdefault(_between(key, dots), number)
            else:
                clock.left()
                self._expressions.append((number, Expression(key, clock, field, r"(.*\.)?({})")))

    def __len__(self) -> int:
        return len(self._values)

    def find(self, name: str, default: float) -> float:
        """The value of a full name.

        Raises:
            CheckpointError: an expression takes too long.
        """
        if name not in self._found:
            self._found[name] = self._first(name)
        number = self._found[name]
        return default if number is None else self._values[number]

    def _first(self, name: str) -> int | None:
        plain = [
            keys[between]
            for end in _ends(name)
            for dots, keys in self._plain.get(len(end), {}).items()
            if (between := _between(end, dots)) in keys
        ]
        best = min(plain, default=None)
        for number, expression in self._expressions:
            if best is not None and best < number:
                return best
            if expression.matches(name):
                return number
        return best


def _ends(name: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _between(text: str, dots: tuple[int, ...]) -> str:
    """A text without its characters at some places."""
    starts = (0, *(at + 1 for at in dots))
    return "\n".join(text[start:end] for start, end in zip(starts, (*dots, len(text)), strict=True))
