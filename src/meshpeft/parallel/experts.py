"""Grouped expert layers: all local experts in one stacked weight, one grouped GEMM.

Experts are sharded over `ep` along the stacked dim, and each expert over `etp` like an ordinary column or row:

| | x over etp | output over etp | input gradient over etp |
|---|---|---|---|
| `GroupedColumnParallelLinear` | R | S(-1) | P, summed where the tokens were gathered |
| `GroupedRowParallelLinear` | S(-1) | P, summed by the token combine | S(-1) |

The layers make no collective themselves: `dispatch_tokens` and `combine_tokens` do.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.grouped_gemm import group_offsets, grouped_linear
from meshpeft.parallel.init import InitializationType, initialize_
from meshpeft.parallel.layout import FusedParts, LinearLayout, master_tensor, set_layout
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.registry import LayerType, register_layer_type
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.states import P, R, Shard

__all__ = ["GroupedColumnParallelLinear", "GroupedRowParallelLinear"]


class _GroupedLinear(ShardedTensors, nn.Module):
    """Stacked experts; the sharded dim of each is the subclass's `shard`."""

    shard: Literal["out", "in"]

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        init_type: InitializationType = "xavier_normal",
        *,
        fused_parts: FusedParts | None = None,
        expert_axis: ParallelAxis | None = None,
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
        config: Any = None,
    ) -> None:
        info = parallel_group_info()
        expert_axis = info.ep if expert_axis is None else expert_axis
        axis = info.etp if axis is None else axis
        kind = type(self).__name__
        if num_experts % expert_axis.world_size:
            raise ParallelError(
                f"{kind}: {num_experts} experts cannot be divided over expert_parallel={expert_axis.world_size}; "
                f"use a divisor of {num_experts}"
            )
        sharded = out_features if self.shard == "out" else in_features
        if sharded % axis.world_size:
            raise ParallelError(
                f"{kind}: {'out' if self.shard == 'out' else 'in'}_features={sharded} cannot be split over "
                f"expert_tensor_parallel={axis.world_size}; use a divisor of {sharded}"
            )
        super().__init__()
        self.config = config
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.num_local_experts = num_experts // expert_axis.world_size
        self.layout = LinearLayout(
            in_features,
            out_features,
            shard=self.shard,
            axis=axis,
            fused_parts=fused_parts,
            experts=num_experts,
            expert_axis=expert_axis,
            x=Shard(-1) if self.shard == "in" else R,
            y=P if self.shard == "in" else Shard(-1),
        )
        tensor_layout = self.layout.weight()
        self.weight = nn.Parameter(torch.empty(tensor_layout.local_shape, device=device, dtype=dtype))
        set_layout(self.weight, tensor_layout)
        if perform_initialization:
            initialize_(self.weight, None, init_type)

    @property
    def master_weight(self) -> Tensor:
        """The full weight [experts, out_features, in_features], on every rank. A collective; see `master_tensor`."""
        return master_tensor(self.weight)

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """y = x W_e^T for each local expert's tokens.

        Args:
            x: [tokens, in], sorted by local expert; `in` sharded over etp in a row.
            tokens_per_expert: [local experts] of counts, adding up to `tokens`; some, or all, may be zero.

        Returns:
            [tokens, out]; `out` sharded over etp in a column; partial over etp in a row.
        """
        return grouped_linear(x, self.weight, group_offsets(tokens_per_expert))

    def extra_repr(self) -> str:
        layout = self.layout
        expert = layout.expert_axis
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"ep={expert.world_size if expert else 1}, {layout.axis.name}={layout.axis.world_size}"
        )


class GroupedColumnParallelLinear(_GroupedLinear):
    """Stacked experts, each sharded along its output features.

    Called as `layer(x, tokens_per_expert)`: x [tokens, in_features] -> [tokens, out_features / etp].

    Args:
        num_experts: Experts over all ranks; divisible by expert parallel.
        in_features, out_features: Sizes of one expert; `out_features` divisible by expert-tensor parallel.
        init_type: Initialization type, with the fans of one expert.
        fused_parts: The canonical parts of the output features (gate, up).
        expert_axis, axis: Expert parallel and expert-tensor parallel by default.
        device, dtype, perform_initialization: As in `ColumnParallelLinear`.
        config: Config of the layer of experts, kept as `config`; adapters read its `moe_router_topk`.

    Raises:
        ParallelError: Sizes that do not divide.
    """

    shard = "out"


class GroupedRowParallelLinear(_GroupedLinear):
    """Stacked experts, each sharded along its input features.

    Called as `layer(x, tokens_per_expert)`: x [tokens, in_features / etp] -> [tokens, out_features], partial
    over expert-tensor parallel. Arguments as in `GroupedColumnParallelLinear`, with `in_features` divisible.
    """

    shard = "in"


for _layer in (GroupedColumnParallelLinear, GroupedRowParallelLinear):
    register_layer_type(
        _layer,
        LayerType(
            layout=lambda module: module.layout,
            weight=lambda module: module.weight,
            enter=lambda module, x: x,
            exit=lambda module, y: y,
        ),
    )
