"""Adapters that start from the weights: from what quantising lost (svdquant), or from the principal part (pissa)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meshpeft.parallel import layer_type_of
from meshpeft.peft import AdapterWrapper
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.full_matrices import full_matrices, gathered_factors
from meshpeft.quantization.layers import PackedLayer
from meshpeft.quantization.sites import AdapterSite, adapter_sites
from meshpeft.quantization.svd import LowRank, low_rank_part

__all__ = ["check_start", "keep_starts", "pissa_init", "svdquant_init"]

# Bytes of full matrices that wait to be decomposed together.
_WAITING_BYTES = 1 << 28


@torch.no_grad()
def svdquant_init(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    layers: Mapping[str, AdapterWrapper] | None = None,
    exact: bool = False,
    power_iterations: int | None = None,
    oversampling: int = 16,
) -> None:
    """Start adapters from what quantising their layers' weights lost.

    With the rank-r singular value decomposition U S V^T of W - quant(W): A = V^T, B = U S / s, so that the adapter's
    s B A is the best rank-r approximation of the residual at any scale s. Of the full matrix where it is divided, per
    expert where they are stacked, so that it is the same at every layout. Layers packed by `quantize_base` no longer
    have W: their factors are those that `quantize_base(residual_rank=r)` kept.

    A layer that is not quantised gets zeros in both factors, and one warning names such layers.

    Args:
        model: with adapters (LoRA, Canonical LoRA, DoRA, or named ones) on quantised layers.
        adapter_name: where layers have several adapters, the name of the one to start.
        layers: adapted layers of the model, by name; `None` means all.
        exact: decompose in full, in float64. Layers packed with kept residuals: see `quantize_base(exact_svd=..)`.
        power_iterations, oversampling: of the randomised decomposition, see `low_rank_part`.

    Raises:
        QuantizationError: a packed layer kept no residual, or one of a lower rank than the adapter's; experts that
            share an adapter; no adapter. Collectives over the axes that divide the weights.
    """
    options = {"exact": exact, "power_iterations": power_iterations, "oversampling": oversampling}
    sites = list(adapter_sites(model, adapter_name, layers))
    for site in sites:
        check_start("svdquant", site.base, site.adapter.dim, site.name)
    waiting = _Waiting(options)
    unquantised = []
    for site in sites:
        residual = _residual_source(site.base)
        if residual is None:
            unquantised.append(site.name)
            site.set_zero()
        elif isinstance(residual, PackedLayer):
            site.set_factors(_kept_residual(site, residual))
        else:
            waiting.add(site, site.rows_of(full_matrices(residual, site.layout)))
    waiting.finish()
    for site in sites:
        site.reset_magnitude()
    if unquantised:
        _warn_of_zeros(unquantised)


@torch.no_grad()
def pissa_init(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    layers: Mapping[str, AdapterWrapper] | None = None,
    exact: bool = False,
    power_iterations: int | None = None,
    oversampling: int = 16,
) -> None:
    """Start adapters from the principal part of their layers' weights, which give it up (PiSSA, Meng et al. 2024).

    With the rank-r decomposition U S V^T of W: A = sqrt(S) V^T, B = U sqrt(S) / s, and W becomes W - s B A, so that
    the model computes what it did. Its base is no longer the one that was loaded; the adapter keeps the factors of the
    part that was taken, so that it is exported (at twice its rank) as the change of the base as it was. To quantise the
    remainder, call `quantize_base` afterwards.

    Args:
        model: with adapters on layers whose weights are stored as they are used.
        adapter_name, layers, exact, power_iterations, oversampling: as in `svdquant_init`.

    Raises:
        QuantizationError: a weight is quantised, or shared with another layer. Nothing is changed then.
    """
    options = {"exact": exact, "power_iterations": power_iterations, "oversampling": oversampling}
    sites = list(adapter_sites(model, adapter_name, layers))
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for site in sites:
        check_start("pissa", site.base, site.adapter.dim, site.name)
        if owners.count(id(_stored(site))) > 1:
            raise QuantizationError(f"{site.name}: its weight is shared with another layer, which pissa would change")
    waiting = _Waiting(options, balanced=True)
    for site in sites:
        waiting.add(site, site.rows_of(full_matrices(_wide(_stored(site)), site.layout)))
    waiting.finish()
    for site in sites:
        site.subtract_from(_stored(site))
        site.reset_magnitude()
        site.adapter.keep_start()


def keep_starts(model: nn.Module) -> None:
    """Make room for what `pissa_init` keeps, in a model whose adapters are about to be loaded.

    Raises:
        QuantizationError: the model has no adapter.
    """
    for site in adapter_sites(model):
        site.adapter.keep_start()


class _Waiting:
    """Full matrices of adapters that start from them: those of one shape and rank are decomposed together."""

    def __init__(self, options: Mapping[str, Any], balanced: bool = False) -> None:
        self._options, self._balanced = options, balanced
        self._groups: dict[tuple[object, ...], list[tuple[AdapterSite, Tensor]]] = {}
        self._bytes = 0

    def add(self, site: AdapterSite, matrices: Tensor) -> None:
        """`matrices`: [out, in], or [experts, out, in]."""
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
            part = _balanced(part)
        counts = [shape.numel() for shape in shapes]
        for site, shape, left, right in zip(
            sites, shapes, part.left.split(counts), part.right.split(counts), strict=True
        ):
            site.set_factors(LowRank(left.reshape(*shape, *left.shape[1:]), right.reshape(*shape, *right.shape[1:])))


def _balanced(part: LowRank) -> LowRank:
    """The singular values, all in `left`, divided evenly between the factors."""
    roots = torch.linalg.vector_norm(part.left, dim=-2).sqrt()
    safe = roots.clamp_min(torch.finfo(roots.dtype).tiny)
    return LowRank(part.left / safe.unsqueeze(-2), part.right * roots.unsqueeze(-1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stored(site: AdapterSite) -> nn.Parameter:
    weight = site.wrapper.stored_weight()
    assert weight is not None
    return weight


def check_start(method: Literal["svdquant", "pissa"], layer: nn.Module, rank: int, name: str) -> None:
    """Whether an adapter of this rank on a layer can start by this method.

    Raises:
        QuantizationError: see `svdquant_init` and `pissa_init`.
    """
    if method == "pissa":
        if _residual_source(layer) is not None:
            raise QuantizationError(
                f"{name}: pissa takes its part out of the weight, which is quantised already; call pissa_init before "
                "quantising"
            )
    elif isinstance(layer, PackedLayer):
        kept = 0 if layer.residual is None else layer.residual.a.shape[-2]
        if kept < rank:
            state = f"kept a residual of rank {kept} only" if kept else "kept no residual"
            raise QuantizationError(
                f"{name}: its packed weight {state}, and the adapter has rank {rank}; pack the model with "
                f"quantize_base(.., residual_rank={rank})"
            )


def _residual_source(layer: nn.Module) -> Tensor | PackedLayer | None:
    """W - quant(W), local, or the packed layer that kept its factors; `None` where a layer uses what it stores."""
    if isinstance(layer, PackedLayer):
        return layer
    layer_type = layer_type_of(layer)
    assert layer_type is not None
    used, stored = layer_type.weight(layer), layer.weight
    if used is stored or not isinstance(stored, Tensor):
        return None
    return _wide(stored.detach()) - _wide(used.detach())


def _kept_residual(site: AdapterSite, base: PackedLayer) -> LowRank:
    residual, rank = base.residual, site.adapter.dim
    assert residual is not None
    full = gathered_factors(residual.a, residual.b, site.layout)
    # The leading factors of a decomposition are those of the lower rank.
    return LowRank(site.rows_of(full.left)[..., :rank], full.right[..., :rank, :])


def _warn_of_zeros(names: list[str]) -> None:
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f"svdquant: there is no enabled quantiser on {shown}, so both factors of the adapter are zero, and such an "
        "adapter cannot train. Quantise first: quantize_base(model, .., residual_rank=r), or ModelOpt's mtq.quantize",
        stacklevel=4,
    )
