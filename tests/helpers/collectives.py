"""Which collectives a piece of code makes, and how many elements each rank sends."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """Operator and number of elements that one rank puts in."""

    name: str
    elements: int


class CollectiveLog(TorchDispatchMode):
    """Notes every collective inside its context, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            # In-place collectives name their operand first, the others their result.
            sent = args[0] if name == "allreduce_" or name == "allreduce" else args[1]
            self.seen.append(Collective(name, sum(t.numel() for t in tree_leaves(sent) if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))
