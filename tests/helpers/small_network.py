"""A network of every kind of layer in `meshpeft.parallel`: embedding, column, row, head and loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["SmallNetwork"]


class SmallNetwork(nn.Module):
    """labels [seq, batch] and ids alike -> loss of each token: embedding, one gated MLP with a residual, head."""

    def __init__(
        self,
        vocabulary: int = 32,
        width: int = 8,
        inner: int = 16,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float64,
        device: str | None = None,
    ) -> None:
        super().__init__()
        options = {"sequence_parallel": sequence_parallel, "dtype": dtype, "device": device}
        self.embedding = VocabParallelEmbedding(vocabulary, width, **options)
        self.fc1 = ColumnParallelLinear(
            width, 2 * inner, gather_output=False, fused_parts=FusedParts(("gate", "up"), (inner, inner)), **options
        )
        self.fc2 = RowParallelLinear(inner, width, input_is_parallel=True, init_type="kaiming_uniform", **options)
        self.head = ColumnParallelLinear(width, vocabulary, bias=False, gather_output=False, **options)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [seq, batch] -> hidden states, divided along seq under sequence parallel."""
        x = self.embedding(ids)
        return x + self.fc2(gated(self.fc1(x)))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Loss of each token [seq, batch], in nats."""
        return vocab_parallel_cross_entropy(self.head(self.hidden(ids)), labels)


@typed_as(lambda packed: dims_follow(packed))
def gated(packed: Tensor) -> Tensor:
    """[.., gate shard and up shard] -> [.., inner / tp]; the type checker does not follow a split of a divided dim."""
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up
