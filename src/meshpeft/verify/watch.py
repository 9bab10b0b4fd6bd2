"""One dispatch mode for all that is told of every operation: its collectives, its memory, its work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshpeft.parallel.sharded_base import BlockTensor

__all__ = ["Operation", "Watch", "tensors_in", "watching"]


class Operation(NamedTuple):
    """An operation that was done.

    Attributes:
        func: The operator.
        args, kwargs: What it was given.
        out: What it gave.
        given: The tensors among its arguments.
        storages: Identities of their storages, as they were before.
    """

    func: Any
    args: Any
    kwargs: Any
    out: Any
    given: list[Tensor]
    storages: set[int]


class Watch(Protocol):
    """Is told of operations."""

    def seen(self, operation: Operation) -> None:
        """Take note of an operation that was done."""


class watching(TorchDispatchMode):
    """Tells watches of every operation inside, backward passes included, in order."""

    def __init__(self, *watches: Watch) -> None:
        super().__init__()
        self._watches = watches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if BlockTensor in types:
            return NotImplemented  # what it is read for comes here next
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        storages = {id(tensor.untyped_storage()) for tensor in given}
        out = func(*args, **kwargs)
        operation = Operation(func, args, kwargs, out, given, storages)
        for watch in self._watches:
            watch.seen(operation)
        return out


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operator."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))
