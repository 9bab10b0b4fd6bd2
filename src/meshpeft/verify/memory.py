"""The memory that operations take and give back, followed storage by storage."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from meshpeft.verify.watch import Operation, tensors_in

__all__ = ["MemoryWatch"]


class MemoryWatch:
    """Records every storage that an operation allocates, and when it is freed.

    Memory that a kernel takes and gives back by itself is not seen, and neither is what an allocator holds back.
    """

    def __init__(self) -> None:
        # Storages that live, by a number that none has had before, and every change of their sum in order.
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._changes: list[tuple[int, int]] = []
        self._number = itertools.count()

    def seen(self, operation: Operation) -> None:
        """Take note of what an operation allocated."""
        known = operation.storages
        for tensor in tensors_in(operation.out):
            if not tensor.is_meta and id(tensor.untyped_storage()) not in known:
                known = known | {id(tensor.untyped_storage())}
                self._add(tensor.untyped_storage())

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
