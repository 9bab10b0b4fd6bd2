"""Sending tokens to the experts that were chosen for them, and their results back.

Each rank starts with its own tokens x [T, H]. Over expert-tensor parallel they are gathered first, so that the
ranks that share an expert see the same tokens (even sizes, an ordinary all-gather); then an all-to-all over expert
parallel, uneven, carries each to its expert. The way back is the mirror image: all-to-all, weighted sum over the
experts of a token, reduce-scatter over expert-tensor parallel, which also sums what row-parallel experts left.

Every rank takes part even if no token is routed to it, or it has none.

Tensors that have no values (`FakeTensor`) choose no experts: `assume_load` says how many of their rows go where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from spmd_types import rules
from spmd_types.types import V
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as functional

from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.states import sp_gather, sp_reduce_scatter

__all__ = ["DispatchPlan", "ExpertLoad", "assume_load", "combine_tokens", "dispatch_tokens"]

ExpertLoad = Literal["expected", "worst"]
"""How many rows reach this rank: its share, as from tokens that choose every expert alike; or all that can."""

_assumed: list[ExpertLoad] = ["expected"]


@contextmanager
def assume_load(load: ExpertLoad) -> Iterator[None]:
    """Inside, and in backward passes of what runs inside, rows without values are dispatched as `load` says."""
    _assumed.append(load)
    try:
        yield
    finally:
        _assumed.pop()


@dataclass(frozen=True)
class DispatchPlan:
    """How one layer's tokens travelled; made by `dispatch_tokens`, used by `combine_tokens`.

    Attributes:
        tokens_per_expert: [local experts], rows of the dispatched tokens that belong to each.
        num_tokens: Tokens before dispatch, gathered over expert-tensor parallel.
        top_k: Experts per token.
        probabilities: [num_tokens, top_k], gathered; multiplies what the experts return.
        rows: [num_tokens * top_k], the row in which each (token, choice) was sent; rows are sorted by expert.
        local_order: The permutation of received rows that sorts them by local expert, and its inverse; `None` with
            ep=1.
        send_splits, receive_splits: Rows to and from each rank of `ep`.
    """

    tokens_per_expert: Tensor
    num_tokens: int
    top_k: int
    probabilities: Tensor
    rows: Tensor
    local_order: tuple[Tensor, Tensor] | None
    send_splits: list[int]
    receive_splits: list[int]
    ep: ParallelAxis
    etp: ParallelAxis


class _AllToAllRows(Function):
    """Rows to and from each rank of an axis, in unequal numbers. V -> V; the backward pass swaps the numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: list[int], send: list[int], axis: ParallelAxis) -> Tensor:
        ctx.receive, ctx.send, ctx.axis = receive, send, axis
        return _all_to_all_rows(x, receive, send, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _all_to_all_rows(grads[0], ctx.send, ctx.receive, ctx.axis), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: ParallelAxis) -> Any:
        return rules.all_to_all(x, axis.process_group, src=V, dst=V)


class _PermuteRows(Function):
    """x [N, H] -> x[order]; both passes gather, and no row is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def _all_to_all_rows(x: Tensor, receive: list[int], send: list[int], axis: ParallelAxis) -> Tensor:
    # The functional form takes symbolic splits under simulation; torch.distributed's own does not.
    out = functional.all_to_all_single(x.contiguous(), receive, send, axis.process_group)
    return out.wait() if isinstance(out, functional.AsyncCollectiveTensor) else out


def dispatch_tokens(
    x: Tensor,
    experts: Tensor,
    probabilities: Tensor,
    num_experts: int,
    ep: ParallelAxis,
    etp: ParallelAxis,
) -> tuple[Tensor, DispatchPlan]:
    """Bring each token to the ranks that hold its experts, sorted by local expert.

    Args:
        x: [T, H], this rank's own tokens (V over every axis); T may be 0 and equal on the ranks of `etp`.
        experts: [T, k] of expert numbers in [0, num_experts), distinct per token.
        probabilities: [T, k], the weight of each chosen expert; gradients flow to it.
        num_experts: Over all ranks.
        ep, etp: Axes that shard the experts, and each expert.

    Returns:
        The dispatched tokens [N, H] (R over `etp`) and the plan for the way back. N differs per rank of `ep`.
    """
    top_k = experts.shape[-1]
    x, probabilities = sp_gather(x, 0, etp), sp_gather(probabilities, 0, etp)
    experts = sp_gather(experts, 0, etp)
    chosen = experts.reshape(-1)
    order = chosen.argsort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # Not bincount, which waits for the device.
    counts = order.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    sent = x.index_select(0, order // top_k)
    if ep.world_size == 1:
        return sent, DispatchPlan(counts, x.shape[0], top_k, probabilities, rows, None, [], [], ep, etp)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=ep.group)
    received = received.view(ep.world_size, num_experts // ep.world_size)
    send, receive = _splits(counts, received, *experts.shape)
    arrived = _AllToAllRows.apply(sent, receive, send, ep)
    local_experts = torch.arange(received.shape[1], device=x.device).repeat(ep.world_size)
    # With the size of the result, which would be waited for.
    by_rank = local_experts.repeat_interleave(received.reshape(-1), output_size=arrived.shape[0])
    order = by_rank.argsort(stable=True)
    inverse = order.argsort()
    tokens_per_expert = received.sum(0)
    plan = DispatchPlan(
        tokens_per_expert, x.shape[0], top_k, probabilities, rows, (order, inverse), send, receive, ep, etp
    )
    return _PermuteRows.apply(arrived, order, inverse), plan


def _splits(counts: Tensor, received: Tensor, tokens: int, top_k: int) -> tuple[list[int], list[int]]:
    """Read the sizes of the all-to-all: the one host synchronisation of the layer.

    Args:
        counts: [experts], this rank's rows for each.
        received: [ep, local experts], the rows of each rank for this rank's experts.
        tokens, top_k: Tokens of this rank, and rows of each.

    Returns:
        Rows to and from each rank of `ep`.
    """
    ranks, local_experts = received.shape
    if not isinstance(counts, FakeTensor):
        splits = torch.cat((counts.view(ranks, -1).sum(1), received.sum(1))).tolist()
        return splits[:ranks], splits[ranks:]
    rows = tokens * top_k
    if _assumed[-1] == "expected":
        shares = _shares(rows, ranks)
        return shares, shares
    # Every token of every rank chooses as many experts of this one as it can.
    here = tokens * min(top_k, local_experts)
    return [here, *_shares(rows - here, ranks - 1)], [here] * ranks


def _shares(rows: int, ranks: int) -> list[int]:
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


def combine_tokens(y: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring the experts' results back to their tokens and add them up, weighted.

    Args:
        y: [N, H], one row per dispatched token, partial over `etp` (where it is larger than 1).
        plan: The plan by which the tokens were dispatched.

    Returns:
        [T, H], this rank's own tokens.
    """
    if plan.local_order is not None:
        y = _PermuteRows.apply(y, *reversed(plan.local_order))
        y = _AllToAllRows.apply(y, plan.send_splits, plan.receive_splits, plan.ep)
    # One small product per token: quicker than adding weighted rows up by index, and in one order on every device.
    by_token = y.index_select(0, plan.rows).view(plan.num_tokens, plan.top_k, y.shape[-1])
    total = torch.bmm(plan.probabilities.to(y.dtype).unsqueeze(1), by_token).squeeze(1)
    return sp_reduce_scatter(total, 0, plan.etp)
