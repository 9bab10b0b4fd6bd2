"""Grouped GEMMs: rows of x in consecutive groups, one weight matrix per group.

`torch.nn.functional.grouped_mm` behind one door. It refuses float64 and rows that are not a multiple of 16 bytes;
here the first is multiplied per group and the second padded. Groups may be empty, and so may the input.

Shapes: x [T, K] sorted by group, weight [E, N, K], `offsets` [E] int32: the end of each group's rows; offsets[-1] = T.

Tensors that have no values (`FakeTensor`) have no groups either: all their rows are multiplied by the first matrix, in
as many products.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from spmd_types import rules
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from meshpeft.parallel.mesh import on_each_rank
from meshpeft.parallel.sharded_base import gathered
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = [
    "group_of_rows",
    "group_offsets",
    "grouped_add_mm_",
    "grouped_linear",
    "grouped_mm",
    "grouped_outer",
    "grouped_sum",
]

_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of every row


@typed_as(lambda tokens_per_expert: dims_follow(tokens_per_expert))
def group_offsets(tokens_per_expert: Tensor) -> Tensor:
    """tokens_per_expert [E] of counts -> [E] int32, the end of each group."""
    return tokens_per_expert.cumsum(0).to(torch.int32)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, transpose: bool) -> Tensor:
    """One product per group, no gradient.

    `transpose=True`: x [T, K] times weight [E, N, K] transposed -> [T, N], a forward pass. `transpose=False`:
    x [T, N] times weight [E, N, K] -> [T, K], its input gradient.
    """
    return _grouped_mm(x, gathered(weight), offsets, transpose)


@on_each_rank
def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, transpose: bool) -> Tensor:
    width = weight.shape[-2] if transpose else weight.shape[-1]
    if isinstance(x, FakeTensor):
        return torch.mm(x, weight[0].t() if transpose else weight[0])
    if x.dtype not in _GROUPED_TYPES:
        return _per_group(x, weight, offsets, transpose)
    x, weight = _aligned(x, -1), _aligned(_aligned(weight, -1), -2)
    out = F.grouped_mm(x, weight.transpose(-2, -1) if transpose else weight, offs=offsets)
    return out[:, :width]


def grouped_add_mm_(y: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, *, transpose: bool) -> None:
    """`y += grouped_mm(x, weight, ..)`, in place; no gradient."""
    _grouped_add_mm_(y, x, gathered(weight), offsets, transpose)


@on_each_rank
def _grouped_add_mm_(y: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, transpose: bool) -> None:
    if y.device.type != "cpu":
        y.add_(_grouped_mm(x, weight, offsets, transpose))
        return
    if isinstance(y, FakeTensor):
        y.addmm_(x, weight[0].t() if transpose else weight[0])
        return
    # Here the kernel is a loop as well, and this one needs no second tensor of y's size.
    for into, rows, matrix in zip(*_split(offsets, y, x), weight.unbind(), strict=True):
        into.addmm_(rows, matrix.t() if transpose else matrix)


@on_each_rank
def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [T, N], b [T, K] -> [E, N, K], the sum over each group's rows of a^T b; zero for an empty group."""
    if isinstance(a, FakeTensor):
        products = a.new_empty((offsets.shape[0], a.shape[-1], b.shape[-1]))
        torch.mm(a.t(), b, out=products[0])
        return products
    if a.dtype not in _GROUPED_TYPES:
        return _outer_per_group(a, b, offsets)
    rows, columns = a.shape[-1], b.shape[-1]
    if rows > columns:
        # Several times quicker where the transposed operand is the narrow one, as it is for low ranks.
        return grouped_outer(b, a, offsets).transpose(-2, -1)
    # An expanded gradient (of a sum) has stride 0, which the kernel refuses.
    a, b = _aligned(a.contiguous(), -1), _aligned(b.contiguous(), -1)
    return F.grouped_mm(a.t(), b, offs=offsets)[:, :rows, :columns]


def _aligned(t: Tensor, dim: int) -> Tensor:
    step = _ALIGNMENT // t.element_size()
    missing = -t.shape[dim] % step
    if missing == 0:
        return t.contiguous()
    return F.pad(t, (0, missing) if dim == -1 else (0, 0, 0, missing))


@on_each_rank
def grouped_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """x [T, N] -> [E, N], the sum of each group's rows; zero for an empty group. No gradient."""
    bounds = torch.cat((offsets.new_zeros(1), offsets)).long()
    # `unsafe`: without a look at the bounds, which would wait for the device.
    return torch.segment_reduce(x, "sum", offsets=bounds, initial=0, unsafe=True)


@on_each_rank
def group_of_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """The number of the group of each row of x [T, *]: [T]."""
    rows = torch.arange(x.shape[0], dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, rows, right=True)


def _split(offsets: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each group, of each tensor."""
    ends = offsets.tolist()
    sizes = [end - start for start, end in pairwise([0, *ends])]
    return [tensor.split(sizes) for tensor in tensors]


def _per_group(x: Tensor, weight: Tensor, offsets: Tensor, transpose: bool) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[-2] if transpose else weight.shape[-1]))
    for into, rows, matrix in zip(*_split(offsets, out, x), weight.unbind(), strict=True):
        torch.mm(rows, matrix.t() if transpose else matrix, out=into)
    return out


def _outer_per_group(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_empty((offsets.shape[0], a.shape[-1], b.shape[-1]))
    for into, rows_a, rows_b in zip(out.unbind(), *_split(offsets, a, b), strict=True):
        torch.mm(rows_a.t(), rows_b, out=into)
    return out


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)
        return grouped_mm(x, weight, offsets, transpose=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = grouped_mm(dy, weight, offsets, transpose=False) if ctx.needs_input_grad[0] else None
        dw = grouped_outer(dy, x, offsets) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, weight: Tensor, offsets: Tensor) -> Any:
        rules.ignore(offsets)
        # The rows of each group meet one matrix: a product over k for every row.
        return rules.einsum("tk,_nk->tn", x, weight, linear_in=(0, 1))


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y = x W_e^T for the rows of each group e. x [T, K], weight [E, N, K], offsets [E] int32 -> y [T, N]."""
    return _GroupedLinear.apply(x, weight, offsets)
