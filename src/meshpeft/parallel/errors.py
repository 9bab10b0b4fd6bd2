"""The errors a user can mend: their text names what was given, what was expected, and what to do.

What was given comes from files that people fetch, and so does what other packages say about it: both are of any
length, with any character. `shown` puts a value into a message, `blamed_on` turns what another package raises on a
file's content into one, and no message is longer than a screen or moves the cursor.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["MeshPEFTError", "ParallelError", "blamed_on", "first_few", "first_line", "reason_of", "shown"]

_MESSAGE_CHARACTERS = 20_000
_LINE_CHARACTERS = 400
_NAME_CHARACTERS = 200
_NAMED = 3


class MeshPEFTError(ValueError):
    """Base of every error about the user's input; the command line prints it and exits with code 2.

    Its text is cut where it is longer than a few screens, and shows characters that are not printable as escapes.
    """

    def __str__(self) -> str:
        return _cut(_printable(super().__str__()), _MESSAGE_CHARACTERS)


class ParallelError(MeshPEFTError):
    """Sizes that do not divide, axes that do not exist, layers used in a way their layout does not allow."""


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlong = 40
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 6
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no number of more than 4,300 digits.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<integer of {x.bit_length()} bits>"

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        # Theirs sorts all keys before it takes the first few.
        if level <= 0:
            return "{...}"
        items = list(zip(range(self.maxdict + 1), x.items(), strict=False))
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for _, (key, value) in items]
        return "{" + ", ".join([*pieces[: self.maxdict], *(["..."] if len(pieces) > self.maxdict else [])]) + "}"


_SHOWN = _Shown()


def shown(value: object) -> str:
    r"""A value from a file for a message: as Python writes it, cut to a length that fits in a line.

    Example:
        >>> shown("32\x1b")
        "'32\\x1b'"
        >>> shown(list(range(10**6)))
        '[0, 1, 2, 3, 4, 5, ...]'
    """
    return _cut(_printable(_SHOWN.repr(value)), _LINE_CHARACTERS)


def first_few(names: Sequence[str]) -> str:
    """List names in a message, of many the first: `a, b, c and 14 more`."""
    few = ", ".join(name if len(name) <= _NAME_CHARACTERS else shown(name) for name in names[:_NAMED])
    return few if len(names) <= _NAMED else f"{few} and {len(names) - _NAMED:,} more"


def first_line(error: BaseException) -> str:
    """What the first line of another package's error says, for a message of ours; its type where it says nothing.

    A line that only introduces the next one, as those of transformers' strict configuration classes do, brings it.
    """
    text = _text(error)
    lines = [line.strip() for line in text[: 10 * _LINE_CHARACTERS].strip().splitlines()] or [type(error).__name__]
    count = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return _cut(_printable(" ".join(lines[:count])), _LINE_CHARACTERS)


def reason_of(error: BaseException) -> str:
    """Why a file could not be used, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if "trust_remote_code=True" in _text(error):  # what transformers advises
        return "it needs code of its own, and code of a model's directory is never run"
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"it lacks {shown(error.args[0] if error.args else None)}"
    return first_line(error)


@contextmanager
def blamed_on(subject: object, error_type: type[MeshPEFTError]) -> Iterator[None]:
    """Turn whatever a block raises into a sentence about a file; errors of this package pass through.

    For blocks that hand a file's content to another package, whose own list of exceptions grows from release to
    release: whatever comes out of it is the file's fault.

    Args:
        subject: The file or directory and what went wrong with it, before the reason.
        error_type: What is raised.
    """
    try:
        yield
    except MeshPEFTError:
        raise
    except BaseException as error:
        # A library in Rust that panics raises what is no Exception, under this name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise error_type(f"{subject}: {reason_of(error)}") from error


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error whose own text fails on the value that it is about
        return ""


def _printable(text: str) -> str:
    """Every character that is not printable as its escape; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 40]} ... ({len(text):,} characters)"
