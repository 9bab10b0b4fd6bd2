"""Loading a checkpoint at any layout: all of it, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

from meshpeft.checkpoint.content import ModelContent, OptimizerContent
from meshpeft.checkpoint.coordination import agreed, checkpoint_group, explained, rank_and_world_size
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.identity import check_same_model, describe_adapters, describe_base
from meshpeft.checkpoint.incoming import Incoming
from meshpeft.checkpoint.manifest import MANIFEST, Manifest
from meshpeft.checkpoint.save import finish_saves
from meshpeft.checkpoint.slices import SliceLoadPlanner, labelled
from meshpeft.checkpoint.storage import Reader
from meshpeft.hub.errors import CheckpointError
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.errors import blamed_on

__all__ = ["LoadedCheckpoint", "find_checkpoint", "latest_checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was found, or loaded.

    Attributes:
        path: of the checkpoint.
        step: optimizer steps that had been done.
        extra: the caller's own state.
        skipped: newer checkpoints that were broken, each with what is wrong with it.
    """

    path: Path
    step: int
    extra: Mapping[str, Any]
    skipped: tuple[str, ...] = ()


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint in a directory that is whole, every byte checked; `None` if there is none.

    Not a collective. Broken ones are named in a warning.
    """
    checkpoints = CheckpointDirectory(Path(directory))
    for step in checkpoints.steps():
        path = checkpoints.of_step(step)
        try:
            manifest = Manifest.read(path)
            for name in manifest.files:
                manifest.check_file(path, name, values=True)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
        else:
            return path
    return None


def find_checkpoint(directory: str | Path) -> LoadedCheckpoint:
    """What `load_checkpoint` would load from a directory, without a model to load it into. A collective.

    Raises:
        CheckpointError: the directory is no checkpoint and holds no whole one.
    """
    finish_saves()
    path, manifest, skipped = _choose(CheckpointDirectory(Path(directory)), checkpoint_group())
    return LoadedCheckpoint(path, manifest.step, manifest.extra, skipped)


def load_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    check_base: bool = True,
    check: Callable[[dict[str, Any], Path], None] | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint into a model, and an optimizer. A collective: every rank calls it, and reads its slices.

    The layout that wrote it does not matter. All files are checked before anything is read, each by one of the ranks,
    and the values are taken over when every rank has its own.

    Args:
        model: built as the one that was saved: the same base with the same adapters.
        directory: a checkpoint; or a directory of them, of which the newest whole one is taken.
        optimizer: its state is loaded, with the options of its groups, and the random generators are set.
        check_base: the frozen base must be the one that the checkpoint was made on; without this, adapters may be
            loaded on to a base of another type, or one without values.
        check: the caller's own comparison of what it gave as `extra`, and the path for its message; what it raises is
            raised on every rank before anything is changed.

    Raises:
        CheckpointError: the directory is no checkpoint and holds no whole one; or it is of another base model, rank,
            method, target set, type or optimizer. The message names the first difference, on every rank; model,
            optimizer and generators are as they were.
    """
    finish_saves()
    group = checkpoint_group()
    path, manifest, skipped = _choose(CheckpointDirectory(Path(directory)), group)
    with all_or_none(f"loading {path}", CheckpointError):
        content = ModelContent.of(model, full_model=manifest.full_model)
        state = None if optimizer is None else OptimizerContent.of(optimizer, content)
        own = {"adapters": describe_adapters(model)}
    base = describe_base(model, content.frozen) if check_base else manifest.model.get("base")
    with all_or_none(f"loading {path}", CheckpointError), _consistent(path):
        if check is not None:
            check(dict(manifest.extra), path)
        check_same_model(manifest.model, {**own, "base": base}, path)
        incoming = Incoming(path, manifest, content, state)
    with explained(f"loading {path}"):
        load(
            labelled(incoming.reads),
            storage_reader=Reader(path, manifest.tensors),
            planner=SliceLoadPlanner(),
            process_group=group,
        )
    with all_or_none(f"loading {path}", CheckpointError), _consistent(path):
        take_over = incoming.prepared()
    take_over()
    return LoadedCheckpoint(path, manifest.step, manifest.extra, skipped)


def _choose(
    checkpoints: CheckpointDirectory, group: dist.ProcessGroup | None
) -> tuple[Path, Manifest, tuple[str, ...]]:
    """The best candidate whose files are all as they were written; every rank checks some of them."""
    rank, world_size = rank_and_world_size(group)
    with all_or_none(f"reading {checkpoints.path}", CheckpointError):
        candidates = checkpoints.candidates()
    broken: list[str] = []
    for path in agreed(candidates, f"reading {checkpoints.path}", group):
        try:
            with all_or_none("checking", CheckpointError):  # every message names its file
                manifest = Manifest.read(path)
                for number, name in enumerate(manifest.files):
                    manifest.check_file(path, name, values=number % world_size == rank)
        except CheckpointError as error:
            broken.append(str(error))
        else:
            for text in broken if rank == 0 else ():
                warnings.warn(f"{text}; {path.name} is taken instead", stacklevel=3)
            return path, manifest, tuple(broken)
    if len(broken) == 1:
        raise CheckpointError(broken[0])
    raise CheckpointError(f"{checkpoints.path} holds no whole checkpoint; the newest: {broken[0]}")


def _consistent(path: Path) -> AbstractContextManager[None]:
    """Around what reads a manifest's free sections, whose form was not checked when it was parsed."""
    return blamed_on(f"{path / MANIFEST} is inconsistent", CheckpointError)
