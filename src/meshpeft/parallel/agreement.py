"""Failing together: what goes wrong on one rank is an error on every rank, and nobody waits for the dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.parallel.mesh import ParallelAxis, is_simulated, parallel_group_info

__all__ = ["all_or_none", "gathered", "kept", "on_every_rank", "raise_everywhere"]

T = TypeVar("T")


@contextmanager
def all_or_none(what: str, error_type: type[MeshPEFTError] = MeshPEFTError) -> Iterator[None]:
    """A block without collectives, run by every rank: if it raises on one, it raises on all. A collective at its end.

    Args:
        what: What the block does, for the ranks that hear of another's failure, such as `reading runs/a`.
        error_type: What those ranks, and ranks whose failure is an `OSError`, raise.
    """
    failures: list[Exception] = []
    with kept(failures):
        yield
    raise_everywhere(failures, what, error_type)


@contextmanager
def kept(failures: list[Exception]) -> Iterator[None]:
    """Keep an error until the other ranks, which are in collectives that need this one, can be told."""
    try:
        yield
    except Exception as error:
        failures.append(error)


def raise_everywhere(
    failures: list[Exception],
    what: str,
    error_type: type[MeshPEFTError] = MeshPEFTError,
    *,
    beyond_mesh: bool = False,
) -> None:
    """Raise this rank's first failure, or else that another rank reports. A collective.

    Args:
        failures: Failures on this rank.
        what, error_type: See `all_or_none`.
        beyond_mesh: Every process of torch.distributed takes part, also where the mesh was never told of them.
    """
    failure = failures[0] if failures else None
    everyone = None
    if beyond_mesh and dist.is_initialized():
        everyone = ParallelAxis("world", dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    reports = gathered(None if failure is None else f"{what}: {failure}", everyone)
    if isinstance(failure, OSError):
        raise error_type(f"{what}: {failure.strerror or failure}") from failure
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise error_type(f"on rank {rank}, {report}")


def on_every_rank(verdict: bool) -> bool:
    """Whether every rank comes to this verdict by its own numbers, which may be rounded otherwise. A collective."""
    return all(gathered(verdict))


def gathered(value: T, axis: ParallelAxis | None = None) -> list[T]:
    """Every rank's value, a plain python object, in the order of the ranks. A collective.

    Simulated ranks share one object: there is one value then, as there is with one rank.

    Args:
        value: This rank's value.
        axis: Axis to gather over; every rank of the mesh by default.
    """
    axis = parallel_group_info().world if axis is None else axis
    if axis.world_size == 1 or is_simulated():
        return [value]
    values: list[T] = [value] * axis.world_size
    dist.all_gather_object(values, value, group=axis.group)
    return values
