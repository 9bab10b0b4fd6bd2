"""RMSNorm and the gated feed-forward network (SwiGLU, arXiv 2002.05202) of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig
from meshpeft.parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.tensor_layout import FusedParts, TensorLayout, set_layout
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["MLP", "RMSNorm", "gated_silu"]


class RMSNorm(ShardedTensors, nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dim.

    The mean is taken in float32, or in float64 for float64 input; the normalised value is cast back to x's type
    before it is scaled, as the checkpoints' own code does.

    The weight [size] is replicated. Where the ranks of an axis normalise different values (token shards, heads),
    its gradient is a summand there.

    Args:
        size: of the last dim.
        eps: added to the mean square.
        varies_over: the axes over which x differs between ranks.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        varies_over: tuple[ParallelAxis, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        partial = tuple(axis for axis in varies_over if axis.world_size > 1)
        set_layout(self.weight, TensorLayout((size,), grad_partial=partial))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] -> [.., size], in the state of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and eps, for `print(module)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


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
        self.fused_parts = FusedParts(("gate", "up"), (width, width))
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            2 * width,
            bias=config.mlp_bias,
            gather_output=False,
            sequence_parallel=sequence_parallel,
            fused_parts=self.fused_parts,
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
        return self.linear_fc2(gated_silu(self.linear_fc1(x), self.fused_parts, self.shards))


@typed_as(lambda packed, fused_parts, shards: dims_follow(packed))
def gated_silu(packed: Tensor, fused_parts: FusedParts, shards: int) -> Tensor:
    """[.., 2 * width / tp] -> silu(gate) * up [.., width / tp], both `S(-1)` over tensor parallel."""
    gate, up = fused_parts.split(packed, -1, shards)
    return functional.silu(gate) * up
