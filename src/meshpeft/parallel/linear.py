"""Column- and row-parallel linear layers: `enter`, the GEMM, `exit`.

`enter` and `exit` are conversions between the states that the layer's `LinearLayout`
states for x and y outside and those that the product has:

| | x -> | product | -> y |
|---|---|---|---|
| column | I -> R | Shard(-1) | + bias shard, then Shard(-1) as it is, or -> I |
| column, sequence parallel | Shard(0) -> R | Shard(-1) | + bias shard |
| row | Shard(-1) as it is, or I -> Shard(-1) | P | P -> I, then + bias |
| row, sequence parallel | Shard(-1) as it is | P | P -> Shard(0), then + bias |
| column, `input_is_copied` | R as it is | Shard(-1) | + bias shard |
| row, `reduce_output=False` | Shard(-1) as it is | P | P as it is, + 1 / world_size of the bias |

The states I, R, P and Shard are those of `states.py`. Under sequence parallel that is an all-gather in `enter` and a
reduce-scatter in `exit`. A fused adapter joins between the two (`peft/fused.py`); a standalone one takes the layer's x,
and is added to its y (`peft/standalone.py`). Sequence parallel also acts where the stream of shards begins and ends, at
the embedding and the head: `models/sharding.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.init import InitializationType, initialize_, stride_parts
from meshpeft.parallel.layout import (
    FusedParts,
    LinearLayout,
    TensorLayout,
    convert_parts,
    master_tensor,
    set_layout,
)
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.registry import LayerType, register_layer_type
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.states import I, P, R, Shard, convert
from meshpeft.parallel.typing import typed_linear

__all__ = ["ColumnParallelLinear", "RowParallelLinear"]


class _ParallelLinear(ShardedTensors, nn.Module):
    """Parameters made from a layout, `enter`, and the full matrices gathered back."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        layout: LinearLayout,
        bias: bool,
        init_type: InitializationType,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        perform_initialization: bool,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features

        def parameter(tensor_layout: TensorLayout) -> nn.Parameter:
            made = nn.Parameter(torch.empty(tensor_layout.local_shape, device=device, dtype=dtype))
            set_layout(made, tensor_layout)
            return made

        self.weight = parameter(layout.weight())
        self.bias = parameter(layout.bias()) if bias else None
        if perform_initialization:
            initialize_(self.weight, self.bias, init_type)

    @property
    def master_weight(self) -> Tensor:
        """The full weight [out_features, in_features], on every rank. A collective; see `master_tensor`."""
        return master_tensor(self.weight)

    @property
    def master_bias(self) -> Tensor | None:
        """The full bias [out_features], or `None`. A collective in a column; see `master_tensor`."""
        return None if self.bias is None else master_tensor(self.bias)

    def enter(self, x: Tensor) -> Tensor:
        """Convert x from its state outside to that of the product, which takes it in the weight's fused order."""
        layout = self.layout
        return convert_parts(x, layout.x, layout.states(inside=True)[0], layout.axis, layout.in_fused_parts)

    def exit(self, y: Tensor) -> Tensor:
        """Add the bias, and convert y from the state of the product to its state outside."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + b. x [*, in_features] -> y [*, out_features], each sharded as the layer's options say."""
        return self.exit(typed_linear(self.enter(x), self.weight, None))

    def extra_repr(self) -> str:
        axis = self.layout.axis
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{axis.name}={axis.world_size}"
        )


def _check_sizes(kind: str, dim: str, size: int, axis: ParallelAxis) -> None:
    if size % axis.world_size:
        divisors = [str(count) for count in range(1, size + 1) if size % count == 0 and count <= 2 * axis.world_size]
        raise ParallelError(
            f"{kind}: {dim}={size} cannot be split over {axis.name}={axis.world_size}; use {' or '.join(divisors)}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose weight is sharded along the output features.

    x [*, in_features] -> y [*, out_features / world_size], or [*, out_features] with `gather_output`. Without
    sequence parallel x is I; with it x is Shard(0), [tokens / world_size, .., in_features], and y has all tokens.

    Args:
        in_features: Number of input features.
        out_features: Number of output features; divisible by the axis's size (and the stride).
        bias: Whether to include a bias term.
        gather_output: Gather the output from all ranks (in canonical order).
        init_type: Initialization type.
        stride: The weight is cut into `stride` parts, each sharded over the axis on its own.
        sequence_parallel: Gather the sequence before the GEMM.
        input_is_copied: x is R: whoever made it sums its gradient, for all layers that take it.
        fused_parts: The canonical parts of the output features, instead of `stride`.
        axis: The axis that shards the weight; tensor parallel by default.
        device, dtype: Device and type of the parameters.
        perform_initialization: Draw the parameters; otherwise they are left empty, to be loaded.

    Raises:
        ParallelError: Sizes that do not divide; `sequence_parallel` together with `gather_output`, or
            `input_is_copied` with either.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = True,
        init_type: InitializationType = "xavier_normal",
        stride: int = 1,
        *,
        sequence_parallel: bool = False,
        input_is_copied: bool = False,
        fused_parts: FusedParts | None = None,
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
    ) -> None:
        axis = parallel_group_info().tp if axis is None else axis
        _check_sizes("ColumnParallelLinear", "out_features", out_features, axis)
        if sequence_parallel and gather_output:
            raise ParallelError("ColumnParallelLinear: sequence_parallel=True needs gather_output=False")
        if input_is_copied and (sequence_parallel or gather_output):
            raise ParallelError(
                "ColumnParallelLinear: input_is_copied=True needs sequence_parallel=False and gather_output=False"
            )
        if fused_parts is not None and stride != 1:
            raise ParallelError(f"ColumnParallelLinear: stride={stride} and fused_parts both order the rows; give one")
        layout = LinearLayout(
            in_features,
            out_features,
            shard="out",
            axis=axis,
            x=Shard(0) if sequence_parallel else R if input_is_copied else I,
            y=I if gather_output else Shard(-1),
            fused_parts=fused_parts or stride_parts(out_features, stride, axis),
        )
        super().__init__(layout, bias, init_type, device, dtype, perform_initialization)

    def exit(self, y: Tensor) -> Tensor:
        """y [*, out / world_size], Shard(-1): add the bias shard, and gather it if the layer does."""
        return self._collect(y if self.bias is None else y + self.bias.to(y.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + b; the GEMM itself adds the bias."""
        return self._collect(typed_linear(self.enter(x), self.weight, self.bias))

    def _collect(self, y: Tensor) -> Tensor:
        layout = self.layout
        return convert_parts(y, layout.states(inside=True)[1], layout.y, layout.axis, layout.fused_parts)


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose weight is sharded along the input features.

    x [*, in_features / world_size] with `input_is_parallel`, else [*, in_features] -> y [*, out_features], I; with
    sequence parallel y is Shard(0), [tokens / world_size, .., out_features].

    Args:
        in_features: Number of input features; divisible by the axis's size (and the stride).
        out_features: Number of output features.
        bias: Whether to include a bias term; added once, after the reduction, or a share of it on each rank.
        input_is_parallel: Whether the input is already sharded along the feature dim.
        init_type: Initialization type.
        stride: The weight is cut into `stride` parts, each sharded over the axis on its own.
        sequence_parallel: Scatter the sequence after the reduction.
        reduce_output: Sum y over the axis. Otherwise y is P, and whoever takes it sums it.
        axis: The axis that shards the weight; tensor parallel by default.
        device, dtype: Device and type of the parameters.
        perform_initialization: Draw the parameters; otherwise they are left empty, to be loaded.

    Raises:
        ParallelError: Sizes that do not divide; `sequence_parallel` without `input_is_parallel`;
            `reduce_output=False` with `sequence_parallel` or without `input_is_parallel`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_type: InitializationType = "xavier_normal",
        stride: int = 1,
        *,
        sequence_parallel: bool = False,
        reduce_output: bool = True,
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
    ) -> None:
        axis = parallel_group_info().tp if axis is None else axis
        _check_sizes("RowParallelLinear", "in_features", in_features, axis)
        if sequence_parallel and not input_is_parallel:
            raise ParallelError("RowParallelLinear: sequence_parallel=True needs input_is_parallel=True")
        if not reduce_output and (sequence_parallel or not input_is_parallel):
            raise ParallelError(
                "RowParallelLinear: reduce_output=False needs sequence_parallel=False and input_is_parallel=True"
            )
        layout = LinearLayout(
            in_features,
            out_features,
            shard="in",
            axis=axis,
            x=Shard(-1) if input_is_parallel else I,
            y=Shard(0) if sequence_parallel else I if reduce_output else P,
            in_fused_parts=stride_parts(in_features, stride, axis),
        )
        super().__init__(layout, bias, init_type, device, dtype, perform_initialization)

    def exit(self, y: Tensor) -> Tensor:
        """y [*, out], P: reduce it, then add the bias; or, where y stays P, a share of the bias."""
        y = convert(y, self.layout.states(inside=True)[1], self.layout.y, self.layout.axis)
        if self.bias is None:
            return y
        bias = self.bias.to(y.dtype)
        return y + (bias / self.layout.axis.world_size if self.layout.y is P else bias)

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + b; on one rank the GEMM itself adds the bias."""
        if self.layout.axis.world_size == 1:
            return typed_linear(self.enter(x), self.weight, self.bias)
        return super().forward(x)


for _layer in (ColumnParallelLinear, RowParallelLinear):
    register_layer_type(
        _layer,
        LayerType(
            layout=lambda module: module.layout,
            weight=lambda module: module.weight,
            enter=lambda module, x: module.enter(x),
            exit=lambda module, y: module.exit(y),
        ),
    )
