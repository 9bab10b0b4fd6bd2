"""Files that appear all at once: written in a folder beside their target, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["StagedFiles", "flush", "write_flushed"]


class StagedFiles:
    """A few files of one directory.

    Args:
        directory: where they are to be; other files in it are left alone.

    Attributes:
        folder: where they are written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.folder = directory.parent / f".{directory.name}.partial"
        # Only one process writes a directory: what is there was left by one that was killed.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def publish(self, names: Sequence[str], replaced: Iterable[Path] = ()) -> None:
        """Put the files in their place.

        Args:
            names: in the order in which they appear; the last shows that all are there.
            replaced: files there that these take the place of, whatever their names.
        """
        for path in (*(self.folder / name for name in names), self.folder):
            flush(path)
        if not self.directory.exists():
            self.folder.rename(self.directory)
        else:
            # Without its last file the old set is gone, and the new one is not there before its own last file is.
            (self.directory / names[-1]).unlink(missing_ok=True)
            for path in replaced:
                path.unlink(missing_ok=True)
            for name in names:
                os.replace(self.folder / name, self.directory / name)
            flush(self.directory)
        flush(self.directory.parent)

    def clean_up(self) -> None:
        """Remove the folder beside the target, if it is still there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until the disk has what is in a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
