"""Where adapters are on a model, as the initialisations from weights see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from meshpeft.parallel import LayerType, LinearLayout, TensorLayout, layer_type_of, layout_of, layout_of_tensor
from meshpeft.peft import AdapterTerm, AdapterWrapper, LowRankAdapter, adapter_wrappers
from meshpeft.peft.wrapper import stored_weight_of
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.full_matrices import gathered_factors, local_factors
from meshpeft.quantization.layers import KeptFactors, PackedLayer, packed_form
from meshpeft.quantization.svd import LowRank

__all__ = ["AdapterSite", "adapter_sites", "check_start", "check_unshared", "residual_of", "widened"]


@dataclass(frozen=True)
class AdapterSite:
    """One pair of factors on one layer, all of its rows or those of one part.

    Attributes:
        name: Name of the layer.
        wrapper: Adapted layer.
        term: Factors on it, and the part that they adapt.
    """

    name: str
    wrapper: AdapterWrapper
    term: AdapterTerm

    @property
    def adapter(self) -> LowRankAdapter:
        """Module that holds the factors."""
        return self.term.adapter

    @property
    def base(self) -> nn.Module:
        """The layer."""
        return self.wrapper.to_wrap

    @property
    def packed(self) -> PackedLayer | None:
        """Packed form of the layer's weight; `None` if it is not packed."""
        return packed_form(self.base)

    @property
    def layout(self) -> LinearLayout:
        """Layout of the layer."""
        return layout_of(self.base)

    @property
    def part(self) -> int | None:
        """Index of the adapted part among the layer's fused parts; `None` for the full layer."""
        fused_parts = self.layout.fused_parts
        return None if fused_parts is None or self.term.part is None else fused_parts.names.index(self.term.part)

    def rows_of(self, full: Tensor) -> Tensor:
        """The adapter's rows of a full matrix [.., out, n] in canonical order."""
        fused_parts = self.layout.fused_parts
        if self.part is None or fused_parts is None:
            return full
        return full.split(list(fused_parts.sizes), -2)[self.part]

    def leading(self, kept: KeptFactors) -> LowRank:
        """The adapter's rows, and as many columns as its rank, of a part that the layer keeps; full matrices."""
        full, rank = gathered_factors(kept.a, kept.b, self.layout), self.adapter.dim
        return LowRank(self.rows_of(full.left)[..., :rank], full.right[..., :rank, :])

    @torch.no_grad()
    def set_factors(self, part: LowRank, *, keep_start: bool = False) -> None:
        """Make the adapter's product s B A equal `part.left @ part.right`, given as full matrices.

        Args:
            part: of the adapter's rank.
            keep_start: the base's weight gives this part up, unrounded.
        """
        factors = (self.adapter.linear_in, self.adapter.linear_out)
        layout_a, layout_b = (self._layout(factor.weight) for factor in factors)
        a, b = local_factors(part, layout_a, layout_b, self.layout)
        for factor, values in zip(factors, (a, b / self.adapter.scale), strict=True):
            factor.weight.copy_(values)
            if keep_start:
                factor.keep_start(values)

    @torch.no_grad()
    def clear(self, kept: KeptFactors) -> None:
        """Make zero what `leading` gave, in the layer's own factors."""
        layout = self.layout.factor_b(kept.b.shape[-1])
        rows = kept.b if self.part is None else layout.part_views(kept.b.detach())[self.part]
        rows.detach()[..., : self.adapter.dim].zero_()

    @torch.no_grad()
    def set_zero(self) -> None:
        """Make both factors zero."""
        self.adapter.linear_in.weight.zero_()
        self.adapter.linear_out.weight.zero_()

    @torch.no_grad()
    def subtract_from(self, weight: Tensor) -> None:
        """Weight - s B A in place, of the adapter's rows; computed in float64, rounded once."""
        a, b = self.adapter.linear_in.weight, self.adapter.linear_out.weight
        product = (b.double() @ a.double()).mul_(self.adapter.scale)
        rows = weight.detach() if self.part is None else self.layout.weight().part_views(weight.detach())[self.part]
        rows.sub_(product.reshape(rows.shape))

    def check(self, method: Literal["svdquant", "pissa"]) -> None:
        """Whether the adapter can start by this method.

        Raises:
            QuantizationError: the experts share one adapter; see `check_start`.
        """
        for factor in (self.adapter.linear_in, self.adapter.linear_out):
            self._layout(factor.weight)
        check_start(method, self.base, self.adapter.dim, self.name)

    def _layout(self, factor: Tensor) -> TensorLayout:
        layout = layout_of_tensor(factor)
        if layout is None:
            raise QuantizationError(f"{self.name}: a factor of its adapter has lost its layout")
        if self.layout.is_stacked != layout.is_stacked:
            raise QuantizationError(
                f"{self.name}: the experts share one adapter, but each has a weight of its own to start it; use "
                "share_expert_adapters=False"
            )
        return layout


def adapter_sites(
    model: nn.Module | list[nn.Module],
    adapter_name: str | None = None,
    layers: Sequence[tuple[str, AdapterWrapper]] | None = None,
) -> Iterator[AdapterSite]:
    """Every adapter that can start from weights; routers are left alone.

    Args:
        model: with adapters; or a list of its chunks.
        adapter_name: of the adapters, on layers where they have names; `None` where each layer has one only.
        layers: some adapted layers with their names; `None` means all of the model's.

    Raises:
        QuantizationError: there is none; a layer has several adapters and `adapter_name` does not choose.
    """
    found = False
    for name, wrapper in adapter_wrappers(model) if layers is None else layers:
        for term in _terms_of(name, wrapper, adapter_name):
            found = True
            yield AdapterSite(name, wrapper, term)
    if not found:
        raise QuantizationError("the model has no adapter to start from its weights; apply one first")


def _terms_of(name: str, wrapper: AdapterWrapper, adapter_name: str | None) -> list[AdapterTerm]:
    if not wrapper.starts_from_weight:
        return []
    terms = wrapper.terms()
    if not terms:
        raise QuantizationError(f"{name}: a {type(wrapper).__name__} cannot start from its layer's weight")
    names = [term.name for term in terms if term.name is not None]
    if adapter_name is None and len(names) > 1:
        raise QuantizationError(f"{name} has the adapters {', '.join(names)}: say which one by adapter_name")
    return [term for term in terms if adapter_name is None or term.name in (None, adapter_name)]


def check_start(method: Literal["svdquant", "pissa"], layer: nn.Module, rank: int, name: str) -> None:
    """Whether an adapter of this rank on a layer can start by this method.

    Raises:
        QuantizationError: see `svdquant_init` and `pissa_init`.
    """
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        raise QuantizationError(f"{name} holds no values yet: load the model before its adapters start from them")
    packed = packed_form(layer)
    if packed is not None:
        kept = packed.residual if method == "svdquant" else packed.principal
        what, option = ("residual", "residual_rank") if method == "svdquant" else ("principal part", "principal_rank")
        kept_rank = 0 if kept is None else kept.a.shape[-2]
        if kept_rank < rank:
            state = f"kept a {what} of rank {kept_rank} only" if kept_rank else f"kept no {what}"
            raise QuantizationError(
                f"{name}: its packed weight {state}, and the adapter has rank {rank}; pack the model with "
                f"quantize_base(.., {option}={rank})"
            )
    elif method == "pissa" and _layer_type(layer).unrounded(layer) is not None:
        raise QuantizationError(
            f"{name}: pissa takes its part out of the weight, which is quantised already; call pissa_init before "
            "quantising"
        )
    elif method == "pissa" and stored_weight_of(layer) is None:
        raise QuantizationError(
            f"{name}: pissa takes its part out of the weight, which a {type(layer).__name__} of this kind stores in "
            "another form than it uses; let the adapter start otherwise"
        )


def check_unshared(model: list[nn.Module], layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Whether no other layer would change with the weights of these, which `pissa_init` changes.

    Args:
        model: its chunks.
        layers: with their names; packed ones have no weight to share.

    Raises:
        QuantizationError: a weight belongs to another layer too.
    """
    owners = Counter(id(own) for chunk in model for _, own in chunk.named_parameters(remove_duplicate=False))
    for name, layer in layers:
        if packed_form(layer) is None and owners[id(layer.weight)] > 1:
            raise QuantizationError(f"{name}: its weight is shared with another layer, which pissa would change")


def residual_of(layer: nn.Module) -> Tensor | None:
    """Return W - quant(W), local, of a layer that is not packed; `None` where nothing quantises its weight."""
    layer_type = _layer_type(layer)
    exact = layer_type.unrounded(layer)
    return None if exact is None else widened(exact.detach()) - widened(layer_type.weight(layer).detach())


def _layer_type(layer: nn.Module) -> LayerType:
    found = layer_type_of(layer)
    assert found is not None
    return found


def widened(tensor: Tensor) -> Tensor:
    """In float32, or its own wider type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
