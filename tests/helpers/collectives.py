"""Which collectives a piece of code makes, simulated or real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Collective", "count_collectives"]


class Collective(NamedTuple):
    """One call: `allreduce allgather reduce_scatter alltoall broadcast`, and the elements of its larger side."""

    name: str
    elements: int


NAMES = {
    "allreduce_": "allreduce",
    "_allgather_base_": "allgather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "alltoall",
    "all_to_all_single": "alltoall",
    "broadcast_": "broadcast",
}


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Collective]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            sizes = [leaf.numel() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls.append(Collective(NAMES.get(name, name), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """The collectives made inside, backward passes included, in order."""
    calls: list[Collective] = []
    with _Recorder(calls):
        yield calls
