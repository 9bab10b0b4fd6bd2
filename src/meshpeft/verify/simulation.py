"""All ranks of a small mesh in one process, through PyTorch's `LocalTensorMode`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import (
    LocalTensor,
    LocalTensorMode,
    _map_to_rank_local_val,
    enabled_local_tensor_mode,
)

# Not public, but what PyTorch's own simulations start their process group with; there is no other store that
# answers without a peer.
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshpeft.parallel import ParallelError, ParallelGroupInfo, destroy_parallelism, init_parallelism

__all__ = ["fake_world", "index_on_rank", "of_ranks", "on_rank", "ranks", "simulate", "the_same"]


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks whose collectives do nothing; this process is rank 0.

    Raises:
        ParallelError: this process already has a process group.
    """
    if dist.is_initialized():
        raise ParallelError("a simulation needs a process without a process group; run it outside the training job")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_parallelism()
        dist.destroy_process_group()


@contextmanager
def simulate(tp: int = 1, dp: int = 1, ep: int = 1, etp: int | None = None, pp: int = 1) -> Iterator[ParallelGroupInfo]:
    """Run the body on `pp * dp * tp` simulated ranks; with one rank, without torch.distributed."""
    world_size = pp * dp * tp
    if world_size == 1:
        yield init_parallelism()
        return
    with fake_world(world_size), LocalTensorMode(world_size):
        yield init_parallelism(tp, pp, ep, etp)


def on_rank(tensor: Tensor, rank: int) -> Tensor:
    """One simulated rank's value."""
    return tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor


def index_on_rank(index: int, rank: int) -> int:
    """One simulated rank's value of a number that may differ between them, such as its place on an axis."""
    return int(_map_to_rank_local_val(index, rank))


def of_ranks(values: Mapping[int, Tensor]) -> Tensor:
    """What [`on_rank`][meshpeft.verify.simulation.on_rank] takes apart: every simulated rank's value, as one tensor."""
    return LocalTensor(dict(values)) if enabled_local_tensor_mode() is not None else values[0]


def ranks() -> list[int]:
    """The simulated ranks; outside a simulation there is one."""
    mode = enabled_local_tensor_mode()
    return [0] if mode is None else sorted(mode.ranks)


def the_same(tensor: Tensor) -> Tensor:
    """The value that all ranks hold, detached.

    Raises:
        AssertionError: they differ.
    """
    return tensor.reconcile() if isinstance(tensor, LocalTensor) else tensor.detach().clone()
