"""Files that appear all at once: written in a folder beside their target, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["StagedFiles", "flush_directory", "write_flushed"]


class StagedFiles:
    """A few files of one directory, of which the last shows that all are there.

    Args:
        directory: where they are to be; other files in it are left alone.
        names: in the order in which they appear; without the last one the others mean nothing.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.names = list(names)
        self.folder = directory.parent / f".{directory.name}.partial"
        # Only one process writes a directory: what is there was left by one that was killed.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Put the files in their place."""
        flush_directory(self.folder)
        if not self.directory.exists():
            self.folder.rename(self.directory)
        else:
            # Without its last file the old set is gone, and the new one is not there before its own last file is.
            (self.directory / self.names[-1]).unlink(missing_ok=True)
            for name in self.names:
                os.replace(self.folder / name, self.directory / name)
            flush_directory(self.directory)
        flush_directory(self.directory.parent)

    def clean_up(self) -> None:
        """Remove the folder beside the target, if it is still there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
