"""Cross entropy over logits that are sharded along the vocabulary; the logits are never gathered.

The loss is one number for each token, and nothing here divides it. What training divides it by is in
`meshpeft.training.step`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from spmd_types import rules
from spmd_types.types import I
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank, parallel_group_info
from meshpeft.parallel.states import all_reduce

__all__ = ["vocab_parallel_cross_entropy"]


@on_each_rank
def _local_targets(
    labels: Tensor, rank: int, rows: int, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each label's place in this rank's slice (0 where another rank holds it), whether it is held here, and counts."""
    counted = labels != ignore_index
    # Without it a label that no rank holds would give a plausible loss. Asynchronous on a GPU.
    inside = ((labels >= 0) & (labels < vocabulary)) | ~counted
    torch._assert_async(inside.all(), f"a label is neither in [0, {vocabulary}) nor ignore_index={ignore_index}")
    local = labels - rank * rows
    held = (local >= 0) & (local < rows) & counted
    return local * held, held, counted


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, axis: ParallelAxis) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        maximum = all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX).to(dtype)
        shifted = logits.to(dtype) - maximum.unsqueeze(-1)
        rows = logits.shape[-1]
        index, held, counted = _local_targets(labels, axis.rank, rows, rows * axis.world_size, ignore_index)
        # Filled, not multiplied: a logit may be -inf (a token that is ruled out), and padding may hold anything.
        target = shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~held, 0)
        exponentials = shifted.exp_()
        # One collective carries both sums: [2, *].
        sums = all_reduce(torch.stack((exponentials.sum(-1), target)), axis)
        loss = (sums[0].log() - sums[1]).masked_fill(~counted, 0)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), index, held, counted)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        softmax, index, held, counted = ctx.saved_tensors
        scale = (grads[0] * counted).unsqueeze(-1)
        grad = softmax * scale
        grad.scatter_add_(-1, index.unsqueeze(-1), -scale * held.unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None

    @staticmethod
    def spmd_typecheck(*, logits: Tensor, labels: Tensor, axis: ParallelAxis) -> Any:
        rules.ignore(labels)
        names = "abcdefgh"[: logits.dim() - 1]
        if axis.world_size == 1:
            return rules.einsum(f"{names}_->{names}", logits)
        # The vocabulary is summed over the axis inside: a stand-in for max, exp and sum, which are not linear.
        partial = rules.einsum(f"{names}v->{names}", logits)
        return rules.all_reduce(partial, axis.process_group, dst=I)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    axis: ParallelAxis | None = None,
) -> Tensor:
    """-log softmax(logits)[label] for each token. logits S(-1), labels I -> loss I; backward I -> S(-1).

    Two collectives of one number per token (the maximum; the two sums), none in the backward pass.

    Args:
        logits: [*, vocab / world_size], this rank's slice of the vocabulary.
        labels: [*] of indices into the full vocabulary, the same on every rank.
        ignore_index: Tokens with this label have loss 0 and no gradient.
        axis: Axis that shards the vocabulary; tensor parallel by default.

    Returns:
        [*], in nats, in float32 or the wider type of the logits.

    Raises:
        ParallelError: The shapes do not fit.
        RuntimeError: a label is neither an index of the vocabulary nor `ignore_index` (on a GPU, when it gets there).
    """
    axis = parallel_group_info().tp if axis is None else axis
    if logits.shape[:-1] != labels.shape:
        raise ParallelError(
            f"logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    loss: Tensor = _CrossEntropy.apply(logits, labels, ignore_index, axis)
    return loss
