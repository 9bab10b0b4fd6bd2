"""The collectives that appear in a forward pass, each with the states it takes and gives.

States per mesh axis, in the words of `spmd_types`: `R` replicate (gradient `P`), `I` invariant (gradient `I`),
`V`/`S(dim)` varying or sharded (gradient `V`), `P` partial, a summand (gradient `R`).

| function | forward | backward |
|---|---|---|
| `mp_copy` | I -> R, nothing | P -> I, all-reduce |
| `mp_reduce` | P -> I, all-reduce | I -> R, nothing |
| `mp_scatter` | I -> S(dim), slice | S(dim) -> I, all-gather |
| `mp_gather` | S(dim) -> I, all-gather | I -> S(dim), slice |
| `sp_gather` | S(dim) -> R, all-gather | P -> S(dim), reduce-scatter |
| `sp_reduce_scatter` | P -> S(dim), reduce-scatter | S(dim) -> R, all-gather |
| `all2all_hp2sp` | S(-1) -> S(0), all-to-all | S(0) -> S(-1), all-to-all |

On an axis of one rank each returns its argument itself. The forward functions of the first four are those of
`ml.models.parallel`; `mp_reduce`'s backward is the true adjoint: the identity for a sum, 1/world for an average.
A backward pass cannot be differentiated again: autograd does not see what a collective does, and would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from spmd_types import rules
from spmd_types.types import I, P, R, S
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel.communication import all_gather, all_reduce, all_to_all, reduce_scatter, take_slice
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info

__all__ = [
    "all2all_hp2sp",
    "mp_copy",
    "mp_gather",
    "mp_reduce",
    "mp_scatter",
    "sp_gather",
    "sp_reduce_scatter",
]

_SUM, _AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
_BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


def _tensor_parallel(axis: ParallelAxis | None) -> ParallelAxis:
    return parallel_group_info().tp if axis is None else axis


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, op: Any) -> Tensor:
        ctx.axis, ctx.op = axis, op
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return all_reduce(grads[0], ctx.axis, ctx.op), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis) -> Any:
        return rules.convert(x, axis.process_group, src=I, dst=R)


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, op: Any) -> Tensor:
        ctx.scale = 1 / axis.world_size if op == _AVG else None
        ctx.op = op
        return all_reduce(x, axis, op)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0] if ctx.scale is None else grads[0] * ctx.scale, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis) -> Any:
        return rules.all_reduce(x, axis.process_group, src=P, dst=I)


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return take_slice(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.axis, ctx.dim), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis, dim: int) -> Any:
        return rules.convert(x, axis.process_group, src=I, dst=S(dim % x.dim()))


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return take_slice(grads[0], ctx.axis, ctx.dim), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis, dim: int) -> Any:
        return rules.all_gather(x, axis.process_group, src=S(dim % x.dim()), dst=I)


class _SequenceGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.axis, ctx.dim), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis, dim: int) -> Any:
        return rules.all_gather(x, axis.process_group, src=S(dim % x.dim()), dst=R)


class _SequenceReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.axis, ctx.dim), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis, dim: int) -> Any:
        return rules.reduce_scatter(x, axis.process_group, src=P, dst=S(dim % x.dim()))


class _All2AllHp2Sp(Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, axis: ParallelAxis | None = None) -> Tensor:
        ctx.axis = _tensor_parallel(axis)
        return all_to_all(input_, ctx.axis, split_dim=0, concat_dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_output: Any) -> tuple[Tensor, None]:
        return all_to_all(grad_output[0], ctx.axis, split_dim=-1, concat_dim=0), None

    @staticmethod
    def spmd_typecheck(*, input_: Tensor, axis: ParallelAxis | None = None) -> Any:
        return rules.all_to_all(input_, _tensor_parallel(axis).process_group, src=S(input_.dim() - 1), dst=S(0))


def mp_copy(x: Tensor, op: Any = _SUM, axis: ParallelAxis | None = None) -> Tensor:
    """Copies the input to the model parallel region. I -> R; backward P -> I.

    Forward this does nothing; backward it reduces the gradient over the axis.

    Args:
        x: [*], the same on every rank.
        op: how the gradient is reduced: any op of torch.distributed that its backend has, but for the bitwise ones,
            which are of integers. Only the sum is the adjoint; an average is right where every rank's gradient is
            the same.
        axis: the axis; tensor parallel by default.

    Returns:
        x [*].

    Raises:
        ParallelError: a bitwise `op`.
    """
    if op in _BITWISE:
        raise ParallelError(f"mp_copy: op {op} is of integers, unlike gradients; use SUM, AVG, PRODUCT, MIN or MAX")
    axis = _tensor_parallel(axis)
    return x if axis.world_size == 1 else _apply(_Copy, x, axis, op)


def mp_reduce(x: Tensor, op: Any = _SUM, axis: ParallelAxis | None = None) -> Tensor:
    """Reduces the input from the model parallel region. P -> I; backward I -> R.

    Args:
        x: [*], a summand per rank.
        op: how the *input* is reduced. Its backward is the identity for a sum, 1/world_size for an average.
        axis: the axis; tensor parallel by default.

    Returns:
        The reduction [*], the same on every rank.

    Raises:
        ParallelError: a gradient is needed and `op` is neither a sum nor an average.
    """
    axis = _tensor_parallel(axis)
    if axis.world_size == 1:
        return x
    if op not in (_SUM, _AVG) and x.requires_grad and torch.is_grad_enabled():
        raise ParallelError(
            f"mp_reduce: op {op} has no gradient here and x requires one; use SUM or AVG, or call it on x.detach()"
        )
    return _apply(_Reduce, x, axis, op)


def mp_scatter(x: Tensor, dim: int = -1, axis: ParallelAxis | None = None) -> Tensor:
    """Scatters the input across the model parallel region. I -> S(dim); backward S(dim) -> I, an all-gather.

    Args:
        x: [.., N, ..], the same on every rank.
        dim: the dim to divide.
        axis: the axis; tensor parallel by default.

    Returns:
        This rank's slice [.., N / world_size, ..].

    Raises:
        ParallelError: N is not divisible.
    """
    axis = _tensor_parallel(axis)
    return x if axis.world_size == 1 else _apply(_Scatter, x, axis, dim)


def mp_gather(x: Tensor, dim: int = -1, axis: ParallelAxis | None = None) -> Tensor:
    """Gathers the input from the model parallel region. S(dim) -> I; backward I -> S(dim), a slice.

    Args:
        x: [.., N, ..], this rank's slice.
        dim: the dim that is divided.
        axis: the axis; tensor parallel by default.

    Returns:
        [.., N * world_size, ..], the same on every rank.
    """
    axis = _tensor_parallel(axis)
    return x if axis.world_size == 1 else _apply(_Gather, x, axis, dim)


def sp_gather(x: Tensor, dim: int = 0, axis: ParallelAxis | None = None) -> Tensor:
    """Gathers sequence shards for arithmetic that differs per rank. S(dim) -> R; backward P -> S(dim).

    x [.., N / R, ..] -> [.., N, ..]; the backward pass is a reduce-scatter.
    """
    axis = _tensor_parallel(axis)
    return x if axis.world_size == 1 else _apply(_SequenceGather, x, axis, dim)


def sp_reduce_scatter(x: Tensor, dim: int = 0, axis: ParallelAxis | None = None) -> Tensor:
    """Sums over the axis and keeps this rank's sequence shard. P -> S(dim); backward S(dim) -> R, an all-gather.

    x [.., N, ..] -> [.., N / R, ..].

    Raises:
        ParallelError: N is not divisible.
    """
    axis = _tensor_parallel(axis)
    return x if axis.world_size == 1 else _apply(_SequenceReduceScatter, x, axis, dim)


def all2all_hp2sp(input_: Tensor, axis: ParallelAxis | None = None) -> Tensor:
    """All-to-all from hidden parallel to sequence parallel. S(-1) -> S(0); backward S(0) -> S(-1).

    Args:
        input_: [N, .., H / R], this rank's columns of every token.
        axis: the axis; tensor parallel by default.

    Returns:
        [N / R, .., H], every column of this rank's tokens.

    Raises:
        ParallelError: N is not divisible.
    """
    axis = _tensor_parallel(axis)
    return input_ if axis.world_size == 1 else _apply(_All2AllHp2Sp, input_, axis)


def _apply(function: type[Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out
