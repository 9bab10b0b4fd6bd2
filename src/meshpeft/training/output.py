"""The output directory of a run: written aside, and put in its place when it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["CHECKPOINTS", "RECORD", "OutputDirectory", "OutputError"]

RECORD = "run.json"
"""The file that makes a directory the output of a run: options, versions and results."""
CHECKPOINTS = "checkpoints"
"""The directory in an output directory that a run writes while it goes. Without the record beside it, the run was
interrupted."""


class OutputError(MeshPEFTError):
    """An output directory that cannot be written, or must not be."""


class OutputDirectory:
    """A run's output, in `path` when it is complete and in `stage`, beside it, until then.

    Args:
        path: where the output is to be.
        overwrite: replace the run that is there.
        resume: go on with the interrupted run that is there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.given = path
        self.path = path.resolve()
        self.overwrite = overwrite
        self.resume = resume
        self.stage = self.path.with_name(f".{self.path.name}.partial")

    def check(self) -> None:
        """Whether the output may be put in its place; touches nothing.

        Raises:
            OutputError: the place is taken, or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.given}: is a file; choose another output directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            finished = (self.path / RECORD).is_file()
            if not finished and not (self.path / CHECKPOINTS).is_dir():
                raise OutputError(
                    f"{self.given}: holds files that are not a run's (there is no {RECORD}); "
                    f"choose another output directory"
                )
            if finished and not self.overwrite:
                raise OutputError(
                    f"{self.given}: holds a finished run; choose another output directory, or replace it with "
                    "--overwrite"
                )
            if not finished and not (self.overwrite or self.resume):
                raise OutputError(
                    f"{self.given}: holds the checkpoints of an interrupted run; go on with --resume auto, or replace "
                    f"it with --overwrite"
                )
        ancestor = next(parent for parent in self.path.parents if parent.exists())
        if not ancestor.is_dir():
            raise OutputError(f"{self.given}: {ancestor} is not a directory")

    def open(self) -> Path:
        """Make the empty stage, throwing away what a killed run left there, and return it."""
        try:
            self.discard()
            self.stage.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.given}: cannot be written: {error.strerror or error}") from error
        return self.stage

    def commit(self) -> None:
        """Put the stage in its place. Whoever looks sees the old run, then no run for an instant, then the new."""
        if (self.path / CHECKPOINTS).is_dir():
            self._commit_beside_checkpoints()
            return
        old = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.stage.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _commit_beside_checkpoints(self) -> None:
        (self.path / RECORD).unlink(missing_ok=True)
        for old in self.path.iterdir():
            if old.is_dir() and old.name != CHECKPOINTS:
                shutil.rmtree(old)
            elif not old.is_dir():
                old.unlink()
        # The record comes last: with it the run is finished.
        for new in sorted(self.stage.iterdir(), key=lambda path: path.name == RECORD):
            new.rename(self.path / new.name)
        self.stage.rmdir()

    def discard(self) -> None:
        """Remove the stage, if there is one."""
        if self.stage.exists():
            shutil.rmtree(self.stage)
