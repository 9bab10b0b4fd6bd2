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

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig
from meshpeft.models.config_parts import MoEConfig
from meshpeft.models.mlp import MLP, gated_silu
from meshpeft.models.router import ReplicatedLinear, TopKRouter, load_balancing_loss
from meshpeft.parallel.collectives import mp_gather, mp_scatter
from meshpeft.parallel.communication import take_slice
from meshpeft.parallel.dispatch import combine_tokens, dispatch_tokens
from meshpeft.parallel.experts import GroupedColumnParallelLinear, GroupedRowParallelLinear
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.tensor_layout import Packing

__all__ = ["Experts", "MoELayer", "SharedExperts", "rows_of_tokens"]


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
        self.packing = Packing(("gate", "up"), (width, width))
        self.linear_fc1 = GroupedColumnParallelLinear(
            moe.num_experts, hidden_size, 2 * width, packing=self.packing, device=device, dtype=dtype, config=moe
        )
        self.linear_fc2 = GroupedRowParallelLinear(
            moe.num_experts, width, hidden_size, device=device, dtype=dtype, config=moe
        )

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, hidden], R over etp, sorted by local expert -> [tokens, hidden], a summand over etp."""
        packed = self.linear_fc1(x, tokens_per_expert)
        return self.linear_fc2(gated_silu(packed, self.packing, self.etp.world_size), tokens_per_expert)


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
