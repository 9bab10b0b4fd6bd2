"""All ranks of a small mesh in one process, through PyTorch's `LocalTensorMode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

# Not public, but what PyTorch's own simulations start their process group with; there is no other store that
# answers without a peer.
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshpeft.parallel import ParallelError, ParallelGroupInfo, destroy_parallelism, init_parallelism

__all__ = ["fake_world", "on_rank", "simulate", "the_same"]


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


def the_same(tensor: Tensor) -> Tensor:
    """The value that all ranks hold, detached.

    Raises:
        AssertionError: they differ.
    """
    return tensor.reconcile() if isinstance(tensor, LocalTensor) else tensor.detach().clone()
