"""Column- and row-parallel linear layers: `enter`, the GEMM, `exit`.

| | `enter` | GEMM gives | `exit` |
|---|---|---|---|
| column | `mp_copy`: I -> R | S(-1) | bias shard, then nothing, or `mp_gather` |
| column, sequence parallel | `sp_gather`: S(0) -> R | S(-1) | bias shard |
| row | nothing, or `mp_scatter` | P | `mp_reduce`: P -> I, then the bias |
| row, sequence parallel | nothing | P | `sp_reduce_scatter`: P -> S(0), then the bias |

An adapter joins between the two, see docs/adapters.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpeft.parallel.collectives import mp_copy, mp_gather, mp_reduce, mp_scatter, sp_gather, sp_reduce_scatter
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.init import InitializationType, initialize_, stride_parts
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.layer_types import LayerType, register_layer_type
from meshpeft.parallel.master import master_tensor
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.tensor_layout import FusedParts, TensorLayout, set_layout

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "gather_features"]


def gather_features(divided: Tensor, layout: LinearLayout, dim: int = -1) -> Tensor:
    """The output features of a column-parallel layer along `dim`, in canonical order. S(dim) -> I."""
    axis, fused_parts = layout.axis, layout.fused_parts
    if fused_parts is None or fused_parts.keeps_order(axis.world_size):
        return mp_gather(divided, dim, axis)
    return torch.cat([mp_gather(part, dim, axis) for part in fused_parts.split(divided, dim, axis.world_size)], dim)


class _ParallelLinear(ShardedTensors, nn.Module):
    """What the two layers share: parameters made from a layout, and the full matrices gathered back."""

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
        """The collective before the GEMM."""
        raise NotImplementedError

    def exit(self, y: Tensor) -> Tensor:
        """The bias and the collective after the GEMM."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b. x [*, in_features] -> y [*, out_features], each divided as the layer's options say."""
        return self.exit(F.linear(self.enter(x), self.weight))

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
    """A linear layer whose weight is divided along the output features.

    x [*, in_features] -> y [*, out_features / world_size], or [*, out_features] with `gather_output`. Without
    sequence parallel x is I; with it x is S(0), [tokens / world_size, .., in_features], and y has all tokens.

    Args:
        in_features: number of input features.
        out_features: number of output features; divisible by the axis's size (and the stride).
        bias: whether to include a bias term.
        gather_output: gather the output from all ranks (in canonical order).
        init_type: initialization type.
        stride: the weight is cut into `stride` parts, each divided over the axis on its own.
        sequence_parallel: gather the sequence before the GEMM.
        fused_parts: the canonical parts of the output features, instead of `stride`.
        axis: the axis that divides the weight; tensor parallel by default.
        device, dtype: of the parameters.
        perform_initialization: draw the parameters; otherwise they are left empty, to be loaded.

    Raises:
        ParallelError: sizes that do not divide; `sequence_parallel` together with `gather_output`.
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
        if fused_parts is not None and stride != 1:
            raise ParallelError(f"ColumnParallelLinear: stride={stride} and fused_parts both order the rows; give one")
        layout = LinearLayout(
            in_features,
            out_features,
            shard="out",
            axis=axis,
            sequence_parallel=sequence_parallel,
            gather_output=gather_output,
            fused_parts=fused_parts or stride_parts(out_features, stride, axis),
        )
        super().__init__(layout, bias, init_type, device, dtype, perform_initialization)

    def enter(self, x: Tensor) -> Tensor:
        """I -> R, or S(0) -> R under sequence parallel."""
        if self.layout.sequence_parallel:
            return sp_gather(x, 0, self.layout.axis)
        return mp_copy(x, axis=self.layout.axis)

    def exit(self, y: Tensor) -> Tensor:
        """y [*, out / world_size], S(-1): adds the bias shard, and gathers if the layer does."""
        return self._collect(y if self.bias is None else y + self.bias.to(y.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b; the bias is added by the GEMM itself."""
        return self._collect(F.linear(self.enter(x), self.weight, self.bias))

    def _collect(self, y: Tensor) -> Tensor:
        return gather_features(y, self.layout) if self.layout.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose weight is divided along the input features.

    x [*, in_features / world_size] with `input_is_parallel`, else [*, in_features] -> y [*, out_features], I; with
    sequence parallel y is S(0), [tokens / world_size, .., out_features].

    Args:
        in_features: number of input features; divisible by the axis's size (and the stride).
        out_features: number of output features.
        bias: whether to include a bias term; added once, after the reduction.
        input_is_parallel: whether the input is already divided along the feature dim.
        init_type: initialization type.
        stride: the weight is cut into `stride` parts, each divided over the axis on its own.
        sequence_parallel: scatter the sequence after the reduction.
        axis: the axis that divides the weight; tensor parallel by default.
        device, dtype: of the parameters.
        perform_initialization: draw the parameters; otherwise they are left empty, to be loaded.

    Raises:
        ParallelError: sizes that do not divide; `sequence_parallel` without `input_is_parallel`.
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
        axis: ParallelAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perform_initialization: bool = True,
    ) -> None:
        axis = parallel_group_info().tp if axis is None else axis
        _check_sizes("RowParallelLinear", "in_features", in_features, axis)
        if sequence_parallel and not input_is_parallel:
            raise ParallelError("RowParallelLinear: sequence_parallel=True needs input_is_parallel=True")
        layout = LinearLayout(
            in_features,
            out_features,
            shard="in",
            axis=axis,
            sequence_parallel=sequence_parallel,
            input_is_parallel=input_is_parallel,
            in_fused_parts=stride_parts(in_features, stride, axis),
        )
        super().__init__(layout, bias, init_type, device, dtype, perform_initialization)

    def enter(self, x: Tensor) -> Tensor:
        """S(-1) as it is, or I -> S(-1) (in the weight's packed order)."""
        axis, fused_parts = self.layout.axis, self.layout.in_fused_parts
        if self.layout.input_is_parallel:
            return x
        if fused_parts is None or fused_parts.keeps_order(axis.world_size):
            return mp_scatter(x, -1, axis)
        parts = [mp_scatter(part, -1, axis) for part in x.split(list(fused_parts.sizes), -1)]
        return fused_parts.fuse(parts, -1, axis.world_size)

    def exit(self, y: Tensor) -> Tensor:
        """y [*, out], P: reduces it, then adds the bias."""
        if self.layout.sequence_parallel:
            y = sp_reduce_scatter(y, 0, self.layout.axis)
        else:
            y = mp_reduce(y, axis=self.layout.axis)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b; on one rank the bias is added by the GEMM itself."""
        if self.layout.axis.world_size == 1:
            return F.linear(self.enter(x), self.weight, self.bias)
        return super().forward(x)


def _layout(module: Any) -> LinearLayout:
    layout: LinearLayout = module.layout
    return layout


for _layer in (ColumnParallelLinear, RowParallelLinear):
    register_layer_type(
        _layer,
        LayerType(
            layout=_layout,
            weight=lambda module: module.weight,
            enter=lambda module, x: module.enter(x),
            exit=lambda module, y: module.exit(y),
        ),
    )
