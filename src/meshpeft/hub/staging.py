"""Files that appear together: written in a folder inside their directory, flushed to the disk, then renamed.

The folder is inside, not beside: a directory may be a mount point, or its parent read-only, and what can be written
into it can be renamed within it. While the files are written the process owns the directory
(`meshpeft.hub.directory_lock`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from meshpeft.hub.directory_lock import DirectoryLock

__all__ = ["StagedFiles", "flush", "remove_leftovers", "write_flushed"]

_FOLDER = re.compile(r"\.meshpeft-[0-9a-f]{8}\.partial")
_FINISHED = "finished-{}"
# What fsync answers for a directory on file systems that cannot flush one.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}


class StagedFiles:
    """A few files of one directory, which is made if it does not exist; other files in it are left alone.

    A context manager, or `clean_up` is called at the end.

    Args:
        directory: Where they are to be.

    Attributes:
        folder: Where they are written.

    Raises:
        DirectoryInUse: Another process is writing there.
        OSError: The directory cannot be made, or written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = DirectoryLock(directory)
        self._lock.acquire()
        token = uuid.uuid4().hex[:8]
        self.folder = directory / f".meshpeft-{token}.partial"
        self._kept_as = directory / _FINISHED.format(token)
        self._is_kept = False
        try:
            if self._lock.is_first and self._lock.works:
                remove_leftovers(directory)
            os.mkdir(self.folder)
        except BaseException:
            self._lock.release()
            raise

    def publish(self, names: Sequence[str], replaced: Iterable[Path] = ()) -> None:
        """Put the files in their place: all of them, or none and the old ones are as they were.

        Args:
            names: In the order in which they appear; the last shows that all are there.
            replaced: Files of the directory that these take the place of, whatever their names.

        Raises:
            OSError: They cannot be renamed. They stay, and `strerror` says where.
        """
        try:
            self._publish(names, replaced)
        except OSError as error:
            self._is_kept = True
            with suppress(OSError):
                os.rename(self.folder, self._kept_as)
                self.folder = self._kept_as
            raise OSError(error.errno, f"{error.strerror or error}; the finished files are in {self.folder}") from error

    def _publish(self, names: Sequence[str], replaced: Iterable[Path]) -> None:
        mode = self._usual_mode()
        for name in names:
            _set_mode(self.folder / name, mode)
            flush(self.folder / name)
        flush(self.folder)
        # Without its last file the old set is gone, and the new one is not there before its own last file is.
        old = [self.directory / names[-1], *replaced, *(self.directory / name for name in names[:-1])]
        aside = self.folder / "replaced"
        moves = [(path, aside / path.name) for path in dict.fromkeys(old) if _is_file_to_replace(path)]
        if moves:
            os.mkdir(aside)
        moves += [(self.folder / name, self.directory / name) for name in names]
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                os.rename(source, target)
                done.append((source, target))
            flush(self.directory)
        except BaseException:
            for source, target in reversed(done):
                with suppress(OSError):
                    os.rename(target, source)
            with suppress(OSError):
                os.rmdir(aside)
            raise
        with suppress(OSError):  # of no use, and removed with the folder
            flush(self.directory.parent)

    def _usual_mode(self) -> int:
        """The mode of a file that this process makes here: what umask and the directory's own rules leave of 0666."""
        probe = self.folder / "mode"
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            return stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            os.unlink(probe)

    def clean_up(self) -> None:
        """Remove the folder, unless it holds finished files, and give the directory up."""
        if not self._is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clean_up()


def remove_leftovers(directory: Path) -> None:
    """Remove the folders of processes that were killed while they wrote. Only the owner of `directory` may."""
    for path in directory.iterdir():
        if _FOLDER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until the disk has what is in a file, or the names in a directory (where its file system can do that)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _is_file_to_replace(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a directory")
    return os.path.lexists(path)


def _set_mode(path: Path, mode: int) -> None:
    """Give a file the mode that others here get; some writers (safetensors') make theirs for their owner only."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(OSError):  # a file system with one mode for all
            os.chmod(path, mode)
