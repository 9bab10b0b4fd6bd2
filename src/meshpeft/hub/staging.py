"""Files that appear together, or not at all, in a directory that one process owns.

They are written in a folder inside their directory, flushed to the disk, then renamed. The folder is inside, not next
to it: a directory may be a mount point, or its parent read-only, and what can be written into it can be renamed within
it.

The owner holds `flock` on a hidden file in the directory, which ends with its process however that ends. So a lock
that is held means a live process, and what lies in a directory whose lock is free was left by one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["LOCK_NAME", "DirectoryInUse", "DirectoryLock", "StagedFiles", "flush", "remove_leftovers", "write_flushed"]

_FOLDER = re.compile(r"\.meshpeft-[0-9a-f]{8}\.partial")
_FINISHED = "finished-{}"
# Errors of fsync for a directory on file systems that cannot flush one.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}


class StagedFiles:
    """A few files of one directory, which is made if it does not exist; other files in it are left alone.

    A context manager, or `clean_up` is called at the end.

    Args:
        directory: Target directory.

    Attributes:
        folder: Folder in it where they are written.

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
        """Move the files to their target: all of them, or none, and the old ones are as they were.

        Args:
            names: In the order in which they appear; the last shows that all are there.
            replaced: Files of the directory that these take the place of, whatever their names.

        Raises:
            OSError: They cannot be renamed. They are kept, and `strerror` names the folder.
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
        """Find the mode of a file that this process makes here: 0666 after umask and the directory's own rules."""
        probe = self.folder / "mode"
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            return stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            os.unlink(probe)

    def clean_up(self) -> None:
        """Remove the folder, unless it holds finished files, and release the directory."""
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
    """Give a file the mode that others here get; some writers make theirs for their owner only."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(OSError):  # a file system with one mode for all
            os.chmod(path, mode)


LOCK_NAME = ".meshpeft.lock"
# Errors of flock on a file system that has no locks, for instance NFS without a lock manager.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 100

# By directory: the open lock file and how often it was acquired.
_held: dict[Path, list[int]] = {}
_changing = threading.RLock()


class DirectoryInUse(OSError):
    """Another process owns the directory. `strerror` is a sentence that names it."""


class DirectoryLock:
    """Ownership of a directory, which is made if it does not exist. Within one process it may be acquired again.

    Args:
        directory: Directory that is owned.

    Attributes:
        left_by: Where another machine's process was killed while it owned the directory, or does own it on a file
            system whose locks end at each machine: that process and its machine.
        works: Whether the file system has locks. Without them nothing keeps other processes out.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.left_by: str | None = None
        self.works = True
        self._made: list[Path] = []

    @property
    def is_first(self) -> bool:
        """Whether nothing else in this process owns the directory, too."""
        return _held[self.directory][1] == 1

    def acquire(self) -> None:
        """Make the directory and become its owner.

        Raises:
            DirectoryInUse: Another process is.
            OSError: The directory cannot be made, or written to.
        """
        with _changing:
            if self.directory in _held:
                _held[self.directory][1] += 1
                return
            try:
                _held[self.directory] = [self._locked_file(), 1]
            except BaseException:
                self._remove_made()
                raise

    def release(self) -> None:
        """Release the directory; remove what `acquire` made, if nothing was written into it."""
        with _changing:
            held = _held[self.directory]
            held[1] -= 1
            if held[1]:
                return
            del _held[self.directory]
            with suppress(OSError):  # before the lock is released: afterwards the file may be another's
                os.unlink(self.directory / LOCK_NAME)
            with suppress(OSError):
                os.close(held[0])
            self._remove_made()

    def _locked_file(self) -> int:
        for _ in range(_ATTEMPTS):
            self._make()
            try:
                file = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # who made the directory, or its parent, removed it just now
                continue
            try:
                if self._lock(file):
                    self._sign(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
        raise OSError(errno.EAGAIN, "the directory comes and goes")

    def _make(self) -> None:
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(path)
                self._made.append(path)

    def _lock(self, file: int) -> bool:
        """Lock the open file; false if its name was another file's, or nobody's, by then."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(
                errno.EBUSY, f"{_owner(file)} is writing there; wait for it, or choose another directory"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self.works = False
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.directory / LOCK_NAME))
        except FileNotFoundError:
            return False

    def _sign(self, file: int) -> None:
        signed = _read(file)
        if signed and signed.get("host") != socket.gethostname():
            self.left_by = _owner(file)
        text = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z").strip(),
        }
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(text).encode() + b"\n", 0)

    def _remove_made(self) -> None:
        made, self._made = self._made, []
        for path in reversed(made):
            with suppress(OSError):
                os.rmdir(path)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _forget() -> None:
    """Own nothing in a forked process, which would keep the locks if it outlived its parent."""
    global _changing
    _changing = threading.RLock()
    for file, _ in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _read(file: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(file, 1000, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _owner(file: int) -> str:
    """`process 123 on node7 (since 2026-11-29 14:03:11 +0000)`."""
    signed = _read(file)
    if not {"host", "process", "since"} <= signed.keys():
        return "another process"
    host, process, since = (str(signed[name])[:100] for name in ("host", "process", "since"))
    return f"process {process} on {host} (since {since})"
