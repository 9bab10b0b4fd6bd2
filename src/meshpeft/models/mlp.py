"""The gated feed-forward network (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig
from meshpeft.parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.tensor_layout import Packing
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["MLP", "gated_silu"]


class MLP(nn.Module):
    """linear_fc2(silu(gate) * up), with gate and up from one packed `linear_fc1`, divided over tensor parallel.

    Its width is `config.intermediate_size`, unless another is given.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.shards = tp.world_size
        width = config.intermediate_size if width is None else width
        self.packing = Packing(("gate", "up"), (width, width))
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            2 * width,
            bias=config.mlp_bias,
            gather_output=False,
            sequence_parallel=sequence_parallel,
            packing=self.packing,
            axis=tp,
            device=device,
            dtype=dtype,
        )
        self.linear_fc2 = RowParallelLinear(
            width,
            config.hidden_size,
            bias=config.mlp_bias,
            input_is_parallel=True,
            sequence_parallel=sequence_parallel,
            axis=tp,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [seq, batch, hidden] -> [seq, batch, hidden]; [seq / tp, ..] of both under sequence parallel."""
        return self.linear_fc2(gated_silu(self.linear_fc1(x), self.packing, self.shards))


@typed_as(lambda packed, packing, shards: dims_follow(packed))
def gated_silu(packed: Tensor, packing: Packing, shards: int) -> Tensor:
    """[.., 2 * width / tp] -> silu(gate) * up [.., width / tp], both `S(-1)` over tensor parallel."""
    gate, up = packing.unpack(packed, -1, shards)
    return functional.silu(gate) * up
