"""Linear layers whose weight is packed: the layer's own class, with another storage.

`pack_` turns a layer into one of these in place, so that whoever holds the layer holds the packed one. Its weight is
frozen: no gradient, no weight decay. The layers enter the registry with their base class's entry, except that `weight`
dequantises and `packed` gives the packed form: adapters, checkpoints and whatever else reads a layout need not know
the storage. States as for any linear, see `parallel/linear.py`.

What happens to an adapter on a packed (NF4) base:

* Its layout, initial values, gradient sums, checkpoint entries and export are those on the base class: they follow from
  the layout, which has no storage. Its type is `compute_dtype`, that of the dequantised weight, unless the method names
  another.
* A fused adapter skips the `forward` of the packed layer. The wrapper runs the layer's `enter`; the products of W and
  of the adapter, in one function (such as `fused_dora`, `peft/fused.py`), or in two with dropout of the adapter's
  output; and the layer's `exit`. W comes from `AdapterWrapper.weight_source()`, which dequantises. A standalone
  adapter calls the `forward`, and is added to its output.
* Either way W is dequantised in the forward pass and again in the backward pass, and nothing keeps it in between. DoRA
  dequantises it once more when it computes its row norms, and standalone with dropout calls the `forward` twice.
* Merging is refused. `dequantize_base` (`quantization/quantize.py`) makes the layers ordinary ones, into which the
  adapter can be merged.

PyTorch's own `linear` would keep the dequantised weight for the input gradient, which would cost the memory that
packing saved: so every product here is `meshpeft.peft.fused.product`, with a function for W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from meshpeft.engines.replicated_layers import CopiedHeadsLinear, SharedKeyLinear
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
from meshpeft.parallel.sharded_base import gathered
from meshpeft.peft.fused import product
from meshpeft.quantization.blocks import Blocks
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import FormatName, Packed, WeightFormat, weight_format

__all__ = [
    "KeptFactors",
    "PACKED_CLASSES",
    "PRINCIPAL",
    "PackedLayer",
    "can_be_packed",
    "check_has_values",
    "check_packable",
    "pack_",
    "packed_form",
    "unpack_",
]


class KeptFactors(NamedTuple):
    """Low-rank part b @ a that a packed layer keeps in addition to its codes, local: `a` [.., r, in], `b` [.., out, r].

    In float32, the part of the largest singular values first.
    """

    a: Tensor
    b: Tensor


PRINCIPAL = ("weight_principal_a", "weight_principal_b")
"""Names of the parameters that hold the principal part of a packed weight."""

_EXACT = ("weight_scale", *PRINCIPAL)


class PackedLayer(ShardedTensors):
    """Base of the packed layers. Not constructed: see `pack_`.

    Attributes:
        weight_packed: [.., out, in * bits / 8] uint8; sharded like the weight.
        weight_scale: [.., out, in / block_size] float32; sharded like the weight, unless blocks straddle ranks.
        storage: Format.
        block_size: Values of a row that share a scale.
        compute_dtype: Dtype of the dequantised weight; follows `module.to(dtype)`, as the packed tensors do not.
        principal: Principal part of the weight, of which codes and scales hold the remainder: U sqrt(S) and
            sqrt(S) Vᵀ. `None` where they hold all of it, or it was moved to adapters (`pissa_init`).
        residual: Best approximation of what packing lost, U S and Vᵀ, if it was kept.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    storage: WeightFormat
    block_size: int
    compute_dtype: torch.dtype

    @property
    def principal(self) -> KeptFactors | None:
        """Factors of the principal part; `None` if there is none."""
        a, b = (self.__dict__["_parameters"].get(name) for name in PRINCIPAL)
        return None if a is None or b is None else KeptFactors(a, b)

    def forget_principal(self) -> None:
        """Drop the principal part: the weight is the remainder from now on."""
        assert isinstance(self, nn.Module)
        for name in PRINCIPAL:
            self._parameters.pop(name, None)

    @property
    def residual(self) -> KeptFactors | None:
        """Factors of what packing lost; `None` if they were not kept."""
        a, b = (self.__dict__["_buffers"].get(f"residual_{name}") for name in "ab")
        return None if a is None or b is None else KeptFactors(a, b)

    def forget_residual(self) -> None:
        """Free the factors of what packing lost."""
        assert isinstance(self, nn.Module)
        for name in ("residual_a", "residual_b"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def stored_tensors(self) -> list[Tensor]:
        """Return the tensors that store the local weight: codes, scales, and the factors of a principal part."""
        return [self.weight_packed, self.weight_scale, *(self.principal or ())]

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """Dequantise the local weight: [out, in], or [experts, out, in], in `compute_dtype`."""
        # Under `lift_float32` a mode of torch's turns float32 into float64. The kernels that unpack are given raw
        # pointers, and need the types that are stated here.
        with torch._C.DisableTorchFunction():
            packed, principal = Packed(gathered(self.weight_packed), gathered(self.weight_scale)), self.principal
            if principal is None:
                return self.blocks.unpack(packed, self.compute_dtype)
            wide = torch.promote_types(self.compute_dtype, torch.float32)
            weight = self.blocks.unpack(packed, wide)
            a, b = (factor.to(wide) for factor in principal)
            return (weight.baddbmm_ if weight.dim() == 3 else weight.addmm_)(b, a).to(self.compute_dtype)

    @property
    def blocks(self) -> Blocks:
        """Blocks of the weight, and this rank's share of them."""
        assert isinstance(self, nn.Module)
        return Blocks(self.storage, self.block_size, layout_of(self))

    @property
    def master_weight(self) -> Tensor:
        """Full dequantised weight, on every rank. A collective; no gradient."""
        assert isinstance(self, nn.Module)
        return layout_of(self).weight().gather(self.dequantized_weight())

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            # Not a property: code that reads a weight in passing would dequantise it unintentionally.
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
        """Return the layer's own, and the format."""
        own = super().extra_repr()  # type: ignore[misc]  # nn.Module's: the mixin stands before it
        principal = self.principal
        part = "" if principal is None else f" + rank {principal.a.shape[-2]}"
        return f"{own}, weight={self.storage.name}/{self.block_size}{part}"


def packed_form(layer: nn.Module) -> PackedLayer | None:
    """Return the packed form of a layer's weight, as the layer's type states it; `None` for other weights."""
    layer_type = layer_type_of(layer)
    form: PackedLayer | None = None if layer_type is None else layer_type.packed(layer)
    return form


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """input [*, in] -> [*, out]."""
        y = product(input, self.dequantized_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedSharedKeyLinear(PackedLayer, SharedKeyLinear):
    """`SharedKeyLinear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """input [*, in] -> [*, out], in the states of the layer's own forward."""
        return self.exit(product(input, self.dequantized_weight))


class PackedCopiedHeadsLinear(PackedLayer, CopiedHeadsLinear):
    """`CopiedHeadsLinear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """input [*, in] -> [*, head_dim], in the states of the layer's own forward."""
        return self.exit(product(input, self.dequantized_weight))


class PackedColumnParallelLinear(PackedLayer, ColumnParallelLinear):
    """`ColumnParallelLinear` with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x -> y, in the states of the layer's own forward."""
        return self.exit(product(self.enter(x), self.dequantized_weight))


class PackedRowParallelLinear(PackedLayer, RowParallelLinear):
    """`RowParallelLinear` with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x -> y, in the states of the layer's own forward."""
        return self.exit(product(self.enter(x), self.dequantized_weight))


class PackedGroupedColumnParallelLinear(PackedLayer, GroupedColumnParallelLinear):
    """`GroupedColumnParallelLinear` with a packed weight."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, in], tokens_per_expert [local experts] -> [tokens, out], in the layer's own states."""
        return product(x, self.dequantized_weight, group_offsets(tokens_per_expert))


class PackedGroupedRowParallelLinear(PackedLayer, GroupedRowParallelLinear):
    """`GroupedRowParallelLinear` with a packed weight."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [tokens, in], tokens_per_expert [local experts] -> [tokens, out], in the layer's own states."""
        return product(x, self.dequantized_weight, group_offsets(tokens_per_expert))


# Exactly these classes: a subclass may use its weight in ways of its own.
PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    SharedKeyLinear: PackedSharedKeyLinear,
    CopiedHeadsLinear: PackedCopiedHeadsLinear,
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


def can_be_packed(module: nn.Module) -> bool:
    """Whether `pack_` accepts this module."""
    return type(module) in PACKED_CLASSES


def check_packable(layer: nn.Module, format_name: FormatName, block_size: int, name: str) -> nn.Parameter:
    """Check that `pack_` accepts the layer once it holds values, and return its weight; errors as in `pack_`."""
    weight = layer.weight if can_be_packed(layer) else None
    if not isinstance(weight, nn.Parameter):
        raise QuantizationError(f"{name}: a {type(layer).__name__} cannot be packed")
    _blocks_of(layer, format_name, block_size).check(name)
    return weight


def check_has_values(layer: nn.Module, name: str) -> None:
    """Check that the layer's weight is not on the meta device; its bias may be read later."""
    weight: Any = layer.weight
    if weight.is_meta:
        raise QuantizationError(f"{name} holds no values yet: load the model before packing it")


@torch.no_grad()
def pack_(
    layer: nn.Module,
    format_name: FormatName,
    block_size: int = 64,
    name: str = "",
    *,
    principal: KeptFactors | None = None,
    with_residual: bool = False,
) -> Tensor | None:
    """Pack a layer's weight, in place; it is frozen from then on. A collective where blocks straddle ranks.

    Args:
        layer: Layer of a class in `PACKED_CLASSES`.
        format_name: `nf4 int8 int4 fp8`.
        block_size: Consecutive values of a row that share a scale.
        name: Name of the layer, for messages.
        principal: Low-rank part of the weight, local, which the layer keeps as it is; the remainder is packed.
        with_residual: Return what packing lost.

    Returns:
        The local residual, W - dequantised W, [.., out, in] float32, if asked for.

    Raises:
        QuantizationError: Rows do not divide into blocks; the layer is of another class, or holds no values yet.
    """
    name = name or type(layer).__name__
    weight = check_packable(layer, format_name, block_size, name)
    check_has_values(layer, name)
    blocks = _blocks_of(layer, format_name, block_size)
    packed = blocks.pack(weight, principal)

    others = dict(layer._parameters)
    del others["weight"]
    layer._parameters.clear()
    layer.__class__ = PACKED_CLASSES[type(layer)]  # type: ignore[assignment]  # a subclass of the layer's own
    form = cast(PackedLayer, layer)
    form.storage, form.block_size, form.compute_dtype = blocks.storage, block_size, weight.dtype
    parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in packed]
    for parameter, its_layout in zip(parameters, (blocks.codes(), blocks.scales()), strict=True):
        set_layout(parameter, its_layout)
    # First: who asks for a layer's first parameter means its weight.
    form.weight_packed, form.weight_scale = parameters
    if principal is not None:
        rank, layout = principal.a.shape[-2], layout_of(layer)
        for key, factor, its_layout in zip(
            PRINCIPAL, principal, (layout.factor_a(rank), layout.factor_b(rank)), strict=True
        ):
            parameter = nn.Parameter(factor, requires_grad=False)
            set_layout(parameter, replace(its_layout, counts_as=0, grad_partial=()))
            layer.register_parameter(key, parameter)
    layer._parameters.update(others)
    if not with_residual:
        return None
    wide = torch.promote_types(form.compute_dtype, torch.float32)
    return (weight.detach().to(wide) - form.dequantized_weight().to(wide)).float()


@torch.no_grad()
def unpack_(layer: nn.Module) -> None:
    """Undo `pack_`, except for what packing lost: the layer's own class, with the dequantised weight, frozen."""
    form = packed_form(layer)
    assert form is not None
    weight = nn.Parameter(form.dequantized_weight(), requires_grad=False)
    layout = getattr(layer, "layout", None)
    others = {name: tensor for name, tensor in layer._parameters.items() if not name.startswith("weight_")}
    form.forget_residual()
    layer._parameters.clear()
    (own_class,) = (cls for cls, packed in PACKED_CLASSES.items() if packed is type(form))
    layer.__class__ = own_class
    for attribute in ("storage", "block_size", "compute_dtype"):
        delattr(layer, attribute)
    if layout is not None:
        set_layout(weight, layout.weight())
    layer.weight = weight
    layer._parameters.update(others)


def _blocks_of(layer: nn.Module, format_name: FormatName, block_size: int) -> Blocks:
    return Blocks(weight_format(format_name, block_size), block_size, layout_of(layer))
