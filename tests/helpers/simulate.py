"""All ranks of a small mesh in one process, through PyTorch's `LocalTensorMode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshpeft.parallel import ParallelGroupInfo, destroy_parallelism, init_parallelism


@contextmanager
def simulate(tp: int = 1, dp: int = 1, ep: int = 1, etp: int | None = None, pp: int = 1) -> Iterator[ParallelGroupInfo]:
    """Run the body on `pp * dp * tp` simulated ranks; with one rank, without torch.distributed."""
    world = pp * dp * tp
    if world == 1:
        yield init_parallelism()
        return
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with LocalTensorMode(world):
            yield init_parallelism(tp, pp, ep, etp)
    finally:
        destroy_parallelism()
        dist.destroy_process_group()


def on_rank(tensor: Tensor, rank: int) -> Tensor:
    """One simulated rank's value."""
    return tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor


def the_same(tensor: Tensor) -> Tensor:
    """The value that all ranks hold; an error if they differ."""
    return tensor.reconcile() if isinstance(tensor, LocalTensor) else tensor
