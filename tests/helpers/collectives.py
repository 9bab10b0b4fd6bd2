"""Which collectives a piece of code makes, simulated or real, and how much each rank puts in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collective", "count_collectives"]


class Collective(NamedTuple):
    """One call: `allreduce allgather reduce_scatter alltoall broadcast`, and what one rank puts in.

    `elements` of `itemsize` bytes each; most tests run in float64.
    """

    name: str
    elements: int
    itemsize: int = 8


# The operators, and which argument is a rank's own: collectives into a buffer name their result first.
OPERATORS = {
    "allreduce_": ("allreduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("allgather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
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
            self.calls.append(Collective(name, sum(tensor.numel() for tensor in given), itemsize))
        return func(*args, **(kwargs or {}))


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """The collectives made inside, backward passes included, in order."""
    calls: list[Collective] = []
    with _Recorder(calls):
        yield calls
