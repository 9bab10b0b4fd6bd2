"""Opening files of directories that people fetch: a file only, of a bounded size, and a reason where it cannot be."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from meshpeft.models.errors import ModelError
from meshpeft.parallel.errors import MeshPEFTError, blamed_on, reason_of

__all__ = ["MODEL_DIRECTORY", "check_readable", "files_to_copy", "open_file", "read_json", "read_text"]

MODEL_DIRECTORY = "a Hugging Face model directory (nothing is downloaded)"
MOST_BYTES = 32 << 20
"""Of a JSON file: a weights index of 200,000 tensors has 20 MB, and what is parsed takes up to 25 times the memory."""

_MOST_COPIED_BYTES = 1 << 30

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def open_file(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> Iterator[BinaryIO]:
    """Open a regular file for reading, through links; what is no file is refused before it can block or be endless.

    Args:
        path: of the file.
        error_type: what is raised.
        expected: what the directory should be, for the message where there is no such file.

    Raises:
        MeshPEFTError: there is no such file, it is a directory, a pipe or a device, or it may not be read.
    """
    hint = f"; expected {expected}" if expected else ""
    try:
        # A pipe without a writer would block until one comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = path if path.parent.is_dir() else path.parent
        what = "is not a directory" if missing.exists() else "does not exist"
        raise error_type(f"{missing} {what}{hint}") from error
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read: {reason_of(error)}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error_type(f"{path} is {_KINDS.get(kind, 'no file')}; expected a file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def check_readable(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> int:
    """Check that a path is a file that may be read, for packages whose own message is another; its size in bytes.

    Raises:
        MeshPEFTError: see `open_file`.
    """
    with open_file(path, error_type, expected) as file:
        return os.fstat(file.fileno()).st_size


def read_text(
    path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "", most_bytes: int = MOST_BYTES
) -> str:
    """Read a UTF-8 file of a bounded size.

    Raises:
        MeshPEFTError: it is larger, is not UTF-8, or see `open_file`.
    """
    with open_file(path, error_type, expected) as file, blamed_on(f"{path} cannot be read", error_type):
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise error_type(f"{path} is larger than {most_bytes >> 20} MiB, which no such file is")
        return content.decode("utf-8")


def read_json(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: of the file.
        error_type: what is raised.
        expected: what its directory should be, for the message where there is no such file.

    Raises:
        MeshPEFTError: there is no such file, or it holds something else.
    """
    text = read_text(path, error_type, expected)
    with blamed_on(f"{path} cannot be read as JSON", error_type):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise error_type(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def files_to_copy(directory: Path, names: Sequence[str]) -> list[Path]:
    """Those of the named files that a directory has, for a copy beside what was made of it.

    Weights are read through any link. What is copied is given on, perhaps to others: a link to it may lead within the
    directory, or, from a snapshot in a Hugging Face cache, within that repository's part of the cache (`../../blobs`).

    Raises:
        ModelError: a file may not be read, is none, or is a link that leads elsewhere.
    """
    home = directory.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    found = [directory / name for name in names if os.path.lexists(directory / name)]
    for path in found:
        if not path.resolve().is_relative_to(home):
            raise ModelError(
                f"{path} is a link to {path.resolve()}, outside of {home}, and would be copied; put the file there"
            )
        if check_readable(path) > _MOST_COPIED_BYTES:
            raise ModelError(f"{path} is larger than {_MOST_COPIED_BYTES >> 30} GiB, which no such file is")
    return found
