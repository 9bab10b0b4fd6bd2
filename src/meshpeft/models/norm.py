"""Root mean square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.tensor_layout import TensorLayout, set_layout

__all__ = ["RMSNorm"]


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
