"""The memory that operations take and give back, followed storage by storage."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshpeft.parallel.sharded_base import BlockTensor

__all__ = ["MemoryWatch"]


class MemoryWatch(TorchDispatchMode):
    """Records every storage that an operation inside allocates, and when it is freed.

    Memory that a kernel takes and gives back by itself is not seen, and neither is what an allocator holds back.
    """

    def __init__(self) -> None:
        super().__init__()
        # Storages that live, by a number that none has had before, and every change of their sum in order.
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._changes: list[tuple[int, int]] = []
        self._number = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if BlockTensor in types:
            return NotImplemented  # what it is read for comes here next
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta and id(leaf.untyped_storage()) not in given:
                given.add(id(leaf.untyped_storage()))
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = next(self._number), storage.nbytes()

        def freed(_: Any) -> None:
            self._live.pop(number, None)
            self._changes.append((number, -size))

        self._live[number] = weakref.ref(storage, freed)
        self._changes.append((number, size))

    def alive(self) -> int:
        """Return how many bytes are in use."""
        return sum(change for _, change in self._changes)

    def peak(self) -> int:
        """Return the most bytes in use at a time, without those that are in use now: of gradients, after a step."""
        stays = set(self._live)
        running = itertools.accumulate(change for number, change in self._changes if number not in stays)
        return max(running, default=0)
