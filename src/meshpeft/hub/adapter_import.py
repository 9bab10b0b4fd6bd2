"""Read adapters that Hugging Face PEFT, or `export_peft_adapter`, wrote.

`FoundNames` finds out which layers the tensors of a file are for, `AdapterPlan` what goes where and whether it fits;
then each rank reads its slices.

A layer that is fused here is several modules in the file. Where these are all there and share A, the adapter is LoRA
(or DoRA) on the fused layer; otherwise it is Canonical LoRA, which has an adapter for each. Experts share one adapter
where all of theirs in the file are equal; otherwise each has its own. Their gate and up projection have one A here: two
different ones become one of the sum of their ranks.

`peft` writes weights of the base next to the adapters on them: of `lm_head` and embeddings, which may have been trained
or resized along with the adapter. They must be equal to the model's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from meshpeft.hub.adapter_config import (
    CONFIG_NAME,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    PREFIX,
    WEIGHTS_NAME,
    AdapterShape,
    PeftConfig,
)
from meshpeft.hub.adapter_scales import AS_THEY_ARE, FileScale, OwnAdapter, Written
from meshpeft.hub.adapter_tensors import (
    AdaptedLinear,
    FactorsInFile,
    HubLinear,
    adapted_linears,
    has_our_names,
    hub_linears,
    name_in_checkpoints,
    parts_of,
    peft_container,
    reshard,
    stored_factors,
)
from meshpeft.hub.names import (
    SeparateA,
    SeparateB,
    Stored,
    expert_module_name,
    has_expert_names,
    hf_module_name,
    is_swapped_by_peft,
    our_module_name,
)
from meshpeft.hub.tensor_files import CheckpointError, TensorFiles
from meshpeft.models import ModelError
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.layout import LinearLayout
from meshpeft.parallel.registry import layout_of
from meshpeft.parallel.sharded_tensor import held_module
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT, adapter_wrappers, base_of
from meshpeft.peft.canonical import component_name, part_layout

__all__ = ["BASE_COPY", "AdapterPlan", "FoundNames", "compare_base_copies", "load_peft_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def load_peft_adapter(
    model: Model,
    directory: str | Path,
    *,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    adapter_name: str | None = None,
) -> Model:
    """Put the adapter of a directory on a model. Every rank calls it, and reads its own slices of the file.

    Args:
        model: Without adapters; or with adapters of the same method, ranks, scales and targets, whose values are
            replaced.
        directory: With `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Leave the adapters trainable, the rest frozen and the model in training mode; otherwise
            everything is frozen and the model in evaluation mode. Ignored where the model has adapters.
        dtype: Type of A and B. By default each keeps its own, that of the file. Magnitudes keep theirs, and are float32
            at least. Ignored where the model has adapters.
        adapter_name: Name of the adapter that takes the values, where the model's have several names.

    Returns:
        The model, changed in place, with `LoRA`, `CanonicalLoRA` or `DoRA`.

    Raises:
        CheckpointError: A file is missing, cut or damaged, or is not of an adapter for this model; the message names
            the first difference, on every rank, and the model is as it was.
    """
    directory = Path(directory)
    reshard(model)
    with all_or_none(f"reading {directory}", CheckpointError):
        config = PeftConfig.read(directory / CONFIG_NAME)
        with TensorFiles([_weights(directory)]) as file:
            file.check_values()
            plan = AdapterPlan(model, config, file, adapter_name)
            values = {(pair.module, pair.names): plan.read(pair) for pair in plan.pairs}
    if not _is_adapted(model):
        model = plan.adapted(model, dtype, trainable)
        for linear in adapted_linears(model):
            a, b, magnitude = values[linear.module, linear.names]
            linear.cast(dtype or a.dtype, dtype or b.dtype, None if magnitude is None else magnitude.dtype)
    with torch.no_grad():
        for linear in adapted_linears(model, adapter_name):
            factors = (linear.a, linear.b, linear.magnitude)
            for factor, value in zip(factors, values[linear.module, linear.names], strict=True):
                if factor is not None and value is not None:
                    factor.fill(value)
    return model


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory} holds adapter_model.bin, a pickle, which could run any program; save it as safetensors"
        )
    return path


class AdapterPlan:
    """Which tensors of a file go where: every module, shape and type is compared before any value is read.

    Raises:
        CheckpointError: The first difference.
    """

    def __init__(
        self, model: nn.Module, config: PeftConfig, file: TensorFiles, adapter_name: str | None = None
    ) -> None:
        self.config, self.file, model = config, file, held_module(model)
        self.linears = {linear.name: linear for linear in hub_linears(model)}
        self.scale = FileScale.read(file.metadata, config, file.path)
        self.use_rslora = config.use_rslora if self.scale is None else self.scale.use_rslora
        self.names = FoundNames(model, config, file, self.linears)
        self._compare_targets()
        self.separate = self._separate_parts()
        self.canonical = False
        self.pairs = self._there(adapted_linears(model, adapter_name)) if _is_adapted(model) else self._new()
        self._compare_pairs()
        for pair in self.pairs:
            self._compare_tensors(pair)
        compare_base_copies(model, self.linears, self.names.base_copies, file)

    def _compare_targets(self) -> None:
        held, expected = self.names.held, self.names.targets()
        # Which layers `layers_to_transform` numbers, only the tensors tell.
        for name in sorted(set() if self.config.some_layers_only else expected - held):
            stacked = self.linears[name].is_stacked
            path = self.names.of_stack(name) if stacked else self.names.of_module(name)
            raise CheckpointError(f"{self.file.path} lacks {PREFIX}{path}.{FACTOR_A}, though its config targets {name}")
        for name in sorted(held - expected):
            raise CheckpointError(f"{self.file.path} holds an adapter for {name}, which its config does not target")

    def _separate_parts(self) -> dict[str, list[AdapterShape]]:
        """Find stacked experts whose gate and up have two A, or two shapes, in the file; return the shapes."""
        found = {}
        for name in sorted(self.names.held):
            linear = self.linears[name]
            parts = parts_of(linear.layout)
            if not linear.is_stacked or not self.names.per_expert or len(parts) == 1:
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
            for expert in range(linear.experts)
            for other in others
        )

    def _shape_of(self, name: str) -> AdapterShape:
        """Rank and alpha of our adapter on the module or parameter with this name in transformers."""
        shapes = self.separate.get(name)
        if shapes is None:
            return self._own(self.names.in_config(name)).shape
        rank, use_rslora = sum(shape.rank for shape in shapes), self.use_rslora
        return AdapterShape.of_scale(rank, shapes[0].scale(use_rslora), use_rslora)

    def _own(self, name: str) -> OwnAdapter:
        """Get the adapter of this name in the file, as it was where it was written."""
        own = None if self.scale is None else self.scale.own.get(name)
        return OwnAdapter(self.config.shape_of(name)) if own is None else own

    def _written(self, shape: AdapterShape) -> Written:
        return AS_THEY_ARE if self.scale is None else self.scale.written(shape)

    def _there(self, linears: list[AdaptedLinear]) -> list[FactorsInFile]:
        """List the pairs of the model's adapters."""
        return [FactorsInFile.of(linear, self._written(linear.shape)) for linear in linears]

    def _new(self) -> list[FactorsInFile]:
        """List the pairs of adapters that are to be made, by the method that the file allows."""
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
            found += [self._pair(module, group, shared=shared) for group in groups]
        return found

    def _why_separate(self, parts: list[HubLinear]) -> str | None:
        """Return why the file's modules cannot share one adapter on the fused layer; `None` if they can."""
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
                if self.linears[name].is_stacked:
                    pair = self._pair(self.linears[name].module, [self.linears[name]], shared=True)
                    for stored in self._stored(pair):
                        self._compare_shapes(stored)
                        stored.check_copies(self.file)
        except CheckpointError:
            return False
        return True

    def _pair(self, module: str, parts: list[HubLinear], *, shared: bool) -> FactorsInFile:
        layout: LinearLayout = parts[0].layout
        if self.canonical and parts[0].part is not None:
            layout = part_layout(layout, parts[0].part)
        factors = layout.for_all_experts() if layout.is_stacked and shared else layout
        shape = self._shape_of(parts[0].name)
        return FactorsInFile(
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

    def _compare_pairs(self) -> None:
        """Check that the adapters of the model are the file's, except for their values."""
        paired = {name: pair for pair in self.pairs for name in pair.names}
        for name in sorted({*paired, *self.names.held}):
            if name not in self.names.held:
                raise CheckpointError(f"the model has an adapter on {name}, {self.file.path} has none")
            if name not in paired:
                raise CheckpointError(f"{self.file.path} has an adapter on {name}, the model has none")
            pair, wanted = paired[name], self._shape_of(name)
            if pair.shape != wanted:
                raise CheckpointError(
                    f"{name}: the file's adapter has rank {wanted.rank} and alpha {wanted.alpha:g}, "
                    f"the model's rank {pair.shape.rank} and alpha {pair.shape.alpha:g}"
                )
            for option, theirs, ours in (
                ("use_rslora", self.use_rslora, pair.use_rslora),
                ("use_dora", self.config.use_dora, pair.magnitude is not None),
            ):
                if theirs != ours:
                    raise CheckpointError(f"{name}: {option} is {theirs} in the file, {ours} in the model")

    def _compare_tensors(self, pair: FactorsInFile) -> None:
        for stored in self._stored(pair):
            self._compare_shapes(stored)
            try:
                stored.check_copies(self.file)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{self.file.path}: {error}: the model's adapter on {pair.module} has one; load it into a model "
                    "without adapters"
                ) from error

    def _compare_shapes(self, stored: Stored) -> None:
        held = self.file.names()
        for key, shape in stored.declared():
            if key not in held:
                raise CheckpointError(f"{self.file.path} lacks {key}")
            if self.file.shape(key) != shape:
                raise CheckpointError(
                    f"{self.file.path}: {key} has shape {self.file.shape(key)}; the model and the config's rank say "
                    f"{shape}"
                )
            self.file.dtype(key, floating=True)

    def _stored(self, pair: FactorsInFile) -> list[Stored]:
        shapes = self.separate.get(pair.names[0])
        if shapes is None:
            return stored_factors(pair, self.names)
        if not pair.own_factors:
            raise CheckpointError(f"the parts of {pair.names[0]} have different A factors")
        ranks = [shape.rank for shape in shapes]
        scales = [shape.scale(self.use_rslora) for shape in shapes]
        a, b = (self.names.keys_by_part(pair.names[0], suffix) for suffix in (FACTOR_A, FACTOR_B))
        return [SeparateA(pair.a, a, ranks), SeparateB(pair.b, b, ranks, [scale / scales[0] for scale in scales])]

    def read(self, pair: FactorsInFile) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read this rank's slices of A, B and the magnitude, in fused order, each of its own type.

        The types are those of the file, except of a B that was widened when it was written, and of a magnitude that is
        narrower than float32.
        """
        a, b, *magnitudes = [stored.read(self.file) for stored in self._stored(pair)]
        b = pair.written.b_from_file(b, self._own(self.names.in_config(pair.names[0])).b_dtype)
        return a, b, _at_least_float32(magnitudes[0]) if magnitudes else None

    def adapted(self, model: Model, dtype: torch.dtype | None, trainable: bool) -> Model:
        """Put adapters of the file's method, ranks and targets on the model."""
        targets = [self._target(pair.module, name) for pair in self.pairs for name in pair.names]
        # Experts are one target as a whole, whatever parts of them were named.
        shapes = {
            pair.module if pair.is_stacked else self._target(pair.module, name): pair.shape
            for pair in self.pairs
            for name in pair.names
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
            share_expert_adapters=not any(pair.own_factors for pair in self.pairs),
            lora_dtype=dtype,
        )
        return method(model, training=trainable)

    def _method(self) -> type[LowRankPEFT]:
        return DoRA if self.config.use_dora else CanonicalLoRA if self.canonical else LoRA

    def _target(self, module: str, name: str) -> str:
        linear = self.linears[name]
        part = parts_of(linear.layout)[0] if linear.is_stacked else linear.part
        return component_name(module, part) if self.canonical and part is not None else module


def _is_adapted(model: nn.Module) -> bool:
    return next(adapter_wrappers(model), None) is not None


def _at_least_float32(magnitude: Tensor) -> Tensor:
    return magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))


_WRAPPER = re.compile(r"(.*\.experts)(\.base_layer)?")


class FoundNames:
    """The names in a file, every module of which is complete; see `Names`.

    Attributes:
        held: The layers, and parameters of stacked experts, that the file has adapters for, by their names in
            transformers.
        per_expert: Whether experts have tensors of their own.
        base_copies: Layers whose own weight is in the file, with its key.

    Raises:
        CheckpointError: A tensor is of no layer of the model, or is missing.
    """

    def __init__(
        self, model: nn.Module, config: PeftConfig, file: TensorFiles, linears: Mapping[str, HubLinear]
    ) -> None:
        self._model, self._linears, self._config, self._file = model, linears, config, file
        self._has_our_names = has_our_names(model)
        self._of_experts = {} if self._has_our_names else _names_of_experts(model, linears)
        # The names of the family's checkpoints.
        self._of_modules = {
            name_in_checkpoints(model, linear): name
            for name, linear in linears.items()
            if not (self._has_our_names or linear.is_stacked)
        }
        self._modules: dict[str, str] = {}
        self.base_copies: dict[str, str] = {}
        self._experts: dict[tuple[str, str | None, int], str] = {}
        stacks = [name for name, linear in linears.items() if linear.is_stacked]
        self._stacks = config.parameters(stacks)
        suffixes = [FACTOR_A, FACTOR_B, *([MAGNITUDE] if config.use_dora else [])]
        found = self._modules_with_tensors(suffixes)
        self.held = {self._recognise(path) for path in found}
        self.per_expert = bool(self._experts)
        if self.per_expert and any(_WRAPPER.fullmatch(path) for path in found):
            raise CheckpointError(f"{file.path} holds experts both stacked and one by one")
        for path, held in found.items():
            for suffix in suffixes:
                if suffix not in held:
                    raise CheckpointError(f"{file.path} lacks {PREFIX}{path}.{suffix}")
        for name in sorted(self.held):
            self._check_every_expert(name)

    def _modules_with_tensors(self, suffixes: list[str]) -> dict[str, set[str]]:
        """Map every module that has tensors in the file to their suffixes."""
        found: dict[str, set[str]] = {}
        for key in sorted(self._file.names()):
            module = key.removeprefix(PREFIX).removesuffix(f".{BASE_COPY}")
            if module in self._linears and key == f"{PREFIX}{module}.{BASE_COPY}":
                self.base_copies[module] = key
                continue
            suffix = next((suffix for suffix in suffixes if key.endswith(f".{suffix}")), None)
            if suffix is None or not key.startswith(PREFIX):
                method = "DoRA" if self._config.use_dora else "LoRA"
                raise CheckpointError(f"{self._file.path} holds {key!r}, which is not a tensor of a {method} adapter")
            found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), set()).add(suffix)
        if not found:
            raise CheckpointError(f"{self._file.path} holds no tensors")
        return found

    def _recognise(self, path: str) -> str:
        """Return the name in transformers of the module or parameter that a path in the file is for."""
        linear = self._linears.get(path)
        if linear is not None and not linear.is_stacked:
            self._modules[path] = path
            return path
        for stack in self._stacks:
            if peft_container(stack, self._stacks) == path:
                return stack
        if path in self._of_modules:
            self._modules[self._of_modules[path]] = path
            return self._of_modules[path]
        if path in self._of_experts:
            self._experts[self._of_experts[path]] = path
            return self._of_experts[path][0]
        if self._has_our_names:
            try:
                ours = our_module_name(path)
                if ours.expert is None:
                    name = hf_module_name(ours.module, ours.part)
                    if name in self._linears and not self._linears[name].is_stacked:
                        self._modules[name] = path
                        return name
                else:
                    name = hf_module_name(ours.module)
                    if name in self._linears:
                        self._experts[name, ours.part, ours.expert] = path
                        return name
            except ModelError:
                pass
        if _WRAPPER.fullmatch(path):
            raise CheckpointError(
                f"{self._file.path} has an adapter for {path}, but its config's target_parameters do not say for which "
                "of its parameters"
            )
        raise CheckpointError(
            f"{self._file.path} holds {PREFIX}{path}.{FACTOR_A!r}, but the model has no linear layer {path}"
        )

    def _check_every_expert(self, name: str) -> None:
        linear = self._linears[name]
        if not linear.is_stacked or not self.per_expert:
            return
        for expert in range(linear.experts):
            for part in parts_of(linear.layout):
                if (name, part, expert) not in self._experts:
                    name_of = hf_module_name if self._has_our_names else partial(expert_module_name, self._model)
                    missing = name_of(linear.module, part, expert=expert)
                    raise CheckpointError(f"{self._file.path} lacks {PREFIX}{missing}.{FACTOR_A}")
        for other, part, expert in self._experts:
            if other == name and expert >= linear.experts:
                raise CheckpointError(
                    f"{self._file.path} holds an adapter for {self._experts[other, part, expert]}; the model has "
                    f"{linear.experts} experts"
                )

    def of_module(self, name: str) -> str:
        """Name in the file of the layer with this name in transformers."""
        return self._modules.get(name, name)

    def swaps(self, name: str) -> bool:
        """Whether the file has the factors of such a parameter in each other's place, transposed."""
        return is_swapped_by_peft(self._model, self._linears[name].module)

    def of_stack(self, name: str) -> str:
        """Name in the file of a parameter of stacked experts: what stands before `lora_A`."""
        return peft_container(name, self._stacks)

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """Name in the file of one expert's part of such a parameter."""
        return self._experts[name, part, expert]

    def keys_by_part(self, name: str, suffix: str) -> list[list[str]]:
        """List, for each part of stacked experts, every expert's key."""
        linear = self._linears[name]
        return [
            [f"{PREFIX}{self.of_expert(name, part, expert)}.{suffix}" for expert in range(linear.experts)]
            for part in parts_of(linear.layout)
        ]

    def in_config(self, name: str) -> str:
        """Name that the config's patterns match."""
        linear = self._linears[name]
        if not linear.is_stacked:
            weight = f"{name}.weight"
            return weight if self._config.parameters([weight]) else self.of_module(name)
        return self.of_expert(name, parts_of(linear.layout)[0], 0) if self.per_expert else name

    def targets(self) -> set[str]:
        """Find the layers and parameters that the config targets."""
        found = set()
        for name, linear in self._linears.items():
            if not linear.is_stacked:
                names = [self.of_module(name)]
                targeted = self._config.targets(names) or self._config.parameters([f"{name}.weight"])
            elif self.per_expert:
                paths = [self._experts.get((name, part, 0)) for part in parts_of(linear.layout)]
                targeted = self._config.targets([path for path in paths if path is not None])
            else:
                targeted = self._config.parameters([name])
            found |= {name} if targeted else set()
        return found


def _names_of_experts(model: nn.Module, linears: Mapping[str, HubLinear]) -> dict[str, tuple[str, str | None, int]]:
    """Map the name that each expert's parts have in files to the parameter, part and expert in transformers."""
    return {
        expert_module_name(model, linear.module, part, expert): (name, part, expert)
        for name, linear in linears.items()
        if linear.is_stacked and has_expert_names(model, linear.module)
        for part in parts_of(linear.layout)
        for expert in range(linear.experts)
    }


BASE_COPY = "base_layer.weight"
"""What follows a module's name in the key of a copy of its weight."""


@torch.no_grad()
def compare_base_copies(
    model: nn.Module, linears: Mapping[str, HubLinear], copies: Mapping[str, str], file: TensorFiles
) -> None:
    """Compare copies of the base's weights with the model's own. A weight that is packed, or has no values, is not.

    Args:
        model: With or without adapters.
        linears: Its layers by their names in transformers.
        copies: Name of a layer -> key of the copy in the file.
        file: File of the adapter.

    Raises:
        CheckpointError: The adapter was made on another base.
    """
    for name, key in copies.items():
        layer = model.get_submodule(linears[name].module)
        base = base_of(layer)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            continue
        layout = layout_of(base).weight()
        own = dict(zip((piece.part for piece in layout.pieces()), layout.split_parts(weight), strict=True))
        [piece] = [piece for piece in layout.pieces() if piece.part == linears[name].part]
        stored = file.shape(key)
        if stored != piece.global_shape:
            raise CheckpointError(
                f"{file.path}: {key} has shape {stored}, the model's {name}.weight {piece.global_shape}; "
                "the adapter is of another base"
            )
        if bool((file.read_box(key, piece.offset, piece.shape).to(weight) != own[piece.part]).any()):
            raise CheckpointError(
                f"{file.path}: {key} has other values than the model's {name}.weight; the adapter is of another base, "
                "or was trained together with this weight"
            )
