"""RMSNorm and the gated feed-forward network (SwiGLU, arXiv 2002.05202) of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig
from meshpeft.models.recompute import RecomputesParts
from meshpeft.models.sharding import ModelSharding
from meshpeft.parallel import FusedParts, ShardedTensors
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["MLP", "RMSNorm", "gated_silu"]


class RMSNorm(ShardedTensors, nn.Module):
    """y = weight * x / sqrt(mean(x²) + eps), over the last dim (arXiv 1910.07467).

    The mean is taken in float32, or in float64 for float64 input; the normalised value is cast back to x's type
    before it is scaled, as the checkpoints' own code does.

    Args:
        weight: [size], replicated; set to one.
        eps: Added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.init.ones_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] -> [.., size], in the state of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and eps, for `print(module)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MLP(RecomputesParts):
    """linear_fc2(silu(gate) * up), with gate and up from one fused `linear_fc1`.

    Args:
        config: Sizes.
        sharding: Layout.
        width: Channels; `config.intermediate_size` by default.
    """

    def __init__(self, config: DecoderConfig, sharding: ModelSharding, *, width: int | None = None) -> None:
        super().__init__()
        self.shards = sharding.tp.world_size
        width = config.intermediate_size if width is None else width
        self.fused_parts = FusedParts(("gate", "up"), (width, width))
        self.linear_fc1 = sharding.linear_fc1(
            config.hidden_size, 2 * width, bias=config.mlp_bias, parts=self.fused_parts
        )
        self.linear_fc2 = sharding.linear_fc2(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [seq, batch, hidden] -> the same, in the state of the hidden stream."""
        out: Tensor = self.linear_fc2(self.part(self.channels, x))
        return out

    def channels(self, x: Tensor) -> Tensor:
        """x [seq, batch, hidden] -> silu(gate) * up [seq, batch, width / tp], `Shard(-1)`."""
        return gated_silu(self.linear_fc1(x), self.fused_parts, self.shards)


@typed_as(lambda fused, fused_parts, shards: dims_follow(fused))
def gated_silu(fused: Tensor, fused_parts: FusedParts, shards: int) -> Tensor:
    """[.., 2 * width / shards] -> silu(gate) * up [.., width / shards]."""
    gate, up = fused_parts.split(fused, -1, shards)
    return functional.silu(gate) * up
