"""What of a Hugging Face PEFT adapter goes where in a model, and whether it fits.

A layer that is fused here is several modules in the file. Where these are all there and share A, the adapter is LoRA
(or DoRA) on the fused layer; otherwise it is Canonical LoRA, which has an adapter for each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.linears import AdaptedLinear, HubLinear, adapted_linears, hub_linears, is_adapted
from meshpeft.checkpoint.peft_config import FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, AdapterShape, PeftConfig
from meshpeft.checkpoint.tensor_file import TensorFileReader
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.tensor_layout import TensorLayout
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT
from meshpeft.peft.canonical_lora import component_name, part_layout

__all__ = ["AdapterPlan", "Place"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """Where the tensors of some of the file's modules go: one pair of factors of ours.

    Attributes:
        module: full name of our layer.
        names: the file's modules; they share A.
        a, b, magnitude: layouts of the parameters.
        shape: rank and alpha.
        use_rslora: how they scale.
    """

    module: str
    names: tuple[str, ...]
    a: TensorLayout
    b: TensorLayout
    magnitude: TensorLayout | None
    shape: AdapterShape
    use_rslora: bool

    @classmethod
    def of(cls, linear: AdaptedLinear) -> Place:
        """That of an adapter which is there."""
        magnitude = None if linear.magnitude is None else linear.magnitude.layout
        return cls(
            linear.module, linear.names, linear.a.layout, linear.b.layout, magnitude, linear.shape, linear.use_rslora
        )


class AdapterPlan:
    """What of a file goes where: every module, shape and type compared, before any value is read.

    Raises:
        CheckpointError: the first difference.
    """

    def __init__(self, model: nn.Module, config: PeftConfig, file: TensorFileReader) -> None:
        self.config, self.file = config, file
        self.linears = {linear.name: linear for linear in hub_linears(model)}
        self.held = _modules_of(file, self.linears, use_dora=config.use_dora)
        self._compare_targets()
        self.canonical = False
        self.places = [Place.of(linear) for linear in adapted_linears(model)] if is_adapted(model) else self._new()
        self._compare_places()
        for place in self.places:
            self._compare_tensors(place)

    def _compare_targets(self) -> None:
        expected = self.config.targets(self.linears)
        # Which layers are meant by number, only the file itself says.
        for name in sorted(set() if self.config.some_layers_only else expected - self.held):
            raise CheckpointError(f"{self.file.path} lacks {PREFIX}{name}.{FACTOR_A}, though its config targets {name}")
        for name in sorted(self.held - expected):
            raise CheckpointError(f"{self.file.path} holds an adapter for {name}, which its config does not target")

    def _new(self) -> list[Place]:
        """The places of adapters that are yet to be made, of the method that the file allows."""
        modules: dict[str, list[HubLinear]] = {}
        for linear in self.linears.values():
            modules.setdefault(linear.module, []).append(linear)
        modules = {module: parts for module, parts in modules.items() if any(part.name in self.held for part in parts)}
        reasons = [reason for parts in modules.values() if (reason := self._why_separate(parts))]
        if reasons and self.config.use_dora:
            raise CheckpointError(
                f"{self.file.path}: {reasons[0]}; they are one layer here, on which DoRA has one A and needs all parts"
            )
        self.canonical = bool(reasons)
        found = []
        for module, parts in modules.items():
            groups = [[part] for part in parts if part.name in self.held] if self.canonical else [parts]
            found += [self._place(module, group, separate=self.canonical) for group in groups]
        return found

    def _why_separate(self, parts: list[HubLinear]) -> str | None:
        """Why the file's modules cannot share one adapter on the fused layer."""
        held = [part.name for part in parts if part.name in self.held]
        for part in parts:
            if part.name not in self.held:
                return f"there is an adapter for {held[0]}, but none for {part.name}"
        first = self.file.read(f"{PREFIX}{held[0]}.{FACTOR_A}") if len(held) > 1 else None
        for name in held[1:]:
            if self.config.shape_of(name) != self.config.shape_of(held[0]):
                return f"{held[0]} and {name} have different ranks or alphas"
            if first is not None and not torch.equal(first, self.file.read(f"{PREFIX}{name}.{FACTOR_A}")):
                return f"the A factors of {held[0]} and {name} differ"
        return None

    def _place(self, module: str, parts: list[HubLinear], *, separate: bool) -> Place:
        layout: LinearLayout = parts[0].layout
        if separate and parts[0].part is not None:
            layout = part_layout(layout, parts[0].part)
        shape = self.config.shape_of(parts[0].name)
        return Place(
            module,
            tuple(part.name for part in parts),
            layout.factor_a(shape.rank),
            layout.factor_b(shape.rank),
            layout.magnitude() if self.config.use_dora else None,
            shape,
            self.config.use_rslora,
        )

    def _compare_places(self) -> None:
        """Whether the adapters of the model are the file's, but for their values."""
        placed = {name: place for place in self.places for name in place.names}
        for name in sorted({*placed, *self.held}):
            if name not in self.held:
                raise CheckpointError(f"the model has an adapter on {name}, {self.file.path} has none")
            if name not in placed:
                raise CheckpointError(f"{self.file.path} has an adapter on {name}, the model has none")
            place, wanted = placed[name], self.config.shape_of(name)
            if place.shape != wanted:
                raise CheckpointError(
                    f"{name}: the file's adapter has rank {wanted.rank} and alpha {wanted.alpha:g}, "
                    f"the model's rank {place.shape.rank} and alpha {place.shape.alpha:g}"
                )
            for option, theirs, ours in (
                ("use_rslora", self.config.use_rslora, place.use_rslora),
                ("use_dora", self.config.use_dora, place.magnitude is not None),
            ):
                if theirs != ours:
                    raise CheckpointError(f"{name}: {option} is {theirs} in the file, {ours} in the model")

    def _compare_tensors(self, place: Place) -> None:
        for name in place.names:
            self._compare_shape(f"{PREFIX}{name}.{FACTOR_A}", place.a.global_shape)
        for layout, suffix in _divided(place):
            for name, piece in zip(place.names, layout.pieces(), strict=True):
                self._compare_shape(f"{PREFIX}{name}.{suffix}", piece.global_shape)
        first = self.file.read(f"{PREFIX}{place.names[0]}.{FACTOR_A}")
        for name in place.names[1:]:
            if not torch.equal(first, self.file.read(f"{PREFIX}{name}.{FACTOR_A}")):
                raise CheckpointError(
                    f"{self.file.path}: the A factors of {place.names[0]} and {name} differ, but the model's adapter "
                    f"on {place.module} has one A; load it into a model without adapters"
                )

    def _compare_shape(self, key: str, shape: tuple[int, ...]) -> None:
        stored = self.file.tensors[key]
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.file.path}: {key} has shape {stored.shape}; the model and the config's rank say {shape}"
            )
        if not stored.dtype.is_floating_point:
            raise CheckpointError(f"{self.file.path}: {key} is stored as {stored.dtype}; expected floating point")

    def read(self, place: Place) -> tuple[Tensor | None, ...]:
        """This rank's slices of A, B and the magnitude, in packed order."""
        key = f"{PREFIX}{place.names[0]}.{FACTOR_A}"
        boxes = zip(place.a.pieces(), _starts(place.a), strict=True)
        a = [self.file.read_box(key, _moved(place.a, piece.offset, start), piece.shape) for piece, start in boxes]
        found: list[Tensor | None] = [place.a.join_parts(a)]
        for layout, suffix in _divided(place):
            parts = [
                self.file.read_box(f"{PREFIX}{name}.{suffix}", piece.offset, piece.shape)
                for name, piece in zip(place.names, layout.pieces(), strict=True)
            ]
            found.append(layout.join_parts(parts))
        return (*found, None)[:3]

    def adapted(self, model: Model, dtype: torch.dtype, trainable: bool) -> Model:
        """The model with adapters of the file's method, ranks and targets."""
        groups: dict[AdapterShape, list[str]] = {}
        for place in self.places:
            targets = groups.setdefault(place.shape, [])
            targets += [self._target(place.module, name) for name in place.names]
        for shape, targets in groups.items():
            method = self._method()(
                target_modules=list(dict.fromkeys(targets)),
                dim=shape.rank,
                alpha=shape.alpha,
                dropout=self.config.dropout,
                use_rslora=self.config.use_rslora,
                lora_dtype=dtype,
            )
            model = method(model, training=trainable)
        return model

    def _method(self) -> type[LowRankPEFT]:
        return DoRA if self.config.use_dora else CanonicalLoRA if self.canonical else LoRA

    def _target(self, module: str, name: str) -> str:
        part = self.linears[name].part
        return component_name(module, part) if self.canonical and part is not None else module


def _modules_of(file: TensorFileReader, linears: Collection[str], *, use_dora: bool) -> set[str]:
    """The modules that the file has adapters for, each of them complete."""
    wanted = [FACTOR_A, FACTOR_B, *([MAGNITUDE] if use_dora else [])]
    found: dict[str, set[str]] = {}
    for key in sorted(file.tensors):
        suffix = next((suffix for suffix in wanted if key.endswith(f".{suffix}")), None)
        if suffix is None or not key.startswith(PREFIX):
            method = "DoRA" if use_dora else "LoRA"
            raise CheckpointError(f"{file.path} holds {key!r}, which is not a tensor of a {method} adapter")
        name = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
        if name not in linears:
            raise CheckpointError(f"{file.path} holds {key!r}, but the model has no linear layer {name}")
        found.setdefault(name, set()).add(suffix)
    if not found:
        raise CheckpointError(f"{file.path} holds no tensors")
    for name, held in found.items():
        for suffix in wanted:
            if suffix not in held:
                raise CheckpointError(f"{file.path} lacks {PREFIX}{name}.{suffix}")
    return set(found)


def _divided(place: Place) -> list[tuple[TensorLayout, str]]:
    """What has a part for each of the place's names, and how it is called."""
    return [(place.b, FACTOR_B), *([] if place.magnitude is None else [(place.magnitude, MAGNITUDE)])]


def _starts(layout: TensorLayout) -> list[int]:
    """Where each part begins in the global tensor."""
    sizes = (0,) if layout.packing is None else layout.packing.sizes
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _moved(layout: TensorLayout, offset: tuple[int, ...], start: int) -> tuple[int, ...]:
    """An offset in a part as one in the global tensor."""
    return tuple(place + start if dim == layout.packed_dim else place for dim, place in enumerate(offset))
