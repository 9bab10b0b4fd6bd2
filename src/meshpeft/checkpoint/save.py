"""Save a checkpoint, in the background if wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from meshpeft.checkpoint.content import ModelContent, OptimizerContent, random_state
from meshpeft.checkpoint.coordination import checkpoint_group, explained, rank_and_world_size
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.identity import describe_adapters, describe_base
from meshpeft.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from meshpeft.checkpoint.storage import Slice, SliceSavePlanner, Writer, labelled
from meshpeft.hub.staging import write_flushed
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.finite import check_finite

__all__ = ["Save", "finish_saves", "save_checkpoint"]


class Save:
    """A checkpoint that is being saved.

    Attributes:
        path: Its path once it is complete.
    """

    def __init__(self, path: Path, write: Callable[[], None]) -> None:
        self.path = path
        self._write = write
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def start(self) -> None:
        """Write it in the background."""
        # Not a daemon: a program that ends without waiting still gets its last checkpoint.
        self._thread = Thread(target=self._run, name=f"save {self.path.name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # raised where it is waited for
            self._error = error

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for, on this rank."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the checkpoint is complete, and return its path.

        Raises:
            CheckpointError: It could not be written; the checkpoints that were there are as they were.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self.path


# One at a time: the ranks' saves meet in the order in which they began.
_under_way: list[Save] = []


def finish_saves() -> None:
    """Wait for a save in the background: what comes next uses its group.

    Raises:
        CheckpointError: It could not be written.
    """
    while _under_way:
        _under_way.pop().wait()


def save_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    full_model: bool = False,
    keep: int | None = None,
    asynchronous: bool = False,
) -> Save:
    """Write `directory/step-00000010`. A collective: every rank calls it, and writes its part.

    A checkpoint holds, under names and shapes that no layout changes, the adapters and whatever else is trainable,
    the optimizer's state, the states of the random generators (python's, numpy's and torch's CPU generator, which
    every rank seeds alike), and `extra`. It is visible only when it is complete. All ranks must share the directory.

    Args:
        model: With its adapters.
        directory: Directory of the run's checkpoints; made if it does not exist.
        step: Optimizer steps that were done; a checkpoint of the same step is replaced.
        optimizer: Over some of the model's trainable parameters.
        extra: The caller's own state, plain JSON, the same on every rank.
        full_model: Hold the frozen base, too; otherwise only a checksum of it.
        keep: Remove all but this many of the newest checkpoints afterwards.
        asynchronous: Return when the values are copied to the CPU's memory, and write in the background.

    Returns:
        The save; done already, or to be waited for. The next one waits for it first.

    Raises:
        CheckpointError: Nothing to save, a state that cannot be stored, a value that is not finite, or (unless
            asynchronous) a directory that cannot be written; the checkpoints that were there are as they were.
    """
    finish_saves()
    group = checkpoint_group()
    checkpoints = CheckpointDirectory(Path(directory))
    with all_or_none(f"saving to {directory}", CheckpointError):
        if step < 0 or (keep is not None and keep < 1):
            raise CheckpointError(f"step={step}, keep={keep}: expected a step of at least 0, and to keep at least 1")
        content = ModelContent.of(model, full_model=full_model)
        state = None if optimizer is None else OptimizerContent.of(optimizer, content)
        generators, generator = random_state()
        slices = [generator, *([] if state is None else state.slices())]
        manifest = Manifest(
            step=step,
            full_model=full_model,
            tensors={},
            files={},
            model={"adapters": describe_adapters(model)},
            optimizer=None if state is None else state.groups(),
            random=generators,
            extra=_snapshot(extra or {}),
        )
    slices += content.slices()  # a collective where the base is sharded over its replicas
    if asynchronous:
        with all_or_none(f"saving to {directory}", CheckpointError):
            slices = [_copied(part) for part in slices]
    check_finite(((part.key, part.values()) for part in slices), f"saving to {directory}", CheckpointError)
    manifest = replace(manifest, model={**manifest.model, "base": describe_base(model, content.frozen)})

    def publish(tensors: dict[str, TensorRecord], files: dict[str, FileRecord]) -> None:
        whole = replace(manifest, tensors=tensors, files=files)
        whole.check_tensors()
        write_flushed(checkpoints.partial(step) / MANIFEST, whole.encode())
        checkpoints.publish(step)
        if keep is not None:
            checkpoints.keep(keep)

    def write() -> None:
        writer = Writer(checkpoints.partial(step), lambda: checkpoints.prepare(step), publish)
        try:
            with explained(f"saving to {directory}"):
                save(labelled(slices), storage_writer=writer, planner=SliceSavePlanner(), process_group=group)
        finally:
            if rank_and_world_size(group)[0] == 0:
                checkpoints.discard(step)

    started = Save(checkpoints.of_step(step), write)
    if asynchronous:
        _under_way.append(started)
        started.start()
    else:
        write()
    return started


def _snapshot(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the values, which must not change while they are written in the background."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(extra), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a checkpoint's extra values must be plain JSON: {error}") from error
    return copy


def _copied(part: Slice) -> Slice:
    copy = part.values().to("cpu", copy=True)
    return replace(part, values=lambda: copy)
