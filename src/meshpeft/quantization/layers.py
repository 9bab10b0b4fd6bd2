"""Linear layers whose weight is packed: the layer's own class, with another storage.

`pack_` turns a layer into one of these in place, so that whoever holds the layer holds the packed one. The layers
enter the registry with their base class's entry, but for `weight`, which dequantises: adapters, checkpoints and
everything else that reads a layout need not know that the weight is packed.
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
    Packing,
    RowParallelLinear,
    ShardedTensors,
    TensorLayout,
    group_offsets,
    layer_type_of,
    layout_of,
    on_each_rank,
    register_layer_type,
    set_layout,
)
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import BLOCK_SIZES, FormatName, Packed, WeightFormat, weight_format
from meshpeft.quantization.functional import grouped_linear_from, linear_from

__all__ = ["PackedLayer", "ResidualFactors", "can_be_packed", "check_packable", "pack_"]


class ResidualFactors(NamedTuple):
    """The best low-rank part of W - dequantised W, local: `a` [.., r, in] (V^T), `b` [.., out, r] (U S), float32."""

    a: Tensor
    b: Tensor


class PackedLayer(ShardedTensors):
    """What the packed layers share. Not constructed: see `pack_`.

    Attributes:
        weight_packed: [.., out, in * bits / 8] uint8; divided like the weight.
        weight_scale: [.., out, in / block_size] float32; divided like the weight.
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

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """The local weight, made anew: [out, in], or [experts, out, in], in `compute_dtype`."""
        return _unpack(self.storage, self.weight_packed, self.weight_scale, self.block_size, self.compute_dtype)

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
            set_layout(kept, self.weight_layouts()[1])
            self.weight_scale = kept
        return applied

    def weight_layouts(self) -> tuple[TensorLayout, TensorLayout]:
        """Of `weight_packed` and `weight_scale`."""
        assert isinstance(self, nn.Module)
        weight = layout_of(self).weight()
        return _columns_of(weight, self.storage.bits, 8), _columns_of(weight, 1, self.block_size)

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
_PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    ColumnParallelLinear: PackedColumnParallelLinear,
    RowParallelLinear: PackedRowParallelLinear,
    GroupedColumnParallelLinear: PackedGroupedColumnParallelLinear,
    GroupedRowParallelLinear: PackedGroupedRowParallelLinear,
}


def _register() -> None:
    for cls, packed in _PACKED_CLASSES.items():
        base = layer_type_of(cls.__new__(cls))  # looks at the class alone
        assert base is not None and issubclass(packed, nn.Module)
        register_layer_type(packed, replace(base, weight=lambda module: module.dequantized_weight()))


_register()


def can_be_packed(module: nn.Module) -> bool:
    """Whether `pack_` takes this module."""
    return type(module) in _PACKED_CLASSES


@torch.no_grad()
def pack_(
    layer: nn.Module, format_name: FormatName, block_size: int = 64, name: str = "", *, with_residual: bool = False
) -> Tensor | None:
    """Pack a layer's weight, in place; it is frozen from then on.

    Values are quantised from float32, so that what is stored does not depend on a wider type.

    Args:
        layer: of one of the classes above.
        format_name: `nf4 int8 int4 fp8`.
        block_size: consecutive values of a row that share a scale.
        name: of the layer, for messages.
        with_residual: return what packing lost.

    Returns:
        The local residual, W - dequantised W, [.., out, in] float32, if asked for.

    Raises:
        QuantizationError: blocks would straddle shards; the layer is of another class, or holds no values yet.
    """
    stored = weight_format(format_name, block_size)
    name = name or type(layer).__name__
    weight = check_packable(layer, block_size, name)
    if weight.is_meta:
        raise QuantizationError(f"{name} holds no values yet: load the model before packing it")
    values = weight.detach().float()
    packed = Packed(*_pack(stored, values, block_size))
    residual = values - _unpack(stored, *packed, block_size, torch.float32) if with_residual else None

    compute_dtype, others = weight.dtype, dict(layer._parameters)
    del others["weight"]
    layer._parameters.clear()
    layer.__class__ = _PACKED_CLASSES[type(layer)]  # type: ignore[assignment]  # a subclass of the layer's own
    assert isinstance(layer, PackedLayer)
    layer.storage, layer.block_size, layer.compute_dtype = stored, block_size, compute_dtype
    parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in packed]
    for parameter, its_layout in zip(parameters, layer.weight_layouts(), strict=True):
        set_layout(parameter, its_layout)
    # First: who asks for a layer's first parameter means its weight.
    layer.weight_packed, layer.weight_scale = parameters
    layer._parameters.update(others)
    return residual


def check_packable(layer: nn.Module, block_size: int, name: str) -> nn.Parameter:
    """The layer's weight, if `pack_` takes it once it holds values; raises what `pack_` raises otherwise."""
    weight = layer.weight if can_be_packed(layer) else None
    if not isinstance(weight, nn.Parameter):
        raise QuantizationError(f"{name}: a {type(layer).__name__} cannot be packed")
    _check_blocks(name, layout_of(layer).weight(), block_size)
    return weight


@on_each_rank
def _pack(stored: WeightFormat, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes, scales = stored.pack(values.contiguous(), block_size)
    return codes.contiguous(), scales.contiguous()


@on_each_rank
def _unpack(stored: WeightFormat, codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    # The libraries know no float64.
    made = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    return stored.unpack(Packed(codes, scales), block_size, made).to(dtype)


def _check_blocks(name: str, layout: TensorLayout, block_size: int) -> None:
    """No block reaches from one rank's columns into another's."""
    columns = layout.global_shape[-1]
    lengths = {layout.local_shape[-1]}
    packing = layout.packing if layout.packed_dim == len(layout.global_shape) - 1 else None
    shards = columns // layout.local_shape[-1]
    if packing is not None:
        lengths = set(packing.chunks(shards))
    if all(length % block_size == 0 for length in lengths):
        return
    fitting = [size for size in BLOCK_SIZES if all(length % size == 0 for length in lengths)]
    advice = f"use block_size={' or '.join(map(str, fitting))}" if fitting else "exclude the layer"
    held = " and ".join(map(str, sorted(lengths)))
    over = f" divided over {shards} ranks leave {held}, which" if shards > 1 else ""
    raise QuantizationError(
        f"{name}: {columns} input features{over} do not divide into blocks of {block_size}; {advice}. Scales may not "
        "straddle ranks, or the weights would depend on the layout"
    )


def _columns_of(layout: TensorLayout, numerator: int, denominator: int) -> TensorLayout:
    """The layout of a tensor that has numerator / denominator as many columns."""

    def scaled(size: int) -> int:
        return size * numerator // denominator

    *rows, columns = layout.global_shape
    packing = layout.packing
    if packing is not None and layout.packed_dim == len(rows):
        packing = Packing(packing.names, tuple(map(scaled, packing.sizes)), packing.blocks)
    return replace(layout, global_shape=(*rows, scaled(columns)), packing=packing, grad_partial=())
