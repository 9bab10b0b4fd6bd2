"""Embeddings: sharded along the embedding dim (`ParallelEmbedding`) or along the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.init import InitializationType, initialize_
from meshpeft.parallel.layout import TensorLayout, master_tensor, set_layout
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank, parallel_group_info
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.states import I, P, Shard, State, all_reduce, convert
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["ParallelEmbedding", "VocabParallelEmbedding"]


class _Embedding(ShardedTensors, nn.Module):
    def __init__(
        self,
        layout: TensorLayout,
        axis: ParallelAxis,
        init_type: InitializationType,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        perform_initialization: bool,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layout.global_shape
        self.axis = axis
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(layout.local_shape, device=device, dtype=dtype))
        set_layout(self.weight, layout)
        if perform_initialization:
            initialize_(self.weight, None, init_type)

    @property
    def master_weight(self) -> Tensor:
        """The full table [num_embeddings, embedding_dim], on every rank. A collective; see `master_tensor`."""
        return master_tensor(self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.axis.name}={self.axis.world_size}"


class ParallelEmbedding(_Embedding):
    """Model-parallel embeddings, partitioned along the `embedding_dim` dimension.

    x [*] of indices, I -> [*, embedding_dim], I.

    Args:
        num_embeddings: Number of embeddings (vocabulary size).
        embedding_dim: Embedding dimension; must be divisible by the model-parallel size.
        padding_idx: See `nn.Embedding`: this row starts at zero and gets no gradient.
        max_norm: See `nn.Embedding`: rows that are looked up are first scaled down, in place, to this norm. The
            norm is that of the full row.
        norm_type: p of that norm.
        scale_grad_by_freq: See `nn.Embedding`.
        sparse: See `nn.Embedding`.
        init_type: Initialization type.
        axis, device, dtype, perform_initialization: As in `ColumnParallelLinear`.

    Raises:
        ParallelError: `embedding_dim` is not divisible, or `padding_idx` is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_type: InitializationType = "xavier_normal",
        *,
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
    ) -> None:
        axis = parallel_group_info().tp if axis is None else axis
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ParallelError(f"padding_idx={padding_idx}: expected an index of {num_embeddings} embeddings")
            padding_idx %= num_embeddings
        layout = TensorLayout((num_embeddings, embedding_dim), ((1, axis),))
        super().__init__(layout, axis, init_type, device, dtype, perform_initialization)
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        if padding_idx is not None and perform_initialization and not self.weight.is_meta:
            with torch.no_grad():
                self.weight[padding_idx].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [*] of indices in [0, num_embeddings) -> [*, embedding_dim]."""
        if self.max_norm is not None:
            self._renormalise(x, self.max_norm)
        local = F.embedding(
            x,
            self.weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return convert(local, Shard(-1), I, self.axis)

    @torch.no_grad()
    def _renormalise(self, x: Tensor, max_norm: float) -> None:
        """Scale the rows named by x so that the norm of the *full* row is at most `max_norm`.

        The rows are those named on any rank of the token axes, so that the tables stay the same on all of them.
        """
        named = torch.zeros(self.num_embeddings, dtype=torch.uint8, device=x.device)
        named[x.reshape(-1)] = 1
        for axis in parallel_group_info().token_axes():
            named = all_reduce(named, axis, dist.ReduceOp.MAX)
        rows = named.nonzero().squeeze(-1)
        values = self.weight[rows]
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.norm_type == float("inf"):
            norm = all_reduce(wide.abs().amax(-1), self.axis, dist.ReduceOp.MAX)
        else:
            power = all_reduce(wide.abs().pow(self.norm_type).sum(-1), self.axis)
            norm = power.pow(1 / self.norm_type)
        # 1e-7 is nn.Embedding's own guard against division by zero (aten embedding_renorm_).
        scale = torch.where(norm > max_norm, max_norm / (norm + 1e-7), torch.ones_like(norm))
        self.weight[rows] = (wide * scale.unsqueeze(-1)).to(values.dtype)


@on_each_rank
def _local_rows(x: Tensor, rank: int, rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Indices into this rank's rows (0 where another rank holds the row), and whether it is held here."""
    # Without it an index that no rank holds would give a row of zeros. Asynchronous on a GPU.
    torch._assert_async(((x >= 0) & (x < vocabulary)).all(), f"an index is outside the vocabulary [0, {vocabulary})")
    local = x - rank * rows
    held = (local >= 0) & (local < rows)
    return local * held, held


@typed_as(lambda x, weight, axis: dims_follow(x, (*range(x.dim()), None), axis=axis, state=P))
def _look_up(x: Tensor, weight: Tensor, axis: ParallelAxis) -> Tensor:
    """The rows of x [*] that this rank holds, zero elsewhere: [*, embedding_dim], partial over the axis."""
    rows = weight.shape[0]
    local, held = _local_rows(x, axis.rank, rows, rows * axis.world_size)
    return F.embedding(local, weight) * held.unsqueeze(-1)


class VocabParallelEmbedding(_Embedding):
    """Embeddings sharded along the vocabulary.

    x [*] of indices, the same on every rank -> [*, embedding_dim], I; with `sequence_parallel` x is [seq, ..] and
    the output Shard(0), [seq / world_size, .., embedding_dim].

    Args:
        num_embeddings: Vocabulary size; must be divisible by the axis's size.
        embedding_dim: Embedding dimension.
        init_type: Initialization type.
        sequence_parallel: Scatter the sequence after the reduction.
        axis, device, dtype, perform_initialization: As in `ColumnParallelLinear`.

    Raises:
        ParallelError: `num_embeddings` is not divisible.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        init_type: InitializationType = "xavier_normal",
        *,
        sequence_parallel: bool = False,
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
    ) -> None:
        axis = parallel_group_info().tp if axis is None else axis
        layout = TensorLayout((num_embeddings, embedding_dim), ((0, axis),))
        super().__init__(layout, axis, init_type, device, dtype, perform_initialization)
        self.output_state: State = Shard(0) if sequence_parallel else I

    def forward(self, x: Tensor) -> Tensor:
        """x [*] of indices in [0, num_embeddings) -> [*, embedding_dim]."""
        if self.axis.world_size == 1:
            return F.embedding(x, self.weight)
        return convert(_look_up(x, self.weight, self.axis), P, self.output_state, self.axis)
