"""A layer of experts in the place of an MLP: router, experts, shared experts.

Each token passes the router and its experts once, on one rank. Where all ranks of tensor parallel hold the same
tokens they are divided before and gathered after; token shards of sequence parallel go in as they are. The shared
experts are an ordinary MLP over tensor parallel.

| | without sequence parallel | with it |
|---|---|---|
| x | I | S(0) |
| router, dispatch, experts | V: `mp_scatter` before, `mp_gather` after | V |
| shared experts and their gate | I | S(0) |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig, MoEConfig
from meshpeft.models.mlp import MLP, gated_silu
from meshpeft.parallel.collectives import mp_gather, mp_reduce, mp_scatter
from meshpeft.parallel.communication import take_slice
from meshpeft.parallel.dispatch import combine_tokens, dispatch_tokens
from meshpeft.parallel.experts import GroupedColumnParallelLinear, GroupedRowParallelLinear
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.layer_types import LayerType, register_layer_type
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.tensor_layout import FusedParts, set_layout

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


class Experts(nn.Module):
    """linear_fc2(silu(gate) * up) for each expert on its own tokens; divided over expert and expert-tensor parallel."""

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        info = parallel_group_info()
        self.ep, self.etp = info.ep, info.etp
        width = moe.intermediate_size
        self.fused_parts = FusedParts(("gate", "up"), (width, width))
        self.linear_fc1 = GroupedColumnParallelLinear(
            moe.num_experts,
            hidden_size,
            2 * width,
            fused_parts=self.fused_parts,
            device=device,
            dtype=dtype,
            config=moe,
        )
        self.linear_fc2 = GroupedRowParallelLinear(
            moe.num_experts, width, hidden_size, device=device, dtype=dtype, config=moe
        )

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, hidden], R over etp, sorted by local expert -> [tokens, hidden], a summand over etp."""
        packed = self.linear_fc1(x, tokens_per_expert)
        return self.linear_fc2(gated_silu(packed, self.fused_parts, self.etp.world_size), tokens_per_expert)


class SharedExperts(MLP):
    """The experts that every token passes through: an MLP times the sigmoid of a gate."""

    def __init__(
        self,
        config: DecoderConfig,
        width: int,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, tp, sequence_parallel, device, dtype, width=width)
        self.gate = ReplicatedLinear(config.hidden_size, 1, tp, sequence_parallel, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [seq, batch, hidden] -> [seq, batch, hidden]; [seq / tp, ..] of both under sequence parallel."""
        return torch.sigmoid(self.gate(x)) * super().forward(x)


class MoELayer(nn.Module):
    """Each token to its experts, and the weighted sum of what they return; plus the shared experts, if any.

    Raises:
        ParallelError: the experts do not divide over the mesh.
    """

    def __init__(
        self,
        config: DecoderConfig,
        moe: MoEConfig,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.num_experts = moe.num_experts
        self.tokens_are_divided = sequence_parallel
        self.router = TopKRouter(config.hidden_size, moe, tp, device, dtype)
        self.experts = Experts(config.hidden_size, moe, device, dtype)
        self.shared_experts: SharedExperts | None = None
        if moe.shared_intermediate_size is not None:
            width = moe.shared_intermediate_size
            self.shared_experts = SharedExperts(config, width, tp, sequence_parallel, device, dtype)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Send the tokens through their experts.

        Args:
            x: [seq, batch, hidden], I over tensor parallel; [seq / tp, batch, hidden], S(0), under sequence parallel.
            rows: [own tokens, batch], see [`rows_of_tokens`][meshpeft.models.moe.rows_of_tokens].

        Returns:
            [seq, batch, hidden] in the state of x; and, given `rows`, the load-balancing loss of each row, [batch].
        """
        tokens = x.reshape(-1, x.shape[-1])
        own = tokens if self.tokens_are_divided else mp_scatter(pad_tokens(tokens, self.tp), 0, self.tp)
        routing = self.router(own)
        arrived, plan = dispatch_tokens(
            own, routing.experts, routing.weights, self.num_experts, self.experts.ep, self.experts.etp
        )
        out = combine_tokens(self.experts(arrived, plan.tokens_per_expert), plan)
        if not self.tokens_are_divided:
            out = mp_gather(out, 0, self.tp)[: tokens.shape[0]]
        out = out.view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, None if rows is None else load_balancing_loss(routing, rows, self.tp)


def pad_tokens(tokens: Tensor, tp: ParallelAxis) -> Tensor:
    """[tokens, *] with rows of zeros behind, up to a multiple of the axis's size."""
    missing = -tokens.shape[0] % tp.world_size
    return functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def rows_of_tokens(real: Tensor, tp: ParallelAxis, dtype: torch.dtype) -> Tensor:
    """Which row of the batch each token that this rank routes belongs to.

    Args:
        real: [seq, batch], false for padding; the same on every rank of tensor parallel.
        tp: over which the tokens are divided, in the order of `real`.
        dtype: float32 or wider.

    Returns:
        [own tokens, batch], 1 for the row of a real token and 0 elsewhere.
    """
    batch = real.shape[1]
    rows = torch.eye(batch, dtype=dtype, device=real.device) * real.unsqueeze(-1)
    return take_slice(pad_tokens(rows.flatten(0, 1), tp), tp, 0)
