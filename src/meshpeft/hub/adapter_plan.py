"""What of a Hugging Face PEFT adapter goes where in a model, and whether it fits.

A layer that is fused here is several modules in the file. Where these are all there and share A, the adapter is LoRA
(or DoRA) on the fused layer; otherwise it is Canonical LoRA, which has an adapter for each. Experts share one adapter
where all of theirs in the file are equal; otherwise each has its own. Their gate and up projection have one A here: two
different ones become one of the sum of their ranks.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn

from meshpeft.hub.adapter_config import FACTOR_A, FACTOR_B, PREFIX, AdapterShape, PeftConfig
from meshpeft.hub.adapter_names import FoundNames
from meshpeft.hub.adapter_scales import AS_THEY_ARE, FileScale, OwnAdapter, Written
from meshpeft.hub.base_copies import compare_base_copies
from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.linears import AdaptedLinear, HubLinear, adapted_linears, hub_linears, is_adapted
from meshpeft.hub.places import Place, parts_of, stored_factors
from meshpeft.hub.stored_factors import SeparateA, SeparateB, StoredFactor
from meshpeft.hub.tensor_file import TensorFileReader
from meshpeft.parallel.held_modules import held_module
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT
from meshpeft.peft.canonical import component_name, part_layout

__all__ = ["AdapterPlan"]

Model = TypeVar("Model", bound=nn.Module)


class AdapterPlan:
    """What of a file goes where: every module, shape and type compared, before any value is read.

    Raises:
        CheckpointError: the first difference.
    """

    def __init__(
        self, model: nn.Module, config: PeftConfig, file: TensorFileReader, adapter_name: str | None = None
    ) -> None:
        self.config, self.file, model = config, file, held_module(model)
        self.linears = {linear.name: linear for linear in hub_linears(model)}
        self.scale = FileScale.read(file.metadata, config, file.path)
        self.use_rslora = config.use_rslora if self.scale is None else self.scale.use_rslora
        self.names = FoundNames(model, config, file, self.linears)
        self._compare_targets()
        self.separate = self._separate_parts()
        self.canonical = False
        self.places = self._there(adapted_linears(model, adapter_name)) if is_adapted(model) else self._new()
        self._compare_places()
        for place in self.places:
            self._compare_tensors(place)
        compare_base_copies(model, self.linears, self.names.base_copies, file)

    def _compare_targets(self) -> None:
        held, expected = self.names.held, self.names.targets()
        # Which layers are meant by number, only the file itself says.
        for name in sorted(set() if self.config.some_layers_only else expected - held):
            stacked = self.linears[name].experts is not None
            path = self.names.of_stack(name) if stacked else self.names.of_module(name)
            raise CheckpointError(f"{self.file.path} lacks {PREFIX}{path}.{FACTOR_A}, though its config targets {name}")
        for name in sorted(held - expected):
            raise CheckpointError(f"{self.file.path} holds an adapter for {name}, which its config does not target")

    def _separate_parts(self) -> dict[str, list[AdapterShape]]:
        """The shapes of gate and up of those stacked experts that have two A, or two shapes, in the file."""
        found = {}
        for name in sorted(self.names.held):
            linear = self.linears[name]
            parts = parts_of(linear.layout)
            if linear.experts is None or not self.names.per_expert or len(parts) == 1:
                continue
            shapes = [self._own(self.names.of_expert(name, part, 0)).shape for part in parts]
            if len(set(shapes)) > 1 or not self._share_a(name, linear):
                if self.config.use_dora:
                    raise CheckpointError(
                        f"{self.file.path}: the A factors of the parts of {name} differ; they are one layer here, on "
                        "which DoRA has one A"
                    )
                found[name] = shapes
        return found

    def _share_a(self, name: str, linear: HubLinear) -> bool:
        def read(part: str | None, expert: int) -> Tensor:
            return self.file.read(f"{PREFIX}{self.names.of_expert(name, part, expert)}.{FACTOR_A}")

        first, *others = parts_of(linear.layout)
        return all(
            torch.equal(read(first, expert), read(other, expert))
            for expert in range(linear.experts or 0)
            for other in others
        )

    def _shape_of(self, name: str) -> AdapterShape:
        """Rank and alpha of our adapter on what has this name in transformers."""
        shapes = self.separate.get(name)
        if shapes is None:
            return self._own(self.names.in_config(name)).shape
        rank, use_rslora = sum(shape.rank for shape in shapes), self.use_rslora
        return AdapterShape.of_scale(rank, shapes[0].scale(use_rslora), use_rslora)

    def _own(self, name: str) -> OwnAdapter:
        """The adapter that the file knows by this name, as it was where it was written."""
        own = None if self.scale is None else self.scale.own.get(name)
        return OwnAdapter(self.config.shape_of(name)) if own is None else own

    def _written(self, shape: AdapterShape) -> Written:
        return AS_THEY_ARE if self.scale is None else self.scale.written(shape)

    def _there(self, linears: list[AdaptedLinear]) -> list[Place]:
        """The places of the model's adapters."""
        return [Place.of(linear, self._written(linear.shape)) for linear in linears]

    def _new(self) -> list[Place]:
        """The places of adapters that are yet to be made, of the method that the file allows."""
        modules: dict[str, list[HubLinear]] = {}
        for linear in self.linears.values():
            modules.setdefault(linear.module, []).append(linear)
        held = self.names.held
        modules = {module: parts for module, parts in modules.items() if any(part.name in held for part in parts)}
        reasons = [reason for parts in modules.values() if (reason := self._why_separate(parts))]
        if reasons and self.config.use_dora:
            raise CheckpointError(
                f"{self.file.path}: {reasons[0]}; they are one layer here, where DoRA has one A and needs all parts; "
                "on transformers' own layers (--engine transformers) they have one each"
            )
        self.canonical = bool(reasons)
        shared = self._experts_share()
        found = []
        for module, parts in modules.items():
            groups = [[part] for part in parts if part.name in held] if self.canonical else [parts]
            found += [self._place(module, group, shared=shared) for group in groups]
        return found

    def _why_separate(self, parts: list[HubLinear]) -> str | None:
        """Why the file's modules cannot share one adapter on the fused layer."""
        held = [part.name for part in parts if part.name in self.names.held]
        for part in parts:
            if part.name not in held:
                return f"there is an adapter for {held[0]}, but none for {part.name}"
        for name in held[1:]:
            if self._shape_of(name) != self._shape_of(held[0]):
                return f"{held[0]} and {name} have different ranks or alphas"
            if not torch.equal(self._a_of(held[0]), self._a_of(name)):
                return f"the A factors of {held[0]} and {name} differ"
        return None

    def _a_of(self, name: str) -> Tensor:
        return self.file.read(f"{PREFIX}{self.names.of_module(name)}.{FACTOR_A}")

    def _experts_share(self) -> bool:
        """Whether all adapters on stacked experts are the same for every expert."""
        if self.separate:
            return False
        try:
            for name in self.names.held:
                if self.linears[name].experts is not None:
                    place = self._place(self.linears[name].module, [self.linears[name]], shared=True)
                    for stored in self._stored(place):
                        self._compare_shapes(stored)
                        stored.check_copies(self.file)
        except CheckpointError:
            return False
        return True

    def _place(self, module: str, parts: list[HubLinear], *, shared: bool) -> Place:
        layout: LinearLayout = parts[0].layout
        if self.canonical and parts[0].part is not None:
            layout = part_layout(layout, parts[0].part)
        factors = layout.for_all_experts() if layout.experts is not None and shared else layout
        shape = self._shape_of(parts[0].name)
        return Place(
            module,
            tuple(part.name for part in parts),
            factors.factor_a(shape.rank),
            factors.factor_b(shape.rank),
            layout.magnitude() if self.config.use_dora else None,
            shape,
            self.use_rslora,
            parts[0].experts,
            self._written(shape),
        )

    def _compare_places(self) -> None:
        """Whether the adapters of the model are the file's, but for their values."""
        placed = {name: place for place in self.places for name in place.names}
        for name in sorted({*placed, *self.names.held}):
            if name not in self.names.held:
                raise CheckpointError(f"the model has an adapter on {name}, {self.file.path} has none")
            if name not in placed:
                raise CheckpointError(f"{self.file.path} has an adapter on {name}, the model has none")
            place, wanted = placed[name], self._shape_of(name)
            if place.shape != wanted:
                raise CheckpointError(
                    f"{name}: the file's adapter has rank {wanted.rank} and alpha {wanted.alpha:g}, "
                    f"the model's rank {place.shape.rank} and alpha {place.shape.alpha:g}"
                )
            for option, theirs, ours in (
                ("use_rslora", self.use_rslora, place.use_rslora),
                ("use_dora", self.config.use_dora, place.magnitude is not None),
            ):
                if theirs != ours:
                    raise CheckpointError(f"{name}: {option} is {theirs} in the file, {ours} in the model")

    def _compare_tensors(self, place: Place) -> None:
        for stored in self._stored(place):
            self._compare_shapes(stored)
            try:
                stored.check_copies(self.file)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{self.file.path}: {error}: the model's adapter on {place.module} has one; load it into a model "
                    "without adapters"
                ) from error

    def _compare_shapes(self, stored: StoredFactor) -> None:
        for key, shape in stored.declared():
            found = self.file.tensors.get(key)
            if found is None:
                raise CheckpointError(f"{self.file.path} lacks {key}")
            if found.shape != shape:
                raise CheckpointError(
                    f"{self.file.path}: {key} has shape {found.shape}; the model and the config's rank say {shape}"
                )
            if not found.dtype.is_floating_point:
                raise CheckpointError(f"{self.file.path}: {key} is stored as {found.dtype}; expected floating point")

    def _stored(self, place: Place) -> list[StoredFactor]:
        shapes = self.separate.get(place.names[0])
        if shapes is None:
            return stored_factors(place, self.names)
        if not place.stacked:
            raise CheckpointError(f"the parts of {place.names[0]} have different A factors")
        ranks = [shape.rank for shape in shapes]
        scales = [shape.scale(self.use_rslora) for shape in shapes]
        a, b = (self.names.keys_by_part(place.names[0], suffix) for suffix in (FACTOR_A, FACTOR_B))
        return [SeparateA(place.a, a, ranks), SeparateB(place.b, b, ranks, [scale / scales[0] for scale in scales])]

    def read(self, place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's slices of A, B and the magnitude, in packed order, each of its own type.

        That of the file, but for a B that was widened when it was written, and a magnitude narrower than float32.
        """
        a, b, *magnitudes = [stored.read(self.file) for stored in self._stored(place)]
        b = place.written.b_from_file(b, self._own(self.names.in_config(place.names[0])).b_dtype)
        return a, b, _at_least_float32(magnitudes[0]) if magnitudes else None

    def adapted(self, model: Model, dtype: torch.dtype | None, trainable: bool) -> Model:
        """Put adapters of the file's method, ranks and targets on the model."""
        targets = [self._target(place.module, name) for place in self.places for name in place.names]
        # Experts are one target as a whole, whatever parts of them were named.
        shapes = {
            place.module if place.experts is not None else self._target(place.module, name): place.shape
            for place in self.places
            for name in place.names
        }
        usual = Counter(shapes.values()).most_common(1)[0][0]
        method = self._method()(
            target_modules=list(dict.fromkeys(targets)),
            dim=usual.rank,
            alpha=usual.alpha,
            rank_pattern={name: shape.rank for name, shape in shapes.items() if shape.rank != usual.rank},
            alpha_pattern={name: shape.alpha for name, shape in shapes.items() if shape.alpha != usual.alpha},
            dropout=self.config.dropout,
            use_rslora=self.use_rslora,
            share_expert_adapters=not any(place.stacked for place in self.places),
            lora_dtype=dtype,
        )
        return method(model, training=trainable)

    def _method(self) -> type[LowRankPEFT]:
        return DoRA if self.config.use_dora else CanonicalLoRA if self.canonical else LoRA

    def _target(self, module: str, name: str) -> str:
        linear = self.linears[name]
        part = parts_of(linear.layout)[0] if linear.experts is not None else linear.part
        return component_name(module, part) if self.canonical and part is not None else module


def _at_least_float32(magnitude: Tensor) -> Tensor:
    return magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
