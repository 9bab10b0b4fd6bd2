"""The raw collectives: no gradients, no states, one place that calls torch.distributed for activations.

Each returns its argument itself on an axis of one rank: nothing communicates and nothing is copied.
`x_dim [N / R, ..]` in the docstrings: a dim of global size N over R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank

__all__ = ["all_gather", "all_reduce", "all_to_all", "positive_dim", "reduce_scatter", "take_slice"]

# Renamed in torch 2.12; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def positive_dim(dim: int, dims: int) -> int:
    """A dim that may count from the end, counted from the front.

    Raises:
        ParallelError: there is no such dim.
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


def reduce_scatter(x: Tensor, axis: ParallelAxis, dim: int) -> Tensor:
    """x [.., N, ..], a summand per rank -> this rank's slice [.., N / R, ..] of the sum."""
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
    # A copy, so that a saved slice does not keep the whole tensor alive.
    return x.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)


def _divided(x: Tensor, axis: ParallelAxis, dim: int) -> int:
    if x.shape[dim] % axis.world_size:
        raise ParallelError(
            f"dim {dim} of shape {tuple(x.shape)} cannot be split over {axis.name}={axis.world_size}; "
            f"pad it to a multiple of {axis.world_size}"
        )
    return int(x.shape[dim] // axis.world_size)
