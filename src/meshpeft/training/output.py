"""The output directory of a run: written aside, and put in its place when it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["RECORD", "OutputDirectory", "OutputError"]

RECORD = "run.json"
"""The file that makes a directory the output of a run: options, versions and results."""


class OutputError(MeshPEFTError):
    """An output directory that cannot be written, or must not be."""


class OutputDirectory:
    """A run's output, in `path` when it is complete and in `stage`, beside it, until then.

    Args:
        path: where the output is to be.
        overwrite: replace the run that is there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.given = path
        self.path = path.resolve()
        self.overwrite = overwrite
        self.stage = self.path.with_name(f".{self.path.name}.partial")

    def check(self) -> None:
        """Whether the output may be put in its place; touches nothing.

        Raises:
            OutputError: the place is taken, or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.given}: is a file; choose another output directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not (self.path / RECORD).is_file():
                raise OutputError(
                    f"{self.given}: holds files that are not a run's (there is no {RECORD}); "
                    f"choose another output directory"
                )
            if not self.overwrite:
                raise OutputError(
                    f"{self.given}: holds another run; choose another output directory, or replace it with --overwrite"
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
        old = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.stage.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the stage, if there is one."""
        if self.stage.exists():
            shutil.rmtree(self.stage)
