"""Mesh axes made from the process groups of foreign packages."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from meshpeft.parallel import ParallelAxis

__all__ = ["axis_of_group"]

# One axis for each group, so that gradients of one group are summed together. An axis holds its group: while there is
# an entry, no other group can have the same identity.
_axes: WeakValueDictionary[tuple[str, int], ParallelAxis] = WeakValueDictionary()


def axis_of_group(name: str, group: ProcessGroup) -> ParallelAxis:
    """The axis called `name` over the ranks of a group."""
    axis = _axes.get((name, id(group)))
    if axis is None:
        axis = ParallelAxis(name, group, dist.get_rank(group), dist.get_world_size(group))
        _axes[name, id(group)] = axis
    return axis
