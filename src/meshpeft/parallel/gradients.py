"""What happens to gradients between the backward pass and the optimizer.

Each parameter knows from its layout the axes over which its gradient is partial. `finalize_gradients` sums
every one exactly once, in one flat buffer per distinct set of axes; nothing else in the package communicates
gradients, except the collectives inside a forward's own backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshpeft.parallel.layout import TensorLayout, layout_of_tensor
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.states import all_reduce

__all__ = ["clip_gradients_", "finalize_gradients", "gradient_axes", "gradient_norm"]


def _trainable(source: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    tensors = source.parameters() if isinstance(source, nn.Module) else source
    unique = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}
    return list(unique.values())


def gradient_axes(layout: TensorLayout | None) -> tuple[ParallelAxis, ...]:
    """The axes of more than one rank over which a parameter's gradient is partial after the backward pass.

    Those of its layout, and the axes that shard tokens. A parameter without a layout is replicated.
    """
    axes = parallel_group_info().token_axes() if layout is None else (*layout.grad_partial, *layout.token_axes)
    return tuple(axis for axis in axes if axis.world_size > 1)


def _reduction_groups(axes: tuple[ParallelAxis, ...]) -> tuple[ParallelAxis, ...]:
    """One axis to reduce over where the mesh has the joined group, else the axes one after the other."""
    if len(axes) < 2:
        return axes
    info = parallel_group_info()
    own = all(getattr(info, axis.name, None) is axis for axis in axes)
    joined = info.joined_axes.get(frozenset(axis.name for axis in axes)) if own else None
    return axes if joined is None else (joined,)


def finalize_gradients(source: nn.Module | Iterable[Tensor]) -> None:
    """Sum every partial gradient, once. Call it once per optimizer step, after the last backward.

    Every trainable parameter has a gradient afterwards (zero where the step did not reach it), so that what the
    optimizer does does not depend on the layout. float16 and bfloat16 are summed in float32.

    Args:
        source: a module, or parameters, in the same order on every rank.
    """
    buckets: dict[tuple[tuple[ParallelAxis, ...], torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in _trainable(source):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        axes = gradient_axes(layout_of_tensor(parameter))
        if axes:
            dtype = torch.promote_types(parameter.grad.dtype, torch.float32)
            buckets.setdefault((axes, dtype, parameter.device), []).append(parameter)
    for (axes, dtype, _), parameters in buckets.items():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([_dense(grad).reshape(-1).to(dtype) for grad in grads])
        for axis in _reduction_groups(axes):
            dist.all_reduce(flat, group=axis.group)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            total = summed.view(grad.shape)
            # The gradient of a sparse embedding stays sparse: its optimizer takes no other.
            grad.copy_(total.to_sparse(grad.sparse_dim()) if grad.is_sparse else total)


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def gradient_norm(source: nn.Module | Iterable[Tensor], *, spoiled_by: Tensor | None = None) -> Tensor:
    """The 2-norm of all final gradients: a replicated parameter counts once, a sharded one over its shards.

    It is not finite on every rank if it is not on one: ranks that share a parameter leave the same steps out.

    Args:
        source: a module or parameters whose gradients `finalize_gradients` has summed.
        spoiled_by: Values that make the norm NaN, and change nothing else, where they are not finite on a rank of
            tensor parallel.

    Returns:
        A scalar, the same on every rank, in float32 or the widest type of the gradients.
    """
    squares: dict[tuple[ParallelAxis, ...], Tensor] = {}
    for parameter in _trainable(source):
        if parameter.grad is None:
            continue
        layout = layout_of_tensor(parameter)
        axes = () if layout is None else layout.shard_axes
        wide = torch.promote_types(parameter.grad.dtype, torch.float32)
        square = parameter.grad.detach().to(wide).square().sum()
        squares[axes] = squares[axes] + square if axes in squares else square
    total = squares.pop((), torch.zeros((), dtype=torch.float32))
    tp = parallel_group_info().tp
    if tp.world_size > 1 and not any(tp in axes for axes in squares):
        squares[(tp,)] = torch.zeros_like(total)
    # Replicated gradients, and what the caller knows, are alike over token axes, and ought to be over tensor
    # parallel. Where they are not, the sums over shards tell the other ranks: 0 * x is NaN where x is not finite.
    spoiled = total * 0 if spoiled_by is None else total * 0 + (spoiled_by.detach().to(total.device) * 0).sum()
    total = total + spoiled
    for axes, square in squares.items():
        square = square + spoiled.to(square)
        for axis in _reduction_groups(axes):
            square = all_reduce(square, axis)
        total = total.to(torch.promote_types(total.dtype, square.dtype)).to(square.device) + square
    return total.sqrt()


def clip_gradients_(source: nn.Module | Iterable[Tensor], max_norm: float, *, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients down so that their global norm is at most `max_norm`; in place.

    A norm that is not finite makes every gradient NaN, or 0: ask for it first and leave the optimizer's step out.

    Args:
        source: a module, or parameters.
        max_norm: The largest norm.
        norm: What `gradient_norm` gave, if it was asked for already.

    Returns:
        The norm before clipping. The factor is `torch.nn.utils.clip_grad_norm_`'s: max_norm / (norm + 1e-6), at
        most 1.
    """
    parameters = _trainable(source)
    norm = gradient_norm(parameters) if norm is None else norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            # A scalar tensor of a wider type changes no gradient's type, and is not rounded to it first.
            parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm
