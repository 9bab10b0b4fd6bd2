"""A layer of experts in the place of an MLP: router, experts, shared experts.

Each token passes the router and its experts once, on one rank; the shared experts are an ordinary MLP. What that means
for the tokens at each layout is in `sharding.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig, MoEConfig
from meshpeft.models.mlp import MLP, gated_silu
from meshpeft.models.recompute import RecomputesParts
from meshpeft.models.sharding import ModelSharding
from meshpeft.parallel import (
    FusedParts,
    LayerType,
    LinearLayout,
    ShardedTensors,
    combine_tokens,
    dispatch_tokens,
    register_layer_type,
)

__all__ = [
    "Experts",
    "MoELayer",
    "ReplicatedLinear",
    "Routing",
    "SharedExperts",
    "TopKRouter",
    "load_balancing_loss",
    "rows_of_tokens",
]


class ReplicatedLinear(ShardedTensors, nn.Module):
    """y = x Wᵀ with a small weight that every rank holds in full.

    Args:
        layout: Sizes of W [out_features, in_features], and the state of x.
        sharding: Where W is made, empty.
    """

    def __init__(self, layout: LinearLayout, sharding: ModelSharding) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.weight = sharding.parameter(layout.weight())

    def forward(self, x: Tensor) -> Tensor:
        """x [*, in_features] -> [*, out_features], in the state of x."""
        return functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


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

    def __init__(self, hidden_size: int, moe: MoEConfig, sharding: ModelSharding) -> None:
        super().__init__(sharding.router_layout(hidden_size, moe.num_experts), sharding)
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
        """x [tokens, hidden], this rank's own -> the choice for each."""
        return self.routing(self.gating(x))


def load_balancing_loss(routing: Routing, rows: Tensor, sharding: ModelSharding) -> Tensor:
    """For each row of the batch E Σₑ fₑ pₑ (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    fₑ is the row's number of choices of expert e per token, pₑ the mean of its probability; E is the number of
    experts. The loss of a perfectly balanced row is top_k, as transformers scales it. Counts and probabilities are
    summed over the ranks that have a row's tokens before they are multiplied.

    Args:
        routing: Choices for this rank's tokens.
        rows: [tokens, batch], 1 where a token belongs to a row, 0 elsewhere and for padding; in the type of the
            result, float32 or wider.
        sharding: Layout of the tokens.

    Returns:
        [batch], I over tensor parallel; 0 for a row without tokens.
    """
    num_experts = routing.logits.shape[-1]
    probabilities = routing.logits.to(rows.dtype).softmax(-1)
    choices = torch.zeros_like(probabilities).scatter(-1, routing.experts, 1.0)
    # One collective for the three sums: [batch, 2 E + 1].
    ones = rows.new_ones(rows.shape[0], 1)
    summed = sharding.sum_over_tokens(rows.t() @ torch.cat((choices, probabilities, ones), -1))
    counts, probability, tokens = summed.split([num_experts, num_experts, 1], -1)
    return num_experts * (counts * probability).sum(-1) / tokens.squeeze(-1).clamp(min=1).square()


class Experts(RecomputesParts):
    """linear_fc2(silu(gate) * up) for each expert on its own tokens."""

    def __init__(self, hidden_size: int, moe: MoEConfig, sharding: ModelSharding) -> None:
        super().__init__()
        self.shards = sharding.etp.world_size
        self.fused_parts = FusedParts(("gate", "up"), (moe.intermediate_size, moe.intermediate_size))
        self.linear_fc1 = sharding.expert_fc1(moe, hidden_size, parts=self.fused_parts)
        self.linear_fc2 = sharding.expert_fc2(moe, hidden_size)

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, hidden], R over etp, sorted by local expert -> [tokens, hidden], P over etp."""

        def channels(x: Tensor) -> Tensor:
            return gated_silu(self.linear_fc1(x, tokens_per_expert), self.fused_parts, self.shards)

        out: Tensor = self.linear_fc2(self.part(channels, x), tokens_per_expert)
        return out


class SharedExperts(MLP):
    """The experts that every token passes through: an MLP of `width` channels, times the sigmoid of a gate."""

    def __init__(self, config: DecoderConfig, sharding: ModelSharding, *, width: int) -> None:
        super().__init__(config, sharding, width=width)
        self.gate = ReplicatedLinear(sharding.gate_layout(config.hidden_size, 1), sharding)

    def forward(self, x: Tensor) -> Tensor:
        """x [seq, batch, hidden] -> the same, in the state of the hidden stream."""
        return torch.sigmoid(self.gate(x)) * super().forward(x)


class MoELayer(nn.Module):
    """Each token to its experts, and the weighted sum of what they return; plus the shared experts, if any."""

    def __init__(self, config: DecoderConfig, moe: MoEConfig, sharding: ModelSharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.num_experts = moe.num_experts
        self.router = TopKRouter(config.hidden_size, moe, sharding)
        self.experts = Experts(config.hidden_size, moe, sharding)
        self.shared_experts: SharedExperts | None = None
        if moe.shared_intermediate_size is not None:
            self.shared_experts = SharedExperts(config, sharding, width=moe.shared_intermediate_size)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Send the tokens through their experts.

        Args:
            x: [seq, batch, hidden], in the state of the hidden stream.
            rows: [own tokens, batch], see `rows_of_tokens`.

        Returns:
            [seq, batch, hidden] in the state of x; and, given `rows`, the load-balancing loss of each row, [batch].
        """
        own = self.sharding.to_experts(x)
        routing = self.router(own)
        arrived, plan = dispatch_tokens(
            own, routing.experts, routing.weights, self.num_experts, self.sharding.ep, self.sharding.etp
        )
        out = self.sharding.from_experts(combine_tokens(self.experts(arrived, plan.tokens_per_expert), plan), x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, None if rows is None else load_balancing_loss(routing, rows, self.sharding)


def rows_of_tokens(real: Tensor, sharding: ModelSharding, dtype: torch.dtype) -> Tensor:
    """Return which row of the batch each token that this rank routes belongs to.

    Args:
        real: [seq, batch], false for padding; the same on every rank of tensor parallel.
        sharding: Layout of the tokens.
        dtype: float32 or wider.

    Returns:
        [own tokens, batch], 1 for the row of a real token and 0 elsewhere.
    """
    return sharding.own_tokens(torch.eye(real.shape[1], dtype=dtype, device=real.device) * real.unsqueeze(-1))
