"""Values that are not finite, NaN or infinity: found, named, and kept out of every file.

One such value in an adapter spoils every output of the model that it is on, and no optimizer step brings it back. So
`check_finite` stands before every writer of weights, and the training step asks `is_finite` of gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshpeft.parallel.agreement import gathered
from meshpeft.parallel.errors import MeshPEFTError, first_few
from meshpeft.parallel.layout import layout_of_tensor
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank, parallel_group_info
from meshpeft.parallel.states import all_reduce

__all__ = [
    "check_finite",
    "finite_everywhere",
    "finite_flag",
    "on_ranks",
    "true_on_all_ranks",
]


def finite_flag(values: Tensor) -> Tensor:
    """Whether all values are finite: a scalar on their device, so that nothing waits for it; true of integers.

    The smallest and the largest value tell, and both are NaN where any value is: no copy of the tensor is made.
    """
    local = values.to_local() if isinstance(values, DTensor) else values.detach()
    if not local.is_floating_point() or local.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=local.device)
    low, high = torch.aminmax(local if local.element_size() > 1 else local.float())  # float8 has no order
    return low.isfinite() & high.isfinite()


@on_each_rank
def _is_finite(values: Tensor) -> Tensor:
    """The same as a CPU tensor, on each rank of a simulation."""
    return finite_flag(values).cpu()


def finite_everywhere(number: Tensor) -> bool:
    """Whether a number is finite on every rank, as each computed it. A collective: all get the same answer."""
    bad = (~number.detach().isfinite().all()).to(torch.int32)
    return not bool(all_reduce(bad, parallel_group_info().world, dist.ReduceOp.MAX))


def on_ranks(ranks: Sequence[int], world_size: int) -> str:
    """` on ranks 1, 3`; nothing where there is one rank only."""
    if world_size == 1:
        return ""
    return f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


@torch.no_grad()
def check_finite(
    tensors: Iterable[tuple[str, Tensor]],
    what: str,
    error_type: type[MeshPEFTError] = MeshPEFTError,
    *,
    advice: str = "take a checkpoint from before it happened, or train again with a lower learning rate",
) -> None:
    """Check that every value is finite. A collective: if one rank's part is not, every rank raises the same sentence.

    Args:
        tensors: Full names and this rank's parts.
        what: What the values are about to become, such as `writing runs/a`.
        error_type: What is raised.
        advice: What to do about it.

    Raises:
        MeshPEFTError: Raised as `error_type`; it names the first few tensors, and the ranks that hold such values.
    """
    named = [(name, values) for name, values in tensors if not values.is_meta]
    bad = [name for name, values in named if not true_on_all_ranks(_is_finite(values))]
    found = gathered(bad, _axis_of([values for _, values in named]))
    names = list(dict.fromkeys(name for rank in found for name in rank))
    if names:
        where = on_ranks([rank for rank, own in enumerate(found) if own], len(found))
        raise error_type(
            f"{what}: {first_few(names)} {'holds' if len(names) == 1 else 'hold'} values that are not finite (NaN or "
            f"infinity){where}; {advice}"
        )


def _axis_of(tensors: Sequence[Tensor]) -> ParallelAxis:
    """The mesh; where there is none, the ranks over which another package sharded the tensors."""
    world = parallel_group_info().world
    if world.world_size > 1:
        return world
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        return ParallelAxis("world", dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    layouts = (layout_of_tensor(tensor) for tensor in tensors)
    axes = (axis for layout in layouts if layout is not None for axis in layout.shard_axes)
    return next((axis for axis in axes if axis.world_size > 1), world)


def true_on_all_ranks(flag: Tensor) -> bool:
    """Whether a flag is true on this rank; under simulation, on every one. Not a collective."""
    local = getattr(flag, "_local_tensors", None)
    return bool(flag) if local is None else all(bool(value) for value in local.values())
