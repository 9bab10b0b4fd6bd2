"""The output directory of a run: which process owns it, what it holds, and how results are put into it.

    checkpoints/        while the run goes on, and afterwards if they were asked for
    run.partial.json    the run's options; there from its first step on
    metrics.jsonl       grows with every step (metrics.partial.jsonl while an older run is there)
    adapter_model.safetensors, adapter_config.json    when training is done
    run.json            run.partial.json with the results: the run is finished
    loss.png

An older run that is to be replaced stays as it is until the new adapter is on the disk. So a process that is killed
leaves the old run, or one that is marked as unfinished; while a process lives it owns the directory
(`meshpeft.hub.staging`).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.hub.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from meshpeft.hub.staging import DirectoryInUse, DirectoryLock, StagedFiles, flush, remove_leftovers, write_flushed
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training.config import RECORD

__all__ = ["CHECKPOINTS", "CURVE", "METRICS", "OutputDirectory", "OutputError", "RunState", "run_state"]

UNFINISHED = "run.partial.json"
"""The same without results, of a run that is not finished."""
CHECKPOINTS = "checkpoints"
METRICS, CURVE = "metrics.jsonl", "loss.png"
_METRICS_BESIDE_OLD = "metrics.partial.jsonl"

# What a free directory may hold, the second in the root of a volume; and what a run that was killed early leaves.
_OF_NOBODY = {CHECKPOINTS, "lost+found"}
_OF_THE_UNFINISHED = {UNFINISHED, METRICS, _METRICS_BESIDE_OLD, CURVE}


class OutputError(MeshPEFTError):
    """An output directory that cannot be written, or must not be."""


class RunState(Enum):
    """What an output directory holds."""

    FREE = auto()
    """Nothing, or nothing of use."""
    UNFINISHED = auto()
    """A run to go on with. There may be an older one that it was to replace."""
    FINISHED = auto()
    """A finished run."""
    OTHER = auto()
    """Files that are no run's."""


def run_state(directory: Path) -> RunState:
    """Determine what an output directory holds.

    Raises:
        OSError: It cannot be read.
    """
    if not directory.exists():
        return RunState.FREE
    names = {path.name for path in directory.iterdir()}
    # An adapter without the record is of a run that was killed between the two.
    begun = bool(CheckpointDirectory(directory / CHECKPOINTS).steps())
    if (RECORD not in names and (begun or {UNFINISHED, CONFIG_NAME} <= names)) or (UNFINISHED in names and begun):
        return RunState.UNFINISHED
    if RECORD in names:
        return RunState.FINISHED
    if UNFINISHED in names:
        names -= {*_OF_THE_UNFINISHED, WEIGHTS_NAME}
    others = [name for name in names - _OF_NOBODY if not name.startswith((".", "finished-"))]
    return RunState.OTHER if others else RunState.FREE


class OutputDirectory:
    """A run's output. One process of the run, its first rank, makes it, between `open` and `close`.

    Args:
        path: Where the output is to be.
        overwrite: Replace the run that is there.
        resume: Go on with the unfinished run that is there.

    Attributes:
        metrics: The file that grows while the run goes on, after `begin`.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.given = path
        with self._explained():
            self.path = Path(os.path.realpath(path))
        self.overwrite = overwrite
        self.resume = resume
        self._lock = DirectoryLock(self.path)
        self._missing: list[Path] = []
        self._keeps = False
        self.metrics = self.path / METRICS

    def is_finished(self) -> bool:
        """Return whether a finished run is there, and none that was to replace it.

        Raises:
            OutputError: The directory cannot be read.
        """
        with self._explained():
            return run_state(self.path) is RunState.FINISHED

    def check(self) -> None:
        """Check that the output may come here, and can: a file is written and renamed, and removed again.

        Raises:
            OutputError: The place is taken, another process writes there, or it cannot be written to.
        """
        with self._explained():
            self._missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self._refuse_what_is_no_run()
            with StagedFiles(self.path) as staged:
                self._refuse_what_is_taken()
                probe, renamed = staged.folder / "probe", self.path / ".meshpeft.probe"
                write_flushed(probe, b"probe")
                os.rename(probe, renamed)
                os.unlink(renamed)

    def open(self) -> None:
        """Own the directory until `close`.

        Raises:
            OutputError: As for `check`.
        """
        with self._explained():
            self._refuse_what_is_no_run()
            self._lock.acquire()
            try:
                self._refuse_what_is_taken()
                if self._lock.works:
                    remove_leftovers(self.path)
            except BaseException:
                self._lock.release()
                raise
        if not self._lock.works:
            warnings.warn(
                f"{self.given}: this file system has no locks, so nothing keeps a second run out of the directory; "
                "start none",
                stacklevel=2,
            )
        elif self._lock.left_by is not None:
            warnings.warn(
                f"{self.given}: {self._lock.left_by} has not ended its work there; if it still runs, and the two "
                "machines do not see each other's locks, stop one of the two",
                stacklevel=2,
            )

    def _refuse_what_is_no_run(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.given}: is a file; choose another output directory")
        ancestor = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        if not ancestor.is_dir():
            raise OutputError(f"{self.given}: {ancestor} is not a directory")
        if run_state(self.path) is RunState.OTHER:
            raise OutputError(
                f"{self.given}: holds files that are not a run's (there is no {RECORD}); choose another output "
                "directory"
            )

    def _refuse_what_is_taken(self) -> None:
        state = run_state(self.path)
        if state is RunState.FINISHED and not self.overwrite:
            raise OutputError(
                f"{self.given}: holds a finished run; choose another output directory, or replace it with --overwrite"
            )
        if state is RunState.UNFINISHED and not (self.overwrite or self.resume):
            raise OutputError(
                f"{self.given}: holds the checkpoints of an interrupted run; go on with --resume auto, or replace "
                f"it with --overwrite"
            )

    def begin(self, record: dict[str, Any]) -> None:
        """Mark the directory as that of an unfinished run, before its first step.

        Raises:
            OSError: It cannot be written.
        """
        with StagedFiles(self.path) as staged:
            _write_json(staged.folder / UNFINISHED, record)
            staged.publish([UNFINISHED])
        self.metrics = self.path / (_METRICS_BESIDE_OLD if (self.path / RECORD).exists() else METRICS)

    def publish(self, staged: StagedFiles) -> None:
        """Put an adapter in its place. From here on an older run is gone.

        Args:
            staged: The adapter's files, of this directory.

        Raises:
            OSError: It cannot be done. The older run is as it was, and `strerror` names the adapter's place.
        """
        self.keep()
        staged.publish([WEIGHTS_NAME, CONFIG_NAME], [self.path / RECORD, self.path / CURVE])

    def keep(self) -> None:
        """Leave what shows how the run went, also if it does not finish."""
        self._keeps = True

    def finish(self, record: dict[str, Any]) -> None:
        """Write the record: the run is finished.

        Raises:
            OSError, ValueError: It cannot be written; the adapter is there.
        """
        with StagedFiles(self.path) as staged:
            _write_json(staged.folder / RECORD, record)
            with suppress(FileNotFoundError):  # somebody removed it
                os.replace(self.metrics, self.path / METRICS)
            with suppress(FileNotFoundError):
                os.unlink(self.path / _METRICS_BESIDE_OLD)
            # In one step: the run that was not finished is.
            os.replace(staged.folder / RECORD, self.path / UNFINISHED)
            os.replace(self.path / UNFINISHED, self.path / RECORD)
            flush(self.path)

    def close(self) -> None:
        """Release the directory. A run that failed and left nothing to resume from leaves no files."""
        if not self._keeps:
            self._remove_beginning()
        self._lock.release()

    def clear(self) -> None:
        """Clean up after a process of the run that was killed, unless another owns the directory by now."""
        if not self.path.is_dir():
            return
        with suppress(OSError):
            with self._lock:
                remove_leftovers(self.path)
                self._remove_beginning()
            for path in self._missing:
                os.rmdir(path)

    def _remove_beginning(self) -> None:
        with suppress(OSError):
            if not (self.path / UNFINISHED).exists() or run_state(self.path) is RunState.UNFINISHED:
                return
            for name in (_METRICS_BESIDE_OLD, *([] if (self.path / RECORD).exists() else [METRICS]), UNFINISHED):
                with suppress(FileNotFoundError):
                    os.unlink(self.path / name)
            os.rmdir(self.path / CHECKPOINTS)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except MeshPEFTError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, DirectoryInUse):
                raise OutputError(f"{self.given}: {reason}") from error
            raise OutputError(f"{self.given}: cannot be written: {reason}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_flushed(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
