"""Which collectives a piece of code makes, simulated, pretended or real, and how much each rank puts in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collective", "count_collectives"]


@dataclass(frozen=True, order=True)
class Collective:
    """One call: `allreduce allgather reduce_scatter alltoall broadcast`, and what one rank puts in.

    Attributes:
        name: the kind.
        elements, itemsize: how many, of how many bytes each.
        group: name of the process group; not compared.
    """

    name: str
    elements: int
    itemsize: int = 8
    group: str = field(default="", compare=False)

    @property
    def bytes(self) -> int:
        """What one rank puts in."""
        return self.elements * self.itemsize


# The operators, and which argument is a rank's own: collectives into a buffer name their result first.
OPERATORS = {
    "allreduce_": ("allreduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("allgather", 1),
    "allgather_": ("allgather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("alltoall", 1),
    "all_to_all_single": ("alltoall", 0),
    # The functional ones, which DTensors make.
    "all_reduce": ("allreduce", 0),
    "all_gather_into_tensor": ("allgather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
}
# Not collectives themselves: what the functional ones hand their results on with.
WAITS = ("wait_tensor", "_wrap_tensor_autograd")


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Collective]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and operator not in WAITS:
            name, own = OPERATORS[operator]  # an operator that is not here is to be added
            given = [leaf for leaf in tree_leaves(args[own]) if isinstance(leaf, Tensor)]
            (itemsize,) = {tensor.element_size() for tensor in given}
            elements = sum(tensor.numel() for tensor in given)
            self.calls.append(Collective(name, elements, itemsize, _group_name(args)))
        return func(*args, **(kwargs or {}))


def _group_name(args: Any) -> str:
    """Name of the group that an operator of c10d was given as an object, or a functional one by its name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().qualified_name():
            return dist.ProcessGroup.unbox(arg).group_name
    return next((arg for arg in reversed(args) if isinstance(arg, str)), "")


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """The collectives made inside, backward passes included, in order."""
    calls: list[Collective] = []
    with _Recorder(calls):
        yield calls
