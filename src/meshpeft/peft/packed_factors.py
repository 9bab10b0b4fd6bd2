"""Several adapters on the parts of one fused layer, as one adapter.

Adapters A_i [r_i, in], B_i [out_i, r_i] of the parts of a fused layer are one low-rank adapter of rank sum(r_i):

    A = [A_0; A_1; ..]                       [sum r, in]
    B = fuse(diag(B_0, B_1, ..))             [out, sum r], rows in the layer's fused order, zero off the diagonal

So Canonical LoRA runs the same fused function as LoRA, in the same parallel states: one GEMM for all A_i, and B's
product written straight into the layer's packed output. The zeros cost rank-sized products, less than the separate
launches that they save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from spmd_types import rules
from torch import Tensor
from torch.autograd import Function

from meshpeft.parallel import FusedParts

__all__ = ["pack_factors"]


class _PackDiagonal(Function):
    @staticmethod
    def forward(ctx: Any, fused_parts: FusedParts, shards: int, parts: tuple[int, ...], *factors: Tensor) -> Tensor:
        ranks = [factor.shape[1] for factor in factors]
        blocks, chunks = fused_parts.local_blocks(shards), fused_parts.chunks(shards)
        ctx.fused_parts, ctx.shards, ctx.parts, ctx.ranks = fused_parts, shards, parts, ranks
        packed = factors[0].new_zeros((blocks, sum(chunks), sum(ranks)))
        column = 0
        for part, factor, rank in zip(parts, factors, ranks, strict=True):
            row = sum(chunks[:part])
            block = packed[:, row : row + chunks[part], column : column + rank]
            block.copy_(factor.view(blocks, chunks[part], rank))
            column += rank
        return packed.view(-1, sum(ranks))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        rows = ctx.fused_parts.split(grads[0], 0, ctx.shards)
        columns = [rows[part].split(ctx.ranks, 1)[index] for index, part in enumerate(ctx.parts)]
        return None, None, None, *columns

    @staticmethod
    def spmd_typecheck(*, factors: tuple[Tensor, ...]) -> Any:
        # Rows of every part are divided alike, and so are those of the packed whole. The columns are local.
        result = rules.einsum("or->or", factors[0])
        for factor in factors[1:]:
            rules.einsum("or,or->or", result, factor)
        return result


def pack_factors(
    fused_parts: FusedParts, shards: int, parts: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The factors of the one adapter that equals separate adapters on some parts of a fused layer.

    Args:
        fused_parts: of the layer's output.
        shards: number of shards of the output.
        parts: index in `fused_parts` of each adapter's part; parts without an adapter get zero rows.
        a: A_i [r_i, in] per adapter, all in the same state.
        b: B_i [out_i / shards, r_i] per adapter, this rank's rows in canonical order.

    Returns:
        A [sum r, in] and B [out / shards, sum r]. Differentiable.
    """
    packed: Tensor = _PackDiagonal.apply(fused_parts, shards, tuple(parts), *b)
    return torch.cat(list(a)), packed
