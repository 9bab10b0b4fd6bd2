"""The full tensor that a layer's parameter is a slice of, as a function of the parameter.

| | forward | backward |
|---|---|---|
| dense, sharded over tp | S(dim) -> I, all-gather | I -> S(dim), slice |
| dense, replicated | nothing | nothing |
| experts | S -> R over each axis, all-gather | P -> S, reduce-scatter, divided by tp |

What is computed with it is `I` over tensor parallel: the same on every rank, as a loss is. Where the ranks use it on
different tokens, `mp_copy` makes it `R`. Ranks of expert parallel are ranks of data parallel, of tensor parallel, or
of both, so their gradients are summed, and each counts once for each rank of tensor parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshpeft.parallel.collectives import mp_gather, sp_gather
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import parallel_group_info
from meshpeft.parallel.tensor_layout import TensorLayout, layout_of_tensor

__all__ = ["master_tensor"]


def master_tensor(parameter: Tensor) -> Tensor:
    """Gather a parameter, in canonical order. A collective over each axis that shards it; differentiable.

    Args:
        parameter: Local values, with a layout.

    Returns:
        The full tensor of the layout's global shape, on every rank; a view of the parameter on one rank.

    Raises:
        ParallelError: the parameter has no layout.
    """
    layout = layout_of_tensor(parameter)
    if layout is None:
        raise ParallelError(
            f"a parameter of shape {tuple(parameter.shape)} has lost its layout: it was replaced by a new one; "
            "copy into it instead, or call set_layout on the new one"
        )
    parts = layout.split_parts(parameter.view_as(parameter))
    gather = sp_gather if layout.expert else mp_gather
    for dim, axis in reversed(layout.shards):
        parts = [gather(part, dim, axis) for part in parts]
    full = parts[0] if layout.fused_parts is None else torch.cat(parts, layout.fused_dim)
    return _with_gradient_over(full, _times_counted(layout))


def _times_counted(layout: TensorLayout) -> int:
    """How many times the same gradient of the full tensor is summed, by the gather and by `finalize_gradients`."""
    if layout.expert:
        return parallel_group_info().tp.world_size
    count = 1
    for axis in layout.grad_partial:
        count *= axis.world_size
    return count


def _with_gradient_over(full: Tensor, count: int) -> Tensor:
    """`full`, whose gradient is divided by `count`."""
    if count == 1 or not (full.requires_grad and torch.is_grad_enabled()):
        return full
    fixed = full.detach()
    return fixed + (full - fixed) / count
