"""A directory of checkpoints: `step-00000010`, `step-00000020`, ..

A visible checkpoint is complete: a save is written under a hidden name, flushed to the disk and renamed. Removing
renames first, too. While it saves, the process owns the directory
(`meshpeft.hub.staging`): what is hidden there otherwise was left by one that was killed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from meshpeft.checkpoint.manifest import MANIFEST
from meshpeft.hub.staging import DirectoryLock, flush
from meshpeft.hub.tensor_files import CheckpointError

__all__ = ["CheckpointDirectory"]

_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-\d{8,}\.(partial|removed)")


class CheckpointDirectory:
    """The checkpoints in a directory, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: DirectoryLock | None = None

    def of_step(self, step: int) -> Path:
        """Path of the checkpoint of a step."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Path where the checkpoint of a step is written."""
        return self.path / f".step-{step:08d}.partial"

    def steps(self) -> list[int]:
        """List the steps of the visible checkpoints, the newest first."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def candidates(self) -> list[Path]:
        """List the checkpoints that `path` may mean, the best first: itself, or those in it from the newest.

        Raises:
            CheckpointError: There is none.
        """
        if (self.path / MANIFEST).exists() or _NAME.fullmatch(self.path.name):
            return [self.path]
        found = [self.of_step(step) for step in self.steps()]
        if not found:
            raise CheckpointError(f"{self.path} is not a checkpoint, and holds none: no {MANIFEST}, no step-*")
        return found

    def prepare(self, step: int) -> None:
        """Own the directory, remove what killed saves left, and make the empty folder for a save.

        Raises:
            DirectoryInUse: Another process saves there.
        """
        lock = DirectoryLock(self.path)
        lock.acquire()
        self._lock = lock
        for path in self.path.iterdir():
            if _HIDDEN.fullmatch(path.name):
                shutil.rmtree(path)
        self.partial(step).mkdir()

    def publish(self, step: int) -> None:
        """Rename the folder of a flushed save to its final name; replace a checkpoint of the same step."""
        flush(self.partial(step))
        self._hide(step)
        try:
            self.partial(step).rename(self.of_step(step))
        except OSError:
            if self._hidden(step).exists():
                self._hidden(step).rename(self.of_step(step))
            raise
        flush(self.path)
        shutil.rmtree(self._hidden(step), ignore_errors=True)

    def discard(self, step: int) -> None:
        """Remove the folder of a save, if it is still there, and release the directory."""
        if self._lock is not None:
            shutil.rmtree(self.partial(step), ignore_errors=True)
            self._lock.release()
            self._lock = None

    def keep(self, count: int) -> None:
        """Remove all but the newest checkpoints."""
        self._remove(self.steps()[count:])

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which do not belong to a run that continued from an earlier one."""
        self._remove([later for later in self.steps() if later > step])

    def _remove(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._hide(step)
            shutil.rmtree(self._hidden(step), ignore_errors=True)

    def _hidden(self, step: int) -> Path:
        return self.path / f".step-{step:08d}.removed"

    def _hide(self, step: int) -> None:
        if self.of_step(step).exists():
            shutil.rmtree(self._hidden(step), ignore_errors=True)
            self.of_step(step).rename(self._hidden(step))
