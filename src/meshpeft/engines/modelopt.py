"""ModelOpt's fake quantisation: its quantised layers carry adapters, and this package's layers can be quantised.

Importing this file

* registers the layers that `mtq.quantize` makes of `nn.Linear`, of this package's layers and of Megatron's with the
  entries of these. Their forward quantises activations before the base's collectives, so adapters run standalone, on
  the unquantised input.
  Their weight is W as their enabled `weight_quantizer` rounds it, and W where it is disabled. Where ModelOpt moved a
  factor of each input feature from W to the activations (SmoothQuant, AWQ), it is multiplied back: an adapter takes
  the input as it comes;
* registers column- and row-parallel layers and grouped experts with `mtq.quantize`. Scales that would differ between
  the ranks that share a weight become the same: a weight is quantised alike at every layout, unless its blocks
  straddle ranks. Experts are quantised row by row as if they were separate layers; a scale for the full tensor is
  one for all experts.

It is imported by itself: as soon as `modelopt.torch.quantization` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantLinearConvBase, QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear
from modelopt.torch.utils.distributed import DistributedProcessGroup, ParallelState
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    LayerType,
    LinearLayout,
    ParallelAxis,
    RowParallelLinear,
    TensorLayout,
    derive_layer_types,
    parallel_group_info,
    sharded_state_dict,
)
from meshpeft.parallel.sharded_tensor import ShardedOffset, in_format_of_caller, sharded_tensors

__all__: list[str] = []


def _group(axis: ParallelAxis | None) -> Any:
    """Return the group as ModelOpt takes it: -1 for an axis without one; `None` would be the full world."""
    return -1 if axis is None or axis.group is None else axis.group


class _QuantParallelLinear(QuantLinearConvBase):
    """Mixin that ModelOpt puts before the class of a column- or row-parallel layer."""

    default_quant_desc_weight = _QuantLinear.default_quant_desc_weight
    layout: LinearLayout

    def _setup(self) -> None:
        super()._setup()
        info = parallel_group_info()
        data_axis = self.layout.data_axis or info.token_axis(expert=self.layout.is_expert)
        self.parallel_state = ParallelState(
            _group(data_axis), _group(self.layout.axis), _group(self.layout.expert_axis)
        )

    # ModelOpt's calibration reads these, to make scales the same over the tensor-parallel group.
    @property
    def _is_column_parallel(self) -> bool:
        return self.layout.shard == "out"

    @property
    def _is_row_parallel(self) -> bool:
        return self.layout.shard == "in"

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the layer's entries, with the weight's scales sharded like the weight: [.., out, scales of a row]."""
        described = sharded_state_dict(self, prefix, sharded_offsets, metadata)
        for name, quantizer in self.weight_quantizer.named_modules(prefix=f"{prefix}weight_quantizer"):
            amax: Tensor | None = getattr(quantizer, "_amax", None)
            layout = None if amax is None else self._layout_of_scales(amax, quantizer.block_sizes is not None)
            if amax is not None and layout is not None:
                del described[f"{name}._amax"]
                scales = amax.view(layout.local_shape)
                for entry in sharded_tensors(f"{name}._amax", scales, layout, sharded_offsets):
                    described[entry.key] = entry
        return in_format_of_caller(described, metadata)

    def _layout_of_scales(self, amax: Tensor, in_blocks: bool) -> TensorLayout | None:
        """Return the layout of scales [.., out, n]; `None` where they are one scale, or not a number of each row."""
        weight = self.layout.weight()
        *rows, _ = weight.local_shape
        to_a_row, left = divmod(amax.numel(), math.prod(rows))
        last = len(rows)
        if left or not to_a_row or (weight.fused_parts is not None and weight.fused_dim == last):
            return None
        # Blocks are of this rank's columns; one scale of a row is that of all of them, the same on every rank.
        shards = tuple((dim, axis) for dim, axis in weight.shards if in_blocks or dim != last)
        along = to_a_row * math.prod(axis.world_size for dim, axis in shards if dim == last)
        return replace(weight, global_shape=(*weight.global_shape[:-1], along), shards=shards, grad_partial=())


class _QuantGroupedLinear(_QuantParallelLinear):
    """Mixin that ModelOpt puts before the class of a grouped layer. Its quantisers take [experts * out, in]."""

    @staticmethod
    def _get_quantized_weight(module: Any, weight: Tensor) -> Tensor:
        rows = QuantLinearConvBase._get_quantized_weight(module, weight.flatten(0, 1))
        return rows.view_as(weight)

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, nn.Module]]:
        """Yield the weight's rows, with their quantiser."""
        yield self.weight.flatten(0, 1), self.weight_quantizer

    def fold_weight(self, keep_attrs: bool = False) -> None:
        """Round the stored weight, and disable the quantiser."""
        if isinstance(self.weight_quantizer, TensorQuantizer):
            self._fold_weight_quantizer(self.weight_quantizer, (self.weight.data.flatten(0, 1),), keep_attrs)

    def layer_sync_moe_local_experts_amax(self, sync_weight_amax: bool = False) -> None:
        """Make scales the same on every rank that shares what they scale. A collective.

        ModelOpt calls it after it has collected statistics; its own method skips weights that are not matrices.
        """
        for quantizer in _leaves(self.weight_quantizer):
            if quantizer.block_sizes is not None:
                continue
            axes = [self.layout.axis] if self._is_row_parallel or quantizer.axis is None else []
            if quantizer.axis is None and self.layout.expert_axis is not None:
                axes.append(self.layout.expert_axis)
            _same_over(quantizer, axes)
        if self._is_row_parallel:
            for quantizer in _leaves(self.input_quantizer):
                if quantizer.axis is None and quantizer.block_sizes is None:
                    _same_over(quantizer, [self.layout.axis])


def _leaves(quantizer: nn.Module) -> list[Any]:
    return [module for module in quantizer.modules() if isinstance(module, TensorQuantizer)]


def _same_over(quantizer: Any, axes: Sequence[ParallelAxis]) -> None:
    for axis in axes:
        quantizer.sync_amax_across_distributed_group(DistributedProcessGroup(_group(axis)))


@cache
def _quantized(original: LayerType) -> LayerType:
    """Return the entry of layers that ModelOpt made of layers with the entry `original`."""

    def weight(module: Any) -> Tensor:
        stored = original.weight(module)
        return _of_input(module, _rounded(module, stored) if module.weight_quantizer.is_enabled else stored)

    def unrounded(module: Any) -> Tensor | None:
        return _of_input(module, original.weight(module)) if module.weight_quantizer.is_enabled else None

    return replace(original, weight=weight, unrounded=unrounded, enter=None, exit=None, store=None)


def _rounded(module: Any, weight: Tensor) -> Tensor:
    """Round a weight as the layer's own forward does."""
    quantizer = module.weight_quantizer
    if isinstance(quantizer, nn.ModuleList):  # one for each expert
        return torch.stack([each(matrix) for each, matrix in zip(quantizer, weight, strict=True)])
    rounded: Tensor = quantizer(weight.flatten(0, -2)).view_as(weight)
    return rounded


def _of_input(module: Any, weight: Tensor) -> Tensor:
    """Turn the weight of a scaled input into that of the input as it comes."""
    scale: Tensor | None = getattr(module.input_quantizer, "pre_quant_scale", None)
    return weight if scale is None else weight * scale.to(weight.dtype)


QuantModuleRegistry.register(
    {
        ColumnParallelLinear: "meshpeft_ColumnParallelLinear",
        RowParallelLinear: "meshpeft_RowParallelLinear",
    }
)(_QuantParallelLinear)
QuantModuleRegistry.register(
    {
        GroupedColumnParallelLinear: "meshpeft_GroupedColumnParallelLinear",
        GroupedRowParallelLinear: "meshpeft_GroupedRowParallelLinear",
    }
)(_QuantGroupedLinear)

derive_layer_types(QuantModule, _quantized)
