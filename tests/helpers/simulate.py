"""All ranks of a small mesh in one process (the package's own simulation), and what tests do with their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import enabled_local_tensor_mode
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshpeft.parallel import destroy_parallelism, parallel_group_info
from meshpeft.verify.simulation import fake_world, on_rank, simulate, the_same

__all__ = ["fake_world", "on_rank", "per_rank", "rank_values", "simulate", "standing_at", "the_same"]


def per_rank(make: Callable[[int], Tensor]) -> Tensor:
    """`make(rank)` on every rank of the world, simulated or real; `make(0)` without a world."""
    if (mode := enabled_local_tensor_mode()) is not None:
        return mode.rank_map(make)
    return make(dist.get_rank() if dist.is_initialized() else 0)


def rank_values(tensor: Tensor) -> list[Tensor]:
    """Every simulated rank's value, detached, in order."""
    return [on_rank(tensor, rank).detach() for rank in range(parallel_group_info().world.world_size)]


@contextmanager
def standing_at(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank, with a rank's plain numbers, of a world that is not there. No values are exchanged."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_parallelism()
        dist.destroy_process_group()
