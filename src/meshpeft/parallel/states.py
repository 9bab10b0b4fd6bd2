"""The parallel state of a tensor on one mesh axis, and `convert`, the one way from a state to another.

| state | values on the ranks of the axis | its gradient |
|---|---|---|
| `R` replicate | the same | `P` |
| `I` invariant | the same | `I` |
| `V` varying, `Shard(dim)` | different; slices of one tensor along `dim` | `V`, `Shard(dim)` |
| `P` partial | parts of a sum; the tensor is their sum | `R` |

The states are those of PyTorch's `spmd_types`. The last column (`gradient_state`) is all that a backward pass needs: a
conversion from `src` to `dst` sends its gradient from the gradient state of `dst` to that of `src`. So every pair of
states has one collective, and its adjoint is the entry of another pair:

| src -> dst | forward | backward | documented name |
|---|---|---|---|
| I -> R | nothing | P -> I, all-reduce | `mp_copy` |
| P -> I | all-reduce | I -> R, nothing | `mp_reduce` |
| P -> R | all-reduce | P -> R, all-reduce | |
| I -> Shard | slice | Shard -> I, all-gather | `mp_scatter` |
| Shard -> I | all-gather | I -> Shard, slice | `mp_gather` |
| Shard -> R | all-gather | P -> Shard, reduce-scatter | `sp_gather` |
| P -> Shard | reduce-scatter | Shard -> R, all-gather | `sp_reduce_scatter` |
| Shard(i) -> Shard(j) | all-to-all | Shard(j) -> Shard(i), all-to-all | `all2all_hp2sp` |

Nothing leads from `R` to another state: the gradient would have to become partial. On an axis of one rank, and between
equal states, `convert` returns its argument itself. A backward pass cannot be differentiated again: autograd does not
see what a collective does, and would be wrong.

The raw collectives below the table (`all_reduce`, `all_gather`, ..) have no gradient: autograd functions call them. No
other code calls torch.distributed for activations, but for the exchange of tokens with experts (`dispatch.py`).
`[.., N / R, ..]` in the docstrings is this rank's part of a dim of N over R ranks.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from spmd_types import rules
from spmd_types.types import I, P, PerMeshAxisLocalSpmdType, R, Shard, V
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, is_simulated, on_each_rank, parallel_group_info

__all__ = [
    "I",
    "P",
    "R",
    "Shard",
    "State",
    "V",
    "all2all_hp2sp",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "convert",
    "differs",
    "gradient_state",
    "mp_copy",
    "mp_gather",
    "mp_reduce",
    "mp_scatter",
    "positive_dim",
    "reduce_scatter",
    "sp_gather",
    "sp_reduce_scatter",
    "start_all_gather",
    "take_slice",
]

State: TypeAlias = "PerMeshAxisLocalSpmdType | Shard"
"""`I`, `R`, `V`, `P` or `Shard(dim)`."""

_SUM, _AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
_BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


def gradient_state(state: State) -> State:
    """Return the state of the gradient of a tensor in `state`."""
    if state is R:
        return P
    return R if state is P else state


def differs(state: State) -> bool:
    """Whether each rank has values of its own, so that dropout masks differ there. Masks of a partial value agree."""
    return state is V or isinstance(state, Shard)


def convert(x: Tensor, src: State, dst: State, axis: ParallelAxis, op: Any = _SUM) -> Tensor:
    """Convert x on one axis from the state `src` to the state `dst`. Differentiable; see the table of the module.

    Args:
        x: [*], in the state `src`.
        src: State of x. The dim of a `Shard` may count from the end.
        dst: State of the result.
        axis: Mesh axis.
        op: Reduction in whichever pass reduces. Only a sum has its adjoint in the table; a forward average has one too.

    Returns:
        x itself where nothing changes; otherwise [*], sharded or gathered along the dims that the states name.

    Raises:
        ParallelError: There is no such conversion, or the dim does not divide over the axis.
    """
    if axis.world_size == 1 or src == dst:
        return x
    src, dst = _with_positive_dim(src, x), _with_positive_dim(dst, x)
    if src == dst:
        return x
    if src is R or V in (src, dst) or dst is P:
        raise ParallelError(
            f"convert: no collective leads from {src!r} to {dst!r} on {axis.name}; those from I lead to R and shards, "
            "those from a shard to I, R and other shards, those from P to I, R and shards"
        )
    out: Tensor = _Convert.apply(x, src, dst, axis, op)
    return out


class _Convert(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, src: State, dst: State, axis: ParallelAxis, op: Any) -> Tensor:
        ctx.src, ctx.dst, ctx.axis, ctx.op = src, dst, axis, op
        moved = _move(x, src, dst, axis, op)
        return x.view_as(x) if moved is x else moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = _move(grads[0], gradient_state(ctx.dst), gradient_state(ctx.src), ctx.axis, ctx.op)
        if ctx.src is P and ctx.op == _AVG:
            grad = grad * (1 / ctx.axis.world_size)
        return grad, None, None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, src: State, dst: State, axis: ParallelAxis) -> Any:
        group = axis.process_group
        if src is I:
            return rules.convert(x, group, src=src, dst=dst)
        if src is P:
            reduce = rules.reduce_scatter if isinstance(dst, Shard) else rules.all_reduce
            return reduce(x, group, src=src, dst=dst)
        move = rules.all_to_all if isinstance(dst, Shard) else rules.all_gather
        return move(x, group, src=src, dst=dst)


def _move(x: Tensor, src: State, dst: State, axis: ParallelAxis, op: Any) -> Tensor:
    """Move values from a state to another, without a gradient; x itself where its values stay."""
    if src is P:
        return reduce_scatter(x, axis, dst.dim) if isinstance(dst, Shard) else all_reduce(x, axis, op)
    if isinstance(src, Shard):
        if isinstance(dst, Shard):
            return all_to_all(x, axis, split_dim=dst.dim, concat_dim=src.dim)
        return all_gather(x, axis, src.dim)
    return take_slice(x, axis, dst.dim) if isinstance(dst, Shard) else x


def _with_positive_dim(state: State, x: Tensor) -> State:
    return Shard(positive_dim(state.dim, x.dim())) if isinstance(state, Shard) else state


def _tensor_parallel(axis: ParallelAxis | None) -> ParallelAxis:
    return parallel_group_info().tp if axis is None else axis


def mp_copy(x: Tensor, op: Any = _SUM, axis: ParallelAxis | None = None) -> Tensor:
    """Copies the input to the model parallel region. I -> R; backward P -> I.

    Forward this does nothing; backward it reduces the gradient over the axis.

    Args:
        x: [*], the same on every rank.
        op: Reduction of the gradient: any op of torch.distributed that its backend has, but for the bitwise ones, which
            take integers. Only the sum is the adjoint; an average is right where every rank's gradient is the same.
        axis: Mesh axis; tensor parallel by default.

    Returns:
        x [*].

    Raises:
        ParallelError: A bitwise `op`.
    """
    if op in _BITWISE:
        raise ParallelError(f"mp_copy: op {op} is of integers, unlike gradients; use SUM, AVG, PRODUCT, MIN or MAX")
    return convert(x, I, R, _tensor_parallel(axis), op)


def mp_reduce(x: Tensor, op: Any = _SUM, axis: ParallelAxis | None = None) -> Tensor:
    """Reduces the input from the model parallel region. P -> I; backward I -> R.

    Args:
        x: [*], a part of the sum per rank.
        op: Reduction of the *input*. Its backward is the identity for a sum, 1/world_size for an average.
        axis: Mesh axis; tensor parallel by default.

    Returns:
        The reduction [*], the same on every rank.

    Raises:
        ParallelError: A gradient is needed and `op` is neither a sum nor an average.
    """
    axis = _tensor_parallel(axis)
    if axis.world_size > 1 and op not in (_SUM, _AVG) and x.requires_grad and torch.is_grad_enabled():
        raise ParallelError(
            f"mp_reduce: op {op} has no gradient here and x requires one; use SUM or AVG, or call it on x.detach()"
        )
    return convert(x, P, I, axis, op)


def mp_scatter(x: Tensor, dim: int = -1, axis: ParallelAxis | None = None) -> Tensor:
    """Scatters the input across the model parallel region. I -> Shard(dim); backward Shard(dim) -> I, an all-gather.

    Args:
        x: [.., N, ..], the same on every rank.
        dim: Dim to shard.
        axis: Mesh axis; tensor parallel by default.

    Returns:
        This rank's slice [.., N / R, ..].

    Raises:
        ParallelError: N is not divisible.
    """
    return convert(x, I, Shard(dim), _tensor_parallel(axis))


def mp_gather(x: Tensor, dim: int = -1, axis: ParallelAxis | None = None) -> Tensor:
    """Gathers the input from the model parallel region. Shard(dim) -> I; backward I -> Shard(dim), a slice.

    Args:
        x: [.., N / R, ..], this rank's slice.
        dim: Sharded dim.
        axis: Mesh axis; tensor parallel by default.

    Returns:
        [.., N, ..], the same on every rank.
    """
    return convert(x, Shard(dim), I, _tensor_parallel(axis))


def sp_gather(x: Tensor, dim: int = 0, axis: ParallelAxis | None = None) -> Tensor:
    """Gathers sequence shards for arithmetic that differs per rank. Shard(dim) -> R; backward P -> Shard(dim).

    x [.., N / R, ..] -> [.., N, ..]; the backward pass is a reduce-scatter.
    """
    return convert(x, Shard(dim), R, _tensor_parallel(axis))


def sp_reduce_scatter(x: Tensor, dim: int = 0, axis: ParallelAxis | None = None) -> Tensor:
    """Sums over the axis and keeps this rank's sequence shard. P -> Shard(dim); backward an all-gather.

    x [.., N, ..] -> [.., N / R, ..].

    Raises:
        ParallelError: N is not divisible.
    """
    return convert(x, P, Shard(dim), _tensor_parallel(axis))


def all2all_hp2sp(input_: Tensor, axis: ParallelAxis | None = None) -> Tensor:
    """All-to-all from hidden parallel to sequence parallel. Shard(-1) -> Shard(0); backward Shard(0) -> Shard(-1).

    Args:
        input_: [N, .., H / R], this rank's columns of every token.
        axis: Mesh axis; tensor parallel by default.

    Returns:
        [N / R, .., H], every column of this rank's tokens.

    Raises:
        ParallelError: N is not divisible.
    """
    return convert(input_, Shard(-1), Shard(0), _tensor_parallel(axis))


class _All2AllHp2Sp:
    """The documented class of `all2all_hp2sp`, used as `_All2AllHp2Sp.apply(input_)`."""

    apply = staticmethod(all2all_hp2sp)


# Renamed in torch 2.12; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def positive_dim(dim: int, dims: int) -> int:
    """A dim that may count from the end, counted from the front.

    Raises:
        ParallelError: There is no such dim.
    """
    if not -dims <= dim < dims:
        raise ParallelError(f"dim={dim}: a tensor of {dims} dims has those from {-dims} to {dims - 1}")
    return dim % dims


def all_reduce(x: Tensor, axis: ParallelAxis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """x [*] per rank -> its reduction [*], on every rank. `AVG` works with every backend."""
    if axis.world_size == 1:
        return x
    out = x.contiguous().clone()
    if op == dist.ReduceOp.AVG:
        dist.all_reduce(out, group=axis.group)
        return out.div_(axis.world_size)
    dist.all_reduce(out, op=op, group=axis.group)
    return out


def all_gather(x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
    """x [.., N / R, ..] per rank -> [.., N, ..], on every rank."""
    if axis.world_size == 1:
        return x
    dim = positive_dim(dim, x.dim())
    x = x.contiguous()
    stacked = x.new_empty((axis.world_size * x.shape[0], *x.shape[1:]))
    _all_gather_single(stacked, x, group=axis.group)
    return stacked if dim == 0 else torch.cat(stacked.chunk(axis.world_size, 0), dim)


def start_all_gather(out: Tensor, x: Tensor, axis: ParallelAxis) -> Any:
    """Start to gather x [N / R] per rank into out [N]; return what waits for it, or `None` where that is not needed."""
    if axis.world_size == 1:
        out.copy_(x)
        return None
    # Simulated ranks take turns.
    return _all_gather_single(out, x, group=axis.group, async_op=not is_simulated())


def reduce_scatter(x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
    """x [.., N, ..], partial -> this rank's slice [.., N / R, ..] of the sum."""
    if axis.world_size == 1:
        return x
    dim = positive_dim(dim, x.dim())
    length = _divided(x, axis, dim)
    if dim != 0:
        x = torch.cat(x.split(length, dim), 0)
    out = x.new_empty((x.shape[0] // axis.world_size, *x.shape[1:]))
    if length == 0:  # on every rank; simulation cannot divide nothing
        return out
    _reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def all_to_all(x: Tensor, axis: ParallelAxis, split_dim: int, concat_dim: int) -> Tensor:
    """Divide `split_dim` over the ranks and collect `concat_dim` from them.

    x [.., N at split_dim, .., M / R at concat_dim, ..] -> [.., N / R, .., M, ..].
    """
    if axis.world_size == 1:
        return x
    split_dim, concat_dim = positive_dim(split_dim, x.dim()), positive_dim(concat_dim, x.dim())
    length = _divided(x, axis, split_dim)
    sent = torch.stack(x.split(length, split_dim))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return torch.cat(received.unbind(0), concat_dim)


def take_slice(x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
    """x [.., N, ..], the same on every rank -> this rank's slice [.., N / R, ..]. No communication."""
    if axis.world_size == 1:
        return x
    dim = positive_dim(dim, x.dim())
    length = _divided(x, axis, dim)
    return _narrow(x, dim, axis.rank * length, length)


@on_each_rank
def _narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    # A copy, so that a saved slice does not keep the full tensor alive.
    return x.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)


def _divided(x: Tensor, axis: ParallelAxis, dim: int) -> int:
    if x.shape[dim] % axis.world_size:
        raise ParallelError(
            f"dim {dim} of shape {tuple(x.shape)} cannot be split over {axis.name}={axis.world_size}; "
            f"pad it to a multiple of {axis.world_size}"
        )
    return int(x.shape[dim] // axis.world_size)
