"""Mesh axes made from the process groups of foreign layers."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from meshpeft.parallel import ParallelAxis

__all__ = ["axis_of_group"]

# One axis for each group and name, so that gradients of one group are summed together. The axis holds the group; an
# entry goes when torch.distributed has let go of it and no layer is left.
_axes: WeakKeyDictionary[ProcessGroup, dict[str, ParallelAxis]] = WeakKeyDictionary()


def axis_of_group(name: str, group: ProcessGroup | None) -> ParallelAxis:
    """The axis called `name` over the ranks of a group; of one rank where there is no group."""
    if group is None:
        return ParallelAxis(name)
    axes = _axes.setdefault(group, {})
    if name not in axes:
        axes[name] = ParallelAxis(name, group, dist.get_rank(group), dist.get_world_size(group))
    return axes[name]
