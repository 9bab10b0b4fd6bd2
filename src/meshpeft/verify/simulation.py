"""All ranks of a small mesh in one process (PyTorch's `LocalTensorMode`), and the collectives that code makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import (
    LocalTensor,
    LocalTensorMode,
    _combine_rank_results,
    _is_inplace_op,
    _map_to_rank_local_val,
    enabled_local_tensor_mode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshpeft.parallel import ParallelError, ParallelGroupInfo, destroy_parallelism, init_parallelism
from meshpeft.verify.watch import Operation, tensors_in, watching

__all__ = [
    "Collective",
    "CollectiveWatch",
    "count_collectives",
    "fake_world",
    "index_on_rank",
    "of_ranks",
    "on_rank",
    "ranks",
    "simulate",
    "the_same",
]


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Start a process group of `world_size` ranks whose collectives do nothing; this process is rank 0.

    Raises:
        ParallelError: This process already has a process group.
    """
    if dist.is_initialized():
        raise ParallelError("a simulation needs a process without a process group; run it outside the training job")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        destroy_parallelism()
        dist.destroy_process_group()


class Ranks(LocalTensorMode):
    """PyTorch's `LocalTensorMode`, with most operators at a third of the cost.

    PyTorch's own carries every rank's random state into and out of every operator, and gives the wrapper of a view the
    storage of its base's, which asks for sizes through a mode that is made anew each time. Neither is needed here: only
    operators that are tagged as such draw, and autograd reads no storage; the ranks' own tensors are true views.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not types and (self._disable or (args and isinstance(args[0], Tensor))):
            return func(*args, **kwargs)  # one rank's own tensors
        varying = [index for index, arg in enumerate(args) if _varies(arg)]
        alike = not any(map(_varies, kwargs.values())) and all(type_ is LocalTensor for type_ in types)
        if self._disable or not varying or not alike or not _runs_rank_by_rank(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        results = {}
        for rank in self.ranks:
            own = list(args)
            for index in varying:
                own[index] = _value_on_rank(args[index], rank)
            results[rank] = func(*own, **kwargs)
        return args[0] if _is_inplace_op(func) else _combine_rank_results(results, None)


# LocalTensorMode answers the first two from the wrapper, and treats empty results of the others in a way of its own.
_SPECIAL = ("aten::dim", "aten::sym_size", "aten::split.Tensor", "aten::hash_tensor")


@cache
def _runs_rank_by_rank(func: Any) -> bool:
    """Whether an operator draws nothing, keeps its arguments' sizes, and writes into its first argument at most."""
    tags = {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(func.tags)
    if func.namespace != "aten" or tags or func.name() in _SPECIAL:
        return False
    written = sum(bool(argument.is_write) for argument in func._schema.arguments)
    return written == 0 or (written == 1 and _is_inplace_op(func))


def _varies(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(isinstance(item, (LocalTensor, torch.SymInt)) for item in arg)
    return isinstance(arg, (LocalTensor, torch.SymInt))


def _value_on_rank(arg: Any, rank: int) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_map_to_rank_local_val(item, rank) for item in arg]
    return _map_to_rank_local_val(arg, rank)


@contextmanager
def simulate(
    tp: int = 1, dp: int = 1, ep: int = 1, etp: int | None = None, pp: int = 1, cp: int = 1
) -> Iterator[ParallelGroupInfo]:
    """Run the body on `pp * dp * cp * tp` simulated ranks; with one rank, without torch.distributed."""
    world_size = pp * dp * cp * tp
    if world_size == 1:
        yield init_parallelism()
        return
    with fake_world(world_size), Ranks(world_size):
        yield init_parallelism(tp, pp, ep, etp, cp)


def on_rank(tensor: Tensor, rank: int) -> Tensor:
    """Return one simulated rank's value."""
    return tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor


def index_on_rank(index: int, rank: int) -> int:
    """Return one simulated rank's value of a number that may differ between them, such as its place on an axis."""
    return int(_map_to_rank_local_val(index, rank))


def of_ranks(values: Mapping[int, Tensor]) -> Tensor:
    """Join every simulated rank's value into one tensor; the inverse of
    `on_rank`.
    """
    return LocalTensor(dict(values)) if enabled_local_tensor_mode() is not None else values[0]


def ranks() -> list[int]:
    """List the simulated ranks; outside a simulation there is one."""
    mode = enabled_local_tensor_mode()
    return [0] if mode is None else sorted(mode.ranks)


def the_same(tensor: Tensor) -> Tensor:
    """Return the value that all ranks hold, detached.

    Raises:
        AssertionError: They differ.
    """
    return tensor.reconcile() if isinstance(tensor, LocalTensor) else tensor.detach().clone()


@dataclass(frozen=True, order=True)
class Collective:
    """One call: `allreduce allgather reduce_scatter alltoall broadcast`, and what one rank puts in.

    Attributes:
        name: The kind.
        elements, itemsize: How many, of how many bytes each.
        group: Name of the process group; not compared.
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


class CollectiveWatch:
    """Records collectives.

    Attributes:
        calls: They, in order.
    """

    def __init__(self) -> None:
        self.calls: list[Collective] = []

    def seen(self, operation: Operation) -> None:
        """Record an operation that is a collective."""
        func, args = operation.func, operation.args
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        operator = func.overloadpacket.__name__
        if operator not in WAITS:
            name, own = OPERATORS[operator]  # an operator that is not here is to be added
            given = list(tensors_in(args[own]))
            (itemsize,) = {tensor.element_size() for tensor in given}
            elements = sum(tensor.numel() for tensor in given)
            self.calls.append(Collective(name, elements, itemsize, _group_name(args)))


def _group_name(args: Any) -> str:
    """Find the name of the group that an operator was given, as an object (c10d) or by its name (functional)."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().qualified_name():
            return dist.ProcessGroup.unbox(arg).group_name
    return next((arg for arg in reversed(args) if isinstance(arg, str)), "")


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """Record the collectives made inside, backward passes included, in order."""
    watch = CollectiveWatch()
    with watching(watch):
        yield watch.calls
