"""Adapters that start from the weights: from what quantising lost (svdquant), or from the principal part (pissa)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.peft import AdapterWrapper
from meshpeft.peft.matching import chunks_of
from meshpeft.quantization.full_matrices import full_matrices
from meshpeft.quantization.sites import AdapterSite, adapter_sites, check_unshared, residual_of, widened
from meshpeft.quantization.svd import LowRank, low_rank_part

__all__ = ["keep_starts", "pissa_init", "svdquant_init"]

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

    With the rank-r singular value decomposition U S V^T of W - quant(W): A = V^T, B = U S / s, so that the adapter's
    s B A is the best rank-r approximation of the residual at any scale s. Of the full matrix where it is divided, per
    expert where they are stacked, so that it is the same at every layout. Layers packed by `quantize_base` no longer
    have W: their factors are those that `quantize_base(residual_rank=r)` kept.

    A layer that is not quantised gets zeros in both factors, and one warning names such layers.

    Args:
        model: with adapters (LoRA, Canonical LoRA, DoRA, or named ones) on quantised layers; or a list of its chunks.
        adapter_name: where layers have several adapters, the name of the one to start.
        layers: adapted layers of the model, with their names; `None` means all.
        exact: decompose in full, in float64. Layers packed with kept residuals: see `quantize_base(exact_svd=..)`.
        power_iterations, oversampling: of the randomised decomposition, see `low_rank_part`.

    Raises:
        QuantizationError: a packed layer kept no residual, or one of a lower rank than the adapter's; experts that
            share an adapter; no adapter. Collectives over the axes that divide the weights.
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
    """Start adapters from the principal part of their layers' weights, which give it up (PiSSA, Meng et al. 2024).

    With the rank-r decomposition U S V^T of W: A = sqrt(S) V^T, B = U sqrt(S) / s, and W becomes W - s B A, so that
    the model computes what it did. Its base is no longer the one that was loaded; the adapter keeps the factors of the
    part that was taken, so that it is exported (at twice its rank) as the change of the base as it was.

    A packed layer no longer has W: its adapter takes over the principal part that `quantize_base(principal_rank=r)`
    kept beside the remainder's codes (QPiSSA). The adapter is then a change of the base that is packed so.

    Args:
        model: with adapters on layers whose weights are stored as they are used, or packed with a principal part; or a
            list of its chunks.
        adapter_name, layers, exact, power_iterations, oversampling: as in `svdquant_init`. Principal parts of packed
            layers: see `quantize_base(exact_svd=..)`.

    Raises:
        QuantizationError: a quantised weight kept no principal part, or one of a lower rank than the adapter's; a
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
    """Take from packed layers what their adapters took over; all of a principal part, if they took it all."""
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
