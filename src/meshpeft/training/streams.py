"""What a process prints: standard streams that never end a run, and warnings as one sentence each.

A training is worth more than its log. Where a stream is closed, its encoding lacks a character or its reader is gone,
what cannot be written is dropped, and the run goes on to its result.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "make_streams_lenient",
    "plain_warnings",
    "quiet",
]


def make_streams_lenient(*, end_without_reader: bool = False) -> None:
    """Replace this process's standard streams by ones that can always be used.

    * A stream that was closed when the process started (`>&-`, some daemons) leads to the null device; otherwise the
      next file that is opened would take its descriptor, and get what libraries print.
    * A character that the stream's encoding lacks is written as `?`.
    * What cannot be written (a terminal that hung up, a full disk) is dropped.

    Streams that the caller has replaced already, as test runners do, are left alone.

    Args:
        end_without_reader: Raise `BrokenPipeError` when nobody reads a pipe any more, for commands whose output is
            their result; else that is dropped too.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _open_null(descriptor)
            mode = "r" if name == "stdin" else "w"
            null = open(descriptor, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115  # kept
            setattr(sys, name, null)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and type(stream) is io.TextIOWrapper:
            with suppress(OSError):
                stream.flush()
            raw = _LenientFile(descriptor, end_without_reader)
            lenient = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="backslashreplace" if name == "stderr" else "replace",
                line_buffering=stream.line_buffering or name == "stderr",
                write_through=stream.write_through,
            )
            setattr(sys, name, lenient)


def _open_null(descriptor: int) -> None:
    """Make `descriptor` lead to the null device, unless a file has taken it."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


class _LenientFile(io.FileIO):
    """Writes to a descriptor of the process, and takes what cannot be written as written."""

    def __init__(self, descriptor: int, end_without_reader: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._end_without_reader = end_without_reader

    def write(self, data: Buffer) -> int:
        """Write what can be written."""
        try:
            return super().write(data)
        except BrokenPipeError:
            if self._end_without_reader:
                raise
        except OSError:
            pass
        return memoryview(data).nbytes


_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
# They log at import what they cannot use on this machine ("Failed to load .."), and what they will not do one day.
_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


@contextmanager
def plain_warnings(speaker: str) -> Iterator[None]:
    """Print our warnings as one sentence each, without the place in the source, and from one process.

    What other packages say to their own developers (deprecations, extensions that they could not load) is left out;
    it is nothing that a user can act on. `python -W` and PYTHONWARNINGS bring the warnings back.

    Args:
        speaker: Command whose warnings they are; it stands before each.
    """
    show = warnings.showwarning

    def show_plainly(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, _FOR_DEVELOPERS) and not sys.warnoptions:
            return
        if category is not UserWarning:
            show(message, category, filename, lineno, file, line)
        elif os.environ.get("RANK", "0") == "0":
            print(f"{speaker}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings(), quiet(*_NOISY):
        warnings.showwarning = show_plainly
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Leave out what these loggers print below the level of an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
