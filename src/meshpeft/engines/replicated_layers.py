"""Linear layers of attention that every rank of tensor parallel holds in full, because heads of several ranks need
them: the down-projection of latent attention, and keys and values of fewer heads than there are ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.parallel import LayerType, LinearLayout, ParallelAxis, R, mp_copy, register_layer_type

__all__ = ["CopiedHeadsLinear", "SharedKeyLinear"]


class _Replicated(nn.Linear):
    """A linear layer that keeps the parameters of the one whose place it takes.

    Args:
        module: That layer.
        axis: Axis that shards the heads.
    """

    layout: LinearLayout

    def __init__(self, module: nn.Linear, axis: ParallelAxis) -> None:
        super().__init__(module.in_features, module.out_features, module.bias is not None, device="meta")
        self.weight, self.bias = module.weight, module.bias
        self.axis = axis

    def exit(self, y: Tensor) -> Tensor:
        """Add the bias, and give what this rank's heads take."""
        raise NotImplementedError

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [*, in] -> what `exit` gives."""
        return self.exit(functional.linear(input, self.weight))


class SharedKeyLinear(_Replicated):
    """Down-projection of latent attention: y = x Wᵀ + b, [*, in] -> [*, latent + rotary].

    Over `axis` x is I, and so is the latent part of y: the column behind it (`kv_b_proj`) sums its gradient. The rotary
    part, which is the key of every head, is R: each rank's heads take it as it is, and its gradient, P, is summed here,
    in an all-reduce of [*, rotary]. So an adapter inside, beside x and y, has no partial gradient.

    Args:
        module: Layer that it takes the place of, whose parameters it keeps.
        rotary: Width of the rotary part.
        axis: Axis that shards the heads.
    """

    def __init__(self, module: nn.Linear, rotary: int, axis: ParallelAxis) -> None:
        super().__init__(module, axis)
        self.rotary = rotary
        self.layout = LinearLayout(self.in_features, self.out_features, axis=axis)

    def exit(self, y: Tensor) -> Tensor:
        """Add the bias; y [*, out], I -> the latent part I, the rotary part R."""
        latent, rotary = self._biased(y).split([self.out_features - self.rotary, self.rotary], -1)
        return torch.cat((latent, mp_copy(rotary, axis=self.axis)), -1)


class CopiedHeadsLinear(_Replicated):
    """Keys, or values, of fewer heads than there are ranks: y = x Wᵀ + b, of which each rank takes one head.

    x is R, [*, in], and so is y, [*, heads * head_dim]: every rank computes all heads, which are few, and goes on with
    the one that its queries see, [*, head_dim]. So the gradient of everything here is partial: each rank has that of
    its own queries.

    Args:
        module: Layer that it takes the place of, whose parameters it keeps.
        heads: Number of its heads; a divisor of the axis's size.
        axis: Axis that shards the queries.
    """

    def __init__(self, module: nn.Linear, heads: int, axis: ParallelAxis) -> None:
        super().__init__(module, axis)
        self.heads = heads
        self.layout = LinearLayout(self.in_features, self.out_features, axis=axis, x=R)

    def exit(self, y: Tensor) -> Tensor:
        """Add the bias; y [*, heads * head_dim], R -> this rank's head [*, head_dim]."""
        size = self.out_features // self.heads
        # By an index, which may differ from rank to rank in one process, too.
        first = self.axis.rank * self.heads // self.axis.world_size * size
        return self._biased(y).index_select(-1, torch.arange(size, device=y.device) + first)


for _layer in (SharedKeyLinear, CopiedHeadsLinear):
    register_layer_type(
        _layer,
        LayerType(
            layout=lambda module: module.layout,
            weight=lambda module: module.weight,
            enter=lambda module, x: x,
            exit=lambda module, y: module.exit(y),
        ),
    )
