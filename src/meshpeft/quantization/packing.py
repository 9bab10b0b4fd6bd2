"""Packing one layer in place, and unpacking it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from meshpeft.parallel import layout_of, set_layout
from meshpeft.quantization.blocks import Blocks
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import FormatName, weight_format
from meshpeft.quantization.layers import PACKED_CLASSES, PRINCIPAL, KeptFactors, PackedLayer, packed_form

__all__ = ["can_be_packed", "check_has_values", "check_packable", "pack_", "unpack_"]


def can_be_packed(module: nn.Module) -> bool:
    """Whether `pack_` takes this module."""
    return type(module) in PACKED_CLASSES


def check_packable(layer: nn.Module, format_name: FormatName, block_size: int, name: str) -> nn.Parameter:
    """The layer's weight, if `pack_` takes it once it holds values; raises what `pack_` raises otherwise."""
    weight = layer.weight if can_be_packed(layer) else None
    if not isinstance(weight, nn.Parameter):
        raise QuantizationError(f"{name}: a {type(layer).__name__} cannot be packed")
    _blocks_of(layer, format_name, block_size).check(name)
    return weight


def check_has_values(layer: nn.Module, name: str) -> None:
    """Raise what `pack_` raises where the layer's weight is on the meta device; its bias may be read later."""
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
        layer: of a class in `PACKED_CLASSES`.
        format_name: `nf4 int8 int4 fp8`.
        block_size: consecutive values of a row that share a scale.
        name: of the layer, for messages.
        principal: a low-rank part of the weight, local, which the layer keeps as it is; the remainder is packed.
        with_residual: return what packing lost.

    Returns:
        The local residual, W - dequantised W, [.., out, in] float32, if asked for.

    Raises:
        QuantizationError: rows do not divide into blocks; the layer is of another class, or holds no values yet.
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
    """The inverse of `pack_`, but for what packing lost: the layer's own class, with the dequantised weight, frozen."""
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
