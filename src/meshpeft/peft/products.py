"""Products of rows with one matrix, or with the matrices of a stack: one for each group of rows.

The adapted GEMMs are written once with them, for ordinary layers and for grouped experts. Rows x are [T, K] and
sorted by group; a factor is a matrix [N, K], which all rows meet, or a stack [E, N, K]. `offsets` [E] int32 are the
ends of the groups (`group_offsets`); they are read only where there is a stack. Only `rows_for` is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from spmd_types import rules
from spmd_types.types import PartitionSpec, V
from torch import Tensor

from meshpeft.parallel import group_of_rows, grouped_add_mm_, grouped_mm, grouped_outer, grouped_sum
from meshpeft.parallel.typing import SpmdTypeOf, dims_follow, typed_as

__all__ = ["add_times_", "factor_gradient", "ignore_offsets", "product_type", "rows_for", "sum_of_rows", "times"]


def times(x: Tensor, w: Tensor, offsets: Tensor | None, *, transpose: bool) -> Tensor:
    """X w^T (`transpose`: x [T, K] -> [T, N]), or x w (x [T, N] -> [T, K])."""
    if w.dim() == 2:
        return torch.mm(x, w.t() if transpose else w)
    return grouped_mm(x, w, _ends(offsets), transpose=transpose)


def add_times_(y: Tensor, x: Tensor, w: Tensor, offsets: Tensor | None, *, transpose: bool) -> Tensor:
    """Add `times(x, w, ..)` to y, in place; returns y."""
    if w.dim() == 2:
        return y.addmm_(x, w.t() if transpose else w)
    grouped_add_mm_(y, x, w, _ends(offsets), transpose=transpose)
    return y


def factor_gradient(dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient of w in y = x w^T: dy^T x [N, K] over all rows; or [E, N, K], over each group's."""
    if w.dim() == 3:
        return grouped_outer(dy, x, _ends(offsets))
    if dy.shape[-1] > x.shape[-1]:
        # The transpose of x^T dy, twice as fast as dy^T x on tall dy.
        return torch.mm(x.t(), dy).t()
    return torch.mm(dy.t(), x)


def _type_of_rows(values: Tensor, like: Tensor, offsets: Tensor | None) -> SpmdTypeOf:
    """Divided like the rows of `like`, and like the values; otherwise in the values' state."""
    if values.dim() == 1:
        return dims_follow(values)
    (rows, _), (_, columns) = dims_follow(like).spec or (None, None), dims_follow(values).spec or (None, None)
    local = dict(dims_follow(values).local)
    for axis in rows if isinstance(rows, tuple) else () if rows is None else (rows,):
        local[axis] = V
    return SpmdTypeOf(local, PartitionSpec(rows, columns))


@typed_as(_type_of_rows)
def rows_for(values: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """What multiplies the rows of `like` [T, N]: values [N] as they are, or of [E, N] each row's. Differentiable."""
    return values if values.dim() == 1 else values.index_select(0, group_of_rows(like, _ends(offsets)))


def sum_of_rows(t: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """The sum of the rows of t [T, N] in the type of `like`: [N] as `like` is, or [E, N], of each group's."""
    if like.dim() == 1:
        return t.sum(0, dtype=like.dtype)
    return grouped_sum(t.to(like.dtype), _ends(offsets))


def product_type(x: Any, w: Tensor) -> Any:
    """The type of x w^T for the type checker."""
    if w.dim() == 2:
        return rules.einsum("...k,nk->...n", x, w, linear_in=(0, 1))
    # The rows of each group meet one matrix: a product over k for every row.
    return rules.einsum("tk,_nk->tn", x, w, linear_in=(0, 1))


def ignore_offsets(offsets: Tensor | None) -> None:
    """Tell the type checker that offsets count rows, and have no state."""
    if offsets is not None:
        rules.ignore(offsets)


def _ends(offsets: Tensor | None) -> Tensor:
    assert offsets is not None, "a stack of matrices needs the ends of the groups"
    return offsets
