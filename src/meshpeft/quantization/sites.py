"""Where adapters are on a model, as the initialisations from weights see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshpeft.parallel import LinearLayout, TensorLayout, layout_of, layout_of_tensor
from meshpeft.peft import (
    AdapterWrapper,
    DoRALinear,
    LoRALinear,
    LoRALinearSplitFC1UpGate,
    LoRALinearSplitQKV,
    LoRATopKRouter,
    LowRankAdapter,
    NamedLoRALinear,
    adapter_wrappers,
)
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.full_matrices import local_factors
from meshpeft.quantization.svd import LowRank

__all__ = ["AdapterSite", "adapter_sites"]


@dataclass(frozen=True)
class AdapterSite:
    """One pair of factors on one layer, all of its rows or those of one part.

    Attributes:
        name: of the layer.
        wrapper: the adapted layer.
        adapter: holds the factors.
        part: number of the part in the layer's packing; `None` for the whole layer.
    """

    name: str
    wrapper: AdapterWrapper
    adapter: LowRankAdapter
    part: int | None = None

    @property
    def base(self) -> nn.Module:
        """The layer."""
        return self.wrapper.to_wrap

    @property
    def layout(self) -> LinearLayout:
        """Of the layer."""
        return layout_of(self.base)

    def rows_of(self, full: Tensor) -> Tensor:
        """The adapter's rows of a full matrix [.., out, n] in canonical order."""
        packing = self.layout.packing
        if self.part is None or packing is None:
            return full
        return full.split(list(packing.sizes), -2)[self.part]

    @torch.no_grad()
    def set_factors(self, part: LowRank) -> None:
        """Make the adapter's product s B A equal `part.left @ part.right`, given as full matrices."""
        a, b = self.adapter.linear_in.weight, self.adapter.linear_out.weight
        local_a, local_b = local_factors(part, self._layout(a), self._layout(b), self.layout)
        a.copy_(local_a)
        b.copy_(local_b / self.adapter.scale)

    @torch.no_grad()
    def set_zero(self) -> None:
        """Make both factors zero."""
        self.adapter.linear_in.weight.zero_()
        self.adapter.linear_out.weight.zero_()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Let a DoRA adapter's magnitude be the norms of its rows now, so that it multiplies by W + s B A."""
        if isinstance(self.wrapper, DoRALinear):
            magnitude = self.wrapper.adapter.weight_magnitude
            magnitude.copy_(self.wrapper._get_weight_norm())

    @torch.no_grad()
    def subtract_from(self, weight: Tensor) -> None:
        """Weight - s B A in place, of the adapter's rows; computed in float32 or wider, rounded once."""
        layout = self.layout
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.adapter.linear_in.weight.to(wide), self.adapter.linear_out.weight.to(wide)
        product = (b @ a).mul_(self.adapter.scale)
        if self.part is None or layout.packing is None:
            weight.copy_(weight.to(wide) - product)
            return
        parts = layout.weight().split_parts(weight.detach().to(wide))
        parts[self.part] = parts[self.part] - product
        weight.copy_(layout.weight().join_parts(parts))

    def _layout(self, factor: Tensor) -> TensorLayout:
        layout = layout_of_tensor(factor)
        if layout is None:
            raise QuantizationError(f"{self.name}: a factor of its adapter has lost its layout")
        if (self.layout.experts is not None) != (len(layout.global_shape) == 3):
            raise QuantizationError(
                f"{self.name}: the experts share one adapter, but each weight lost something else by quantising; use "
                "share_expert_adapters=False"
            )
        return layout


def adapter_sites(
    model: nn.Module, adapter_name: str | None = None, layers: Mapping[str, AdapterWrapper] | None = None
) -> Iterator[AdapterSite]:
    """Every adapter that can start from weights; routers are left alone.

    Args:
        model: with adapters.
        adapter_name: of the adapters, on layers where they have names; `None` where each layer has one only.
        layers: some adapted layers by name; `None` means all of the model's.

    Raises:
        QuantizationError: there is none; a layer has several adapters and `adapter_name` does not choose.
    """
    found = False
    for name, wrapper in dict(adapter_wrappers(model) if layers is None else layers).items():
        for adapter, part in _adapters_of(name, wrapper, adapter_name):
            found = True
            yield AdapterSite(name, wrapper, adapter, part)
    if not found:
        raise QuantizationError("the model has no adapter to start from its weights; apply one first")


def _adapters_of(
    name: str, wrapper: AdapterWrapper, adapter_name: str | None
) -> Iterator[tuple[LowRankAdapter, int | None]]:
    if isinstance(wrapper, LoRATopKRouter):
        return
    if isinstance(wrapper, NamedLoRALinear):
        named = dict(wrapper.named_adapters())
        if adapter_name is None and len(named) > 1:
            raise QuantizationError(f"{name} has the adapters {', '.join(named)}: say which one by adapter_name")
        for own_name, adapter in named.items():
            if adapter_name in (None, own_name):
                yield adapter, None
    elif isinstance(wrapper, (LoRALinearSplitQKV, LoRALinearSplitFC1UpGate)):
        packing = layout_of(wrapper.to_wrap).packing
        assert packing is not None
        for part, adapter in wrapper.adapters().items():
            yield adapter, packing.names.index(part)
    elif isinstance(wrapper, (LoRALinear, DoRALinear)):
        yield wrapper.adapter, None
    else:
        raise QuantizationError(f"{name}: a {type(wrapper).__name__} cannot start from its layer's weight")
