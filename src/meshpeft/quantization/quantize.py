"""`quantize_base`: pack the frozen weights of a model; the way back, and what is stored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from meshpeft.parallel import layout_of
from meshpeft.peft import ModuleMatcher, adapter_wrappers, base_of, walk
from meshpeft.peft.matching import is_target, nearest_names
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import FormatName, weight_format
from meshpeft.quantization.layers import (
    KeptFactors,
    can_be_packed,
    check_has_values,
    check_packable,
    pack_,
    packed_form,
    unpack_,
)
from meshpeft.quantization.svd import LowRank, full_matrices, local_factors, low_rank_part

__all__ = [
    "BaseQuantizer",
    "DEFAULT_EXCLUDED",
    "PackedSize",
    "dequantize_base",
    "forget_residuals",
    "packed_size",
    "quantize_base",
]


Model = TypeVar("Model", bound=nn.Module)

# What every recipe keeps in full: the vocabulary head, and what decides where tokens go.
DEFAULT_EXCLUDED = ("output_layer", "lm_head", "embed_out", "router", "gate", "shared_expert_gate")


@dataclass(frozen=True)
class BaseQuantizer:
    """Packs layers one at a time; a loader uses it on each layer as soon as its weight is read.

    Attributes:
        format: `nf4 int8 int4 fp8`, see `meshpeft.quantization.formats`.
        block_size: Consecutive values of a row that share a scale.
        residual_rank: Rank of the factors of W - dequantised W that each layer keeps for `svdquant_init`; `None`
            keeps none.
        exact_svd: Decompose residuals and principal parts in full; randomised otherwise.
        target_modules: Names, or patterns with `*` of full names, of the layers to pack; `None`: every linear layer.
        exclude_modules: Names or patterns of the layers to keep; one that matches nothing is warned of.
        principal_rank: Rank of the part of W, its largest singular values, that each layer keeps as it is in two
            factors; the remainder is packed, and the dequantised weight is the sum. `pissa_init` moves that part into
            the adapters (QPiSSA, Meng et al. 2024). `None` packs all of W.
        principal_modules: Which of the packed layers keep such a part: names or patterns; or a method (`LoRA(..)`),
            for the layers that it would adapt; `None`: all.

    Raises:
        QuantizationError: Unknown format; a block size or a rank that is not possible.
    """

    format: FormatName = "nf4"
    block_size: int = 64
    residual_rank: int | None = None
    exact_svd: bool = False
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = DEFAULT_EXCLUDED
    principal_rank: int | None = None
    principal_modules: Sequence[str] | ModuleMatcher | None = None

    def __post_init__(self) -> None:
        weight_format(self.format, self.block_size)
        for option in ("residual_rank", "principal_rank"):
            rank = getattr(self, option)
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise QuantizationError(f"{option}={rank!r}: expected an integer of at least 1, or None to keep none")
        if self.principal_modules is not None and self.principal_rank is None:
            raise QuantizationError(
                "principal_modules names the layers that keep a principal part: give principal_rank"
            )
        for option in ("target_modules", "exclude_modules", "principal_modules"):
            patterns = getattr(self, option)
            if isinstance(patterns, str):
                raise QuantizationError(f"{option} is a string; give a list of patterns: [{patterns!r}]")
            for pattern in () if patterns is None or isinstance(patterns, ModuleMatcher) else patterns:
                if not isinstance(pattern, str):
                    raise QuantizationError(f"{option}: {pattern!r} is no pattern; expected names, or patterns with *")

    def layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to pack, by full name; the model may be on the meta device.

        Raises:
            QuantizationError: There is none, or a pattern matches nothing; rows that do not divide into blocks; a
                weight that two layers share.
        """
        layers = dict(_linear_layers(model))
        for why in _unmet(self.target_modules, list(layers), "linear layer"):
            raise QuantizationError(f"target_modules: {why}")
        own = [pattern for pattern in self.exclude_modules if pattern not in DEFAULT_EXCLUDED]
        for why in _unmet(own, [path.full_name for path, _ in walk(model)], "module"):
            warnings.warn(f"exclude_modules: {why}", stacklevel=3)
        wanted = {name: layer for name, layer in layers.items() if self._wants(layer, name)}
        if not wanted:
            packed = sum(packed_form(layer) is not None for layer in layers.values())
            raise QuantizationError(
                f"nothing to pack: of {len(layers)} linear layers {packed} are packed already, and the others are "
                "excluded"
            )
        patterns = None if isinstance(self.principal_modules, ModuleMatcher) else self.principal_modules
        for why in _unmet(patterns, list(wanted), "packed layer"):
            raise QuantizationError(f"principal_modules: {why}")
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in wanted.items():
            shared = owners[id(check_packable(layer, self.format, self.block_size, name))]
            if len(shared) > 1:
                raise QuantizationError(
                    f"{name}: its weight is shared by {' and '.join(shared)}; name the layer in exclude_modules"
                )
        return wanted

    def _wants(self, layer: nn.Module, name: str) -> bool:
        if not can_be_packed(layer) or _matches_any(self.exclude_modules, name):
            return False
        return self.target_modules is None or _matches_any(self.target_modules, name)

    def pack_(self, layer: nn.Module, name: str) -> None:
        """Pack one layer, in place.

        A collective over the axis that shards it, where its blocks straddle ranks or a part of it is kept.
        """
        rank = self.residual_rank
        principal = self._principal_part(layer, name)
        residual = pack_(layer, self.format, self.block_size, name, principal=principal, with_residual=rank is not None)
        if residual is None or rank is None:
            return
        layout = layout_of(layer)
        part = low_rank_part(full_matrices(residual, layout), rank, exact=self.exact_svd)
        a, b = local_factors(part, layout.factor_a(rank), layout.factor_b(rank), layout)
        # Not part of the model's state: an adapter made from them is saved, and they are not needed again.
        layer.register_buffer("residual_a", a, persistent=False)
        layer.register_buffer("residual_b", b, persistent=False)

    def _keeps_principal(self, layer: nn.Module, name: str) -> bool:
        wanted = self.principal_modules
        if isinstance(wanted, ModuleMatcher):
            prefix, _, own_name = name.rpartition(".")
            return wanted.match(layer, own_name, prefix) is not None
        return wanted is None or _matches_any(wanted, name)

    def _principal_part(self, layer: nn.Module, name: str) -> KeptFactors | None:
        rank = self.principal_rank
        if rank is None or not self._keeps_principal(layer, name):
            return None
        weight = check_packable(layer, self.format, self.block_size, name)
        layout = layout_of(layer)
        # In float64: what is packed depends on it, and has to be the same wherever the model is read again.
        part = low_rank_part(full_matrices(weight, layout), rank, exact=self.exact_svd, dtype=torch.float64).balanced()
        part = LowRank(part.left.float(), part.right.float())
        return KeptFactors(*local_factors(part, layout.factor_a(rank), layout.factor_b(rank), layout))


def quantize_base(
    model: Model,
    format: FormatName = "nf4",
    *,
    residual_rank: int | None = None,
    block_size: int = 64,
    exact_svd: bool = False,
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = DEFAULT_EXCLUDED,
    principal_rank: int | None = None,
    principal_modules: Sequence[str] | ModuleMatcher | None = None,
) -> Model:
    """Pack the weights of a model's linear layers, in place, layer after layer.

    The packed weights are frozen; forward and backward passes dequantise each when they need it and keep none. The
    dequantised weight is the same at every layout. Column- and row-parallel layers, grouped experts and `nn.Linear`
    are packed, also those that carry an adapter. A collective where blocks straddle ranks, or residuals or principal
    parts are kept.

    Args:
        model: Model that holds its values. To pack each tensor as it is read, see `load_pretrained(quantize=..)`.
        format: `nf4` and `int4` take 0.5625 bytes a value, `int8` and `fp8` 1.0625.
        residual_rank, block_size, exact_svd, target_modules, exclude_modules, principal_rank, principal_modules: see
            `BaseQuantizer`. By default the vocabulary head, routers and gates
            are kept in full.

    Returns:
        The model.

    Raises:
        QuantizationError: Nothing to pack, or a pattern that matches nothing; rows that do not divide into blocks; a
            weight that two layers share, that holds no values yet, or that an adapter is merged into. Nothing is
            packed then.

    Example:
        >>> quantize_base(model, "nf4")
        >>> LoRA(dim=16)(model)
    """
    quantizer = BaseQuantizer(
        format,
        block_size,
        residual_rank,
        exact_svd,
        target_modules,
        exclude_modules,
        principal_rank,
        principal_modules,
    )
    layers = quantizer.layers_of(model)
    merged = {wrapper.to_wrap for _, wrapper in adapter_wrappers(model) if wrapper.is_merged}
    for name, layer in layers.items():
        check_has_values(layer, name)
        if layer in merged:
            raise QuantizationError(
                f"{name}: an adapter is merged into its weight, which could not be put back; unmerge it first, or take "
                "it into the base with merge_adapter"
            )
    for name, layer in layers.items():
        quantizer.pack_(layer, name)
    return model


def dequantize_base(model: Model) -> Model:
    """Turn packed layers into ordinary ones with the dequantised weights, in place, one after the other.

    The model computes what it did; an adapter that was trained on the packed base can then be merged into it.

    Returns:
        The model.
    """
    for _, layer in _linear_layers(model):
        if packed_form(layer) is not None:
            unpack_(layer)
    return model


def forget_residuals(model: nn.Module) -> None:
    """Free what `quantize_base(residual_rank=..)` kept, once the adapters have started from it."""
    for _, layer in _linear_layers(model):
        form = packed_form(layer)
        if form is not None:
            form.forget_residual()


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that can be packed and those that are, with their full names; each once."""
    seen: set[int] = set()
    for path, module in walk(model):
        layer = base_of(module)
        if id(layer) not in seen and (can_be_packed(layer) or packed_form(layer) is not None):
            seen.add(id(layer))
            yield path.full_name, layer


def _unmet(patterns: Sequence[str] | None, names: list[str], kind: str) -> Iterator[str]:
    """Yield a sentence on each pattern that matches none of the names."""
    for pattern in patterns or ():
        if not any(is_target(pattern, name) for name in names):
            yield f"{pattern!r} matches no {kind}; nearest: {', '.join(nearest_names(pattern, names)) or 'none'}"


def _matches_any(patterns: Sequence[str], name: str) -> bool:
    return any(is_target(pattern, name) for pattern in patterns)


class PackedSize(NamedTuple):
    """Size of a model's packed layers, over all ranks that share it.

    Attributes:
        layers: Number of packed layers.
        parameters: Number of parameters of their weights.
        bytes: Bytes of codes and scales, and of principal parts that are still kept, as the ranks hold them.
        formats: Names of their formats.
    """

    layers: int
    parameters: int
    bytes: int
    formats: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters of {self.layers} layers as {' and '.join(self.formats)} in {self.bytes:,} "
            f"bytes, {self.bytes / max(1, self.parameters):.4f} a parameter"
        )


def packed_size(model: nn.Module) -> PackedSize:
    """Count the packed weights of a model; not a collective."""
    parameters = stored = 0
    layers = [form for form in map(packed_form, model.modules()) if form is not None]
    for layer in layers:
        weight = layer.blocks.weight
        ranks = math.prod(axis.world_size for axis in weight.shard_axes)
        parameters += weight.size
        stored += ranks * sum(tensor.nbytes for tensor in layer.stored_tensors())
    return PackedSize(len(layers), parameters, stored, tuple(sorted({layer.storage.name for layer in layers})))
