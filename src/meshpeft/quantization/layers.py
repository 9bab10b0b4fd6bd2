"""Linear layers whose weight is packed: the layer's own class, with another storage.

[`pack_`][meshpeft.quantization.packing.pack_] turns a layer into one of these in place, so that whoever holds the
layer holds the packed one. The layers enter the registry with their base class's entry, but for `weight`, which
dequantises: adapters, checkpoints and everything else that reads a layout need not know that the weight is packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    RowParallelLinear,
    ShardedTensors,
    group_offsets,
    layer_type_of,
    layout_of,
    register_layer_type,
    set_layout,
)
from meshpeft.quantization.blocks import Blocks
from meshpeft.quantization.formats import Packed, WeightFormat
from meshpeft.quantization.functional import grouped_linear_from, linear_from

__all__ = ["PACKED_CLASSES", "PackedLayer", "ResidualFactors"]


class ResidualFactors(NamedTuple):
    """The best low-rank part of W - dequantised W, local: `a` [.., r, in] (V^T), `b` [.., out, r] (U S), float32."""

    a: Tensor
    b: Tensor


class PackedLayer(ShardedTensors):
    """What the packed layers share. Not constructed: see `pack_`.

    Attributes:
        weight_packed: [.., out, in * bits / 8] uint8; divided like the weight.
        weight_scale: [.., out, in / block_size] float32; divided like the weight, unless blocks straddle ranks.
        storage: the format.
        block_size: values of a row that share a scale.
        compute_dtype: type of the dequantised weight; follows `module.to(dtype)`, as the packed tensors do not.
        residual: of the packed weight, if it was kept.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    storage: WeightFormat
    block_size: int
    compute_dtype: torch.dtype

    @property
    def residual(self) -> ResidualFactors | None:
        """The factors of what packing lost; `None` if they were not kept."""
        a, b = (self.__dict__["_buffers"].get(f"residual_{name}") for name in "ab")
        return None if a is None or b is None else ResidualFactors(a, b)

    def forget_residual(self) -> None:
        """Free the factors of what packing lost."""
        assert isinstance(self, nn.Module)
        for name in ("residual_a", "residual_b"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """The local weight, made anew: [out, in], or [experts, out, in], in `compute_dtype`."""
        return self.blocks.unpack(Packed(self.weight_packed, self.weight_scale), self.compute_dtype)

    @property
    def blocks(self) -> Blocks:
        """How the weight is stored, and where this rank's share of it lies among the blocks."""
        assert isinstance(self, nn.Module)
        return Blocks(self.storage, self.block_size, layout_of(self))

    @property
    def master_weight(self) -> Tensor:
        """The full dequantised weight, on every rank. A collective; no gradient."""
        assert isinstance(self, nn.Module)
        return layout_of(self).weight().gather(self.dequantized_weight())

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            # Not a property: code that looks at a weight in passing would dequantise it unknowingly.
            raise AttributeError(
                f"the weight of this {type(self).__name__} is packed as {self.storage.name}; "
                "dequantized_weight() makes a copy of it"
            )
        return super().__getattr__(name)  # type: ignore[misc]  # nn.Module's: the mixin stands before it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.weight_scale.detach()
        applied = super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=scale.device)).dtype
        if self.weight_scale.dtype != scale.dtype:
            # A cast of the model changes what it computes in, not how exactly its weights are stored.
            kept = nn.Parameter(scale.to(self.weight_scale.device), requires_grad=False)
            set_layout(kept, self.blocks.scales())
            self.weight_scale = kept
        return applied

    def extra_repr(self) -> str:
        """The layer's own, and how it is stored."""
        own = super().extra_repr()  # type: ignore[misc]  # nn.Module's: the mixin stands before it
        return f"{own}, weight={self.storage.name}/{self.block_size}"


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [*, in] -> [*, out]."""
        y = linear_from(input, self.dequantized_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedColumnParallelLinear(PackedLayer, ColumnParallelLinear):
    """`ColumnParallelLinear` with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own."""
        return self.exit(linear_from(self.enter(x), self.dequantized_weight))


class PackedRowParallelLinear(PackedLayer, RowParallelLinear):
    """`RowParallelLinear` with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own."""
        return self.exit(linear_from(self.enter(x), self.dequantized_weight))


class PackedGroupedColumnParallelLinear(PackedLayer, GroupedColumnParallelLinear):
    """`GroupedColumnParallelLinear` with a packed weight."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """As the layer's own."""
        return grouped_linear_from(x, self.dequantized_weight, group_offsets(tokens_per_expert))


class PackedGroupedRowParallelLinear(PackedLayer, GroupedRowParallelLinear):
    """`GroupedRowParallelLinear` with a packed weight."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """As the layer's own."""
        return grouped_linear_from(x, self.dequantized_weight, group_offsets(tokens_per_expert))


# Exactly these classes: a subclass may use its weight in ways of its own.
PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    ColumnParallelLinear: PackedColumnParallelLinear,
    RowParallelLinear: PackedRowParallelLinear,
    GroupedColumnParallelLinear: PackedGroupedColumnParallelLinear,
    GroupedRowParallelLinear: PackedGroupedRowParallelLinear,
}


def _register() -> None:
    for cls, packed in PACKED_CLASSES.items():
        base = layer_type_of(cls.__new__(cls))  # looks at the class alone
        assert base is not None and issubclass(packed, nn.Module)
        register_layer_type(packed, replace(base, weight=lambda module: module.dequantized_weight()))


_register()
