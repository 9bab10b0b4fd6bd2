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
    layout_of_tensor,
    register_layer_type,
    set_layout,
)
from meshpeft.quantization.blocks import Blocks
from meshpeft.quantization.formats import Packed, WeightFormat
from meshpeft.quantization.functional import grouped_linear_from, linear_from

__all__ = ["PACKED_CLASSES", "PRINCIPAL", "KeptFactors", "PackedLayer", "packed_form"]


class KeptFactors(NamedTuple):
    """A low-rank part that a packed layer keeps beside its codes, b @ a, local: `a` [.., r, in], `b` [.., out, r].

    In float32, the part of the largest singular values first.
    """

    a: Tensor
    b: Tensor


PRINCIPAL = ("weight_principal_a", "weight_principal_b")
"""The parameters that hold the principal part of a packed weight."""

_EXACT = ("weight_scale", *PRINCIPAL)


class PackedLayer(ShardedTensors):
    """What the packed layers share. Not constructed: see `pack_`.

    Attributes:
        weight_packed: [.., out, in * bits / 8] uint8; divided like the weight.
        weight_scale: [.., out, in / block_size] float32; divided like the weight, unless blocks straddle ranks.
        storage: the format.
        block_size: values of a row that share a scale.
        compute_dtype: type of the dequantised weight; follows `module.to(dtype)`, as the packed tensors do not.
        principal: the principal part of the weight, of which codes and scales hold the remainder: U sqrt(S) and
            sqrt(S) V^T. `None` where they hold all of it, or adapters took it over (`pissa_init`).
        residual: the best approximation of what packing lost, U S and V^T, if it was kept.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    storage: WeightFormat
    block_size: int
    compute_dtype: torch.dtype

    @property
    def principal(self) -> KeptFactors | None:
        """The factors of the principal part; `None` if there is none."""
        a, b = (self.__dict__["_parameters"].get(name) for name in PRINCIPAL)
        return None if a is None or b is None else KeptFactors(a, b)

    def forget_principal(self) -> None:
        """Give the principal part up: the weight is the remainder from now on."""
        assert isinstance(self, nn.Module)
        for name in PRINCIPAL:
            self._parameters.pop(name, None)

    @property
    def residual(self) -> KeptFactors | None:
        """The factors of what packing lost; `None` if they were not kept."""
        a, b = (self.__dict__["_buffers"].get(f"residual_{name}") for name in "ab")
        return None if a is None or b is None else KeptFactors(a, b)

    def forget_residual(self) -> None:
        """Free the factors of what packing lost."""
        assert isinstance(self, nn.Module)
        for name in ("residual_a", "residual_b"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def stored_tensors(self) -> list[Tensor]:
        """What the local weight is stored in: codes, scales, and the factors of a principal part."""
        return [self.weight_packed, self.weight_scale, *(self.principal or ())]

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """The local weight, made anew: [out, in], or [experts, out, in], in `compute_dtype`."""
        packed, principal = Packed(self.weight_packed, self.weight_scale), self.principal
        if principal is None:
            return self.blocks.unpack(packed, self.compute_dtype)
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        weight = self.blocks.unpack(packed, wide)
        a, b = (factor.to(wide) for factor in principal)
        return (weight.baddbmm_ if weight.dim() == 3 else weight.addmm_)(b, a).to(self.compute_dtype)

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
        assert isinstance(self, nn.Module)
        stored = {name: tensor.detach() for name in _EXACT if (tensor := self._parameters.get(name)) is not None}
        applied = super()._apply(fn, recurse)
        device = self.weight_packed.device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        for name, before in stored.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                # A cast of the model changes what it computes in, not how exactly its weights are stored.
                kept, layout = nn.Parameter(before.to(after.device), requires_grad=False), layout_of_tensor(after)
                assert layout is not None
                set_layout(kept, layout)
                setattr(self, name, kept)
        return applied

    def extra_repr(self) -> str:
        """The layer's own, and how it is stored."""
        own = super().extra_repr()  # type: ignore[misc]  # nn.Module's: the mixin stands before it
        principal = self.principal
        beside = "" if principal is None else f" + rank {principal.a.shape[-2]}"
        return f"{own}, weight={self.storage.name}/{self.block_size}{beside}"


def packed_form(layer: nn.Module) -> PackedLayer | None:
    """Return the packed form of a layer's weight, as the layer's type states it; `None` for other weights."""
    layer_type = layer_type_of(layer)
    form: PackedLayer | None = None if layer_type is None else layer_type.packed(layer)
    return form


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
        register_layer_type(
            packed, replace(base, weight=lambda module: module.dequantized_weight(), packed=lambda module: module)
        )


_register()
