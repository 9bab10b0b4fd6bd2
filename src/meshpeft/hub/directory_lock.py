"""One owner for a directory: while a process writes there, no other does.

The owner holds `flock` on a hidden file in the directory, which goes with its process however that ends. So a lock
that is held means a live process, and what lies in a directory whose lock is free was left by one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["LOCK_NAME", "DirectoryInUse", "DirectoryLock"]

LOCK_NAME = ".meshpeft.lock"
# What flock answers on a file system that has no locks, for instance NFS without a lock manager.
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
        directory: What is owned.

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
        """Give the directory up; what `acquire` made and nothing was written into is removed."""
        with _changing:
            held = _held[self.directory]
            held[1] -= 1
            if held[1]:
                return
            del _held[self.directory]
            with suppress(OSError):  # before the lock is given up: afterwards the file may be another's
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
