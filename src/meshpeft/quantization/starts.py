"""Adapters that start from the weights: from what quantising lost (svdquant), or from the principal part (pissa)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meshpeft.parallel import LayerType, LinearLayout, TensorLayout, layer_type_of, layout_of, layout_of_tensor
from meshpeft.parallel.sharded_base import changed_in_place
from meshpeft.peft import AdapterTerm, AdapterWrapper, LowRankAdapter, adapter_wrappers, chunks_of
from meshpeft.peft.wrapper import stored_weight_of
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.layers import KeptFactors, PackedLayer, packed_form
from meshpeft.quantization.svd import LowRank, full_matrices, gathered_factors, local_factors, low_rank_part

__all__ = [
    "AdapterSite",
    "adapter_sites",
    "check_start",
    "check_unshared",
    "keep_starts",
    "pissa_init",
    "residual_of",
    "svdquant_init",
    "widened",
]


@dataclass(frozen=True)
class AdapterSite:
    """One pair of factors on one layer: on all of its rows, or on those of one part.

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
        """Return the adapter's rows of a full matrix [.., out, n] in canonical order."""
        fused_parts = self.layout.fused_parts
        if self.part is None or fused_parts is None:
            return full
        return full.split(list(fused_parts.sizes), -2)[self.part]

    def leading(self, kept: KeptFactors) -> LowRank:
        """Return the adapter's rows, and as many columns as its rank, of a part that the layer keeps; full matrices."""
        full, rank = gathered_factors(kept.a, kept.b, self.layout), self.adapter.dim
        return LowRank(self.rows_of(full.left)[..., :rank], full.right[..., :rank, :])

    @torch.no_grad()
    def set_factors(self, part: LowRank, *, keep_start: bool = False) -> None:
        """Make the adapter's product s B A equal `part.left @ part.right`, given as full matrices.

        Args:
            part: Low-rank part, of the adapter's rank.
            keep_start: Keep the part, unrounded, as what is moved from the base's weight.
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
        """Set to zero what `leading` returned, in the layer's own factors."""
        layout = self.layout.factor_b(kept.b.shape[-1])
        rows = kept.b if self.part is None else layout.part_views(kept.b.detach())[self.part]
        rows.detach()[..., : self.adapter.dim].zero_()

    @torch.no_grad()
    def set_zero(self) -> None:
        """Set both factors to zero."""
        self.adapter.linear_in.weight.zero_()
        self.adapter.linear_out.weight.zero_()

    @torch.no_grad()
    def subtract_from(self, weight: Tensor) -> None:
        """Subtract s B A from the adapter's rows of the weight, in place; computed in float64, rounded once."""
        a, b = self.adapter.linear_in.weight, self.adapter.linear_out.weight
        product = (b.double() @ a.double()).mul_(self.adapter.scale)
        with changed_in_place(weight) as values:
            rows = values if self.part is None else self.layout.weight().part_views(values)[self.part]
            rows.sub_(product.reshape(rows.shape))

    def check(self, method: Literal["svdquant", "pissa"]) -> None:
        """Check that the adapter can start by this method.

        Raises:
            QuantizationError: The experts share one adapter; see `check_start`.
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
    """Yield every adapter that can start from weights; routers are left alone.

    Args:
        model: Model with adapters; or list of its chunks.
        adapter_name: Name of the adapters, on layers where they have names; `None` where each layer has one only.
        layers: Some adapted layers with their names; `None` means all of the model's.

    Raises:
        QuantizationError: There is none; a layer has several adapters and `adapter_name` does not choose.
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
    """Check that an adapter of this rank on a layer can start by this method.

    Raises:
        QuantizationError: See `svdquant_init` and `pissa_init`.
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
    """Check that no other layer shares the weights of these, which `pissa_init` changes.

    Args:
        model: Chunks of the model.
        layers: Layers with their names; packed ones have no weight to share.

    Raises:
        QuantizationError: A weight belongs to another layer too.
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
    """Return the tensor in float32, or in its own wider dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Bytes of full matrices that wait to be decomposed together.
_WAITING_BYTES = 1 << 28


@torch.no_grad()
def svdquant_init(
    model: nn.Module | list[nn.Module],
    *,
    adapter_name: str | None = None,
    layers: Sequence[tuple[str, AdapterWrapper]] | None = None,
    exact: bool = False,
    power_iterations: int | None = None,
    oversampling: int = 16,
) -> None:
    """Start adapters from what quantising their layers' weights lost.

    With the rank-r singular value decomposition U S Vᵀ of W - quant(W): A = Vᵀ, B = U S / s, so that the adapter's
    s B A is the best rank-r approximation of the residual at any scale s. The full matrix is decomposed where it is
    sharded, and each expert's where they are stacked, so that it is the same at every layout. Layers packed by
    `quantize_base` no longer have W: their factors are those that `quantize_base(residual_rank=r)` kept.

    A layer that is not quantised gets zeros in both factors, and one warning names such layers.

    Args:
        model: Model with adapters (LoRA, Canonical LoRA, DoRA, or named ones) on quantised layers; or list of its
            chunks.
        adapter_name: Name of the adapter to start, where layers have several.
        layers: Adapted layers of the model, with their names; `None` means all.
        exact: Decompose in full, in float64. For layers packed with kept residuals see `quantize_base(exact_svd=..)`.
        power_iterations, oversampling: Options of the randomised decomposition, see `low_rank_part`.

    Raises:
        QuantizationError: A packed layer kept no residual, or one of a lower rank than the adapter's; experts that
            share an adapter; no adapter. Collectives over the axes that shard the weights.
    """
    options = {"exact": exact, "power_iterations": power_iterations, "oversampling": oversampling}
    sites = list(adapter_sites(model, adapter_name, layers))
    for site in sites:
        site.check("svdquant")
    waiting = _Waiting(options)
    unquantised = []
    for site in sites:
        if site.packed is not None:
            assert site.packed.residual is not None
            site.set_factors(site.leading(site.packed.residual))
            continue
        residual = residual_of(site.base)
        if residual is None:
            unquantised.append(site.name)
            site.set_zero()
        else:
            waiting.add(site, site.rows_of(full_matrices(residual, site.layout)))
    waiting.finish()
    for site in sites:
        site.wrapper.reset_magnitude()
    if unquantised:
        _warn_of_zeros(unquantised)


@torch.no_grad()
def pissa_init(
    model: nn.Module | list[nn.Module],
    *,
    adapter_name: str | None = None,
    layers: Sequence[tuple[str, AdapterWrapper]] | None = None,
    exact: bool = False,
    power_iterations: int | None = None,
    oversampling: int = 16,
) -> None:
    """Move the principal part of the layers' weights to their adapters (PiSSA, Meng et al. 2024).

    With the rank-r decomposition U S Vᵀ of W: A = sqrt(S) Vᵀ, B = U sqrt(S) / s, and W becomes W - s B A, so that
    the model computes what it did. Its base is no longer the one that was loaded; the adapter keeps the factors of the
    part that was taken, so that it is exported (at twice its rank) as the change of the base as it was.

    A packed layer no longer has W: its adapter takes over the principal part that `quantize_base(principal_rank=r)`
    kept in addition to the remainder's codes (QPiSSA). The adapter is then a change of the base that is packed so.

    Args:
        model: Model with adapters on layers whose weights are stored as they are used, or packed with a principal part;
            or list of its chunks.
        adapter_name, layers, exact, power_iterations, oversampling: As in `svdquant_init`; for the principal parts of
            packed layers see `quantize_base(exact_svd=..)`.

    Raises:
        QuantizationError: A quantised weight kept no principal part, or one of a lower rank than the adapter's; a
            weight is shared with another layer; experts that share an adapter. Nothing is changed then.
    """
    # In float64, so that a run that goes on elsewhere takes the same part out of the weights.
    options: dict[str, Any] = {"exact": exact, "power_iterations": power_iterations, "oversampling": oversampling}
    options["dtype"] = torch.float64
    sites = list(adapter_sites(model, adapter_name, layers))
    for site in sites:
        site.check("pissa")
    check_unshared(chunks_of(model), [(site.name, site.base) for site in sites])
    waiting = _Waiting(options, balanced=True)
    for site in sites:
        if site.packed is not None:
            assert site.packed.principal is not None
            site.set_factors(site.leading(site.packed.principal), keep_start=True)
        else:
            waiting.add(site, site.rows_of(full_matrices(widened(_stored(site)), site.layout)))
    waiting.finish()
    _give_up([site for site in sites if site.packed is not None])
    for site in sites:
        if site.packed is None:
            site.subtract_from(_stored(site))
            site.adapter.keep_start()
        site.wrapper.reset_magnitude()


def _give_up(sites: list[AdapterSite]) -> None:
    """Remove from packed layers what was moved to their adapters; the principal part itself, if all of it was."""
    by_layer: dict[int, list[AdapterSite]] = {}
    for site in sites:
        by_layer.setdefault(id(site.base), []).append(site)
    for own in by_layer.values():
        packed = own[0].packed
        assert packed is not None and packed.principal is not None
        fused_parts, rank = own[0].layout.fused_parts, packed.principal.a.shape[-2]
        for site in own:
            site.clear(packed.principal)
        rows = {site.part for site in own if site.adapter.dim == rank}
        if None in rows or (fused_parts is not None and len(rows) == len(fused_parts.names)):
            packed.forget_principal()


def keep_starts(model: nn.Module) -> None:
    """Prepare adapters for loading what `pissa_init` kept in a checkpoint.

    Raises:
        QuantizationError: The model has no adapter.
    """
    for site in adapter_sites(model):
        site.adapter.keep_start()


class _Waiting:
    """Full matrices that wait to be decomposed: those of one shape and rank together."""

    def __init__(self, options: Mapping[str, Any], balanced: bool = False) -> None:
        self._options, self._balanced = options, balanced
        self._groups: dict[tuple[object, ...], list[tuple[AdapterSite, Tensor]]] = {}
        self._bytes = 0

    def add(self, site: AdapterSite, matrices: Tensor) -> None:
        """Add the matrices of one adapter, [out, in] or [experts, out, in]."""
        key = (*matrices.shape[-2:], matrices.dtype, matrices.device, site.adapter.dim)
        self._groups.setdefault(key, []).append((site, matrices))
        self._bytes += matrices.nbytes
        if self._bytes > _WAITING_BYTES:
            self.finish()

    def finish(self) -> None:
        """Decompose everything that waits, and set the adapters."""
        for group in self._groups.values():
            self._set([site for site, _ in group], [matrices for _, matrices in group])
        self._groups, self._bytes = {}, 0

    def _set(self, sites: list[AdapterSite], matrices: list[Tensor]) -> None:
        shapes = [each.shape[:-2] for each in matrices]
        stacked = torch.cat([each.reshape(-1, *each.shape[-2:]) for each in matrices])
        part = low_rank_part(stacked, sites[0].adapter.dim, **self._options)
        if self._balanced:
            part = part.balanced()
        counts = [shape.numel() for shape in shapes]
        for site, shape, left, right in zip(
            sites, shapes, part.left.split(counts), part.right.split(counts), strict=True
        ):
            site.set_factors(LowRank(left.reshape(*shape, *left.shape[1:]), right.reshape(*shape, *right.shape[1:])))


def _stored(site: AdapterSite) -> nn.Parameter:
    weight = site.wrapper.stored_weight()
    assert weight is not None
    return weight


def _warn_of_zeros(names: list[str]) -> None:
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f"svdquant: there is no enabled quantiser on {shown}, so both factors of the adapter are zero, and such an "
        "adapter cannot train. Quantise first: quantize_base(model, .., residual_rank=r), or ModelOpt's mtq.quantize",
        stacklevel=4,
    )
