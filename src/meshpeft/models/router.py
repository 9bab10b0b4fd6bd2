"""Which experts each token goes to, and what keeps their loads equal.

Tokens are divided over tensor parallel when they meet the router, so that each is routed once: the gradient of its
weight is a summand there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config_parts import MoEConfig
from meshpeft.parallel.collectives import mp_reduce
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.layer_types import LayerType, register_layer_type
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.tensor_layout import set_layout

__all__ = ["ReplicatedLinear", "Routing", "TopKRouter", "load_balancing_loss"]


class ReplicatedLinear(ShardedTensors, nn.Module):
    """y = x W^T with a small weight that every rank holds whole.

    Args:
        in_features, out_features: of W [out_features, in_features].
        axis: tensor parallel.
        tokens_are_divided: the ranks of the axis see different tokens (S(0)), and W's gradient is a summand;
            otherwise all see the same (I).
        device, dtype: of the weight, which is left empty.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: ParallelAxis,
        tokens_are_divided: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = LinearLayout(
            in_features, out_features, shard=None, axis=axis, sequence_parallel=tokens_are_divided
        )
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        set_layout(self.weight, self.layout.weight())

    def forward(self, x: Tensor) -> Tensor:
        """x [*, in_features] -> [*, out_features], in the state of x."""
        return functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Routing(NamedTuple):
    """The choice of a router, for this rank's tokens.

    Attributes:
        experts: [tokens, top_k] of expert numbers over all ranks, distinct for each token, largest weight first.
        weights: [tokens, top_k], what the experts' outputs are multiplied with; float32 or wider.
        logits: [tokens, experts], in the type of the tokens.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor


class TopKRouter(ReplicatedLinear):
    """Chooses the experts with the largest logits, in the two steps of Megatron's `TopKRouter`.

    A function of its input alone: what is computed again in a backward pass is routed as it was.
    """

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        tp: ParallelAxis,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, moe.num_experts, tp, tokens_are_divided=True, device=device, dtype=dtype)
        self.config = moe

    def gating(self, x: Tensor) -> Tensor:
        """x [tokens, hidden], this rank's own -> logits [tokens, experts]."""
        return functional.linear(x, self.weight)

    def routing(self, logits: Tensor) -> Routing:
        """Logits [tokens, experts] -> the experts with the largest; softmax in float32, or float64 for float64."""
        top_k = self.config.moe_router_topk
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.softmax_first:
            weights, experts = wide.softmax(-1).topk(top_k, dim=-1)
            if self.config.normalize_weights:
                weights = weights / weights.sum(-1, keepdim=True)
        else:
            chosen, experts = wide.topk(top_k, dim=-1)
            weights = chosen.softmax(-1)
        return Routing(experts, weights, logits)

    def forward(self, x: Tensor) -> Routing:  # type: ignore[override]  # a router returns its choice
        """x [tokens, hidden], V over tensor parallel -> the choice for each token, V."""
        return self.routing(self.gating(x))


def load_balancing_loss(routing: Routing, rows: Tensor, tp: ParallelAxis) -> Tensor:
    """For each row of the batch E sum_e f_e p_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the row's number of choices of expert e per token, p_e the mean of its probability; E is the number of
    experts. The loss of a perfectly balanced row is top_k, as transformers scales it. A row is whole here, whatever
    ranks its tokens are on: counts and probabilities are summed over tensor parallel before the product.

    Args:
        routing: of this rank's tokens.
        rows: [tokens, batch], 1 where a token belongs to a row, 0 elsewhere and for padding; in the type of the
            result, float32 or wider.
        tp: the axis over which the tokens are divided.

    Returns:
        [batch], I over tensor parallel; 0 for a row without tokens.
    """
    num_experts = routing.logits.shape[-1]
    probabilities = routing.logits.to(rows.dtype).softmax(-1)
    choices = torch.zeros_like(probabilities).scatter(-1, routing.experts, 1.0)
    # One collective for the three sums: [batch, 2 E + 1].
    ones = rows.new_ones(rows.shape[0], 1)
    summed = mp_reduce(rows.t() @ torch.cat((choices, probabilities, ones), -1), axis=tp)
    counts, probability, tokens = summed.split([num_experts, num_experts, 1], -1)
    return num_experts * (counts * probability).sum(-1) / tokens.squeeze(-1).clamp(min=1).square()


register_layer_type(
    ReplicatedLinear,
    LayerType(
        layout=lambda module: module.layout,
        weight=lambda module: module.weight,
        enter=lambda module, x: x,
        exit=lambda module, y: y,
        decides=True,
    ),
)
