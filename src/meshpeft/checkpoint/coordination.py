"""What ranks need to save and load together: a process group of their own, and failures as sentences."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.mesh import is_simulated

__all__ = ["agreed", "checkpoint_group", "cpu_group", "explained", "rank_and_world_size"]

# By purpose, in the process group that they were made in: a program may end one world and start another.
_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def checkpoint_group() -> dist.ProcessGroup | None:
    """Return a process group of all ranks for checkpoints alone, on the CPU; `None` without torch.distributed.

    A save in the background must not send through a group that anything else uses at that time. A collective at the
    first call.

    Raises:
        CheckpointError: The ranks are simulated in one process.
    """
    if is_simulated():
        raise CheckpointError("simulated ranks have no checkpoints of their own; export the adapter instead")
    if not dist.is_initialized():
        # torch.distributed.checkpoint warns of a single process, which is meant here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    return cpu_group("checkpoints")


def cpu_group(purpose: str) -> dist.ProcessGroup | None:
    """Return a process group of all ranks on the CPU for one purpose; `None` without torch.distributed.

    A collective at the first call for a purpose.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    if purpose not in _groups or _groups[purpose][0] is not world:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _groups[purpose] = (world, made)
    return _groups[purpose][1]


def rank_and_world_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this rank's index in the group, and the group's size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def agreed(value: Any, what: str, group: dist.ProcessGroup | None) -> Any:
    """Return `value` if it is the same on every rank. A collective.

    Raises:
        CheckpointError: On every rank, if it is not.
    """
    if group is None:
        return value
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise CheckpointError(
                f"{what}: rank 0 sees {values[0]}, rank {rank} sees {other}; the directory must be one that all "
                "machines share"
            )
    return value


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn torch.distributed.checkpoint's report of failures on ranks into one sentence.

    Raises:
        CheckpointError: The first rank's failure.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
            raise cause from error
        reason = (cause.strerror or str(cause)) if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"
        raise CheckpointError(f"{what}: {reason} (rank {rank})") from error
