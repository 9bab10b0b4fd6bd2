"""The adapters on a model, and the tensors of a PEFT file that hold their parameters.

A fused layer is one module here and several in the file; stacked experts are a parameter there. `adapted_linears` lists
the pairs of factors on a model, under the names of Hugging Face modules; `stored_factors` describes the tensors of each
pair (see `meshpeft.hub.names`). Export and import both read these.

Adapters of models with experts have two forms:

* `peft`, as peft adapts transformers' models: two matrices for each parameter of stacked experts (`target_parameters`).
  Routers, and MLPs next to experts, are adapted by their parameters as well.
* `peft-per-expert`, as serving systems read them, and as they were when every expert was a module: A and B of each
  expert's gate, up and down projection, under the names of the family's checkpoints.

An adapter that all experts share is written once for each of them, in both.

Between two steps every parameter of a model under PyTorch's `fully_shard` (FSDP2) is a DTensor, in the place of the one
that had a layout. Each rank holds 1 / world of its rows; only the gathered tensor is the adapter's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from meshpeft.engines.transformers_experts import has_grouped_experts
from meshpeft.hub.adapter_config import FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, AdapterShape
from meshpeft.hub.adapter_scales import AS_THEY_ARE, Written
from meshpeft.hub.names import (
    StackedA,
    StackedB,
    Stored,
    StoredTensor,
    StoredTensors,
    Transposed,
    expert_module_name,
    hf_module_name,
    is_swapped_by_peft,
)
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.models import Decoder, DecoderConfig, ModelError
from meshpeft.parallel import describe_layers, parallel_group_info
from meshpeft.parallel.layout import LinearLayout, TensorLayout, layout_of_tensor
from meshpeft.parallel.registry import layer_type_of
from meshpeft.parallel.sharded_tensor import held_module
from meshpeft.peft import AdapterTerm, AdapterWrapper, LowRankAdapter, adapted_layers, base_of, walk

__all__ = [
    "AdaptedLinear",
    "AdapterFormat",
    "Factor",
    "HubLinear",
    "Names",
    "FactorsInFile",
    "WrittenNames",
    "adapted_linears",
    "has_our_names",
    "hub_linears",
    "is_adapted_as_parameter",
    "name_in_checkpoints",
    "parts_of",
    "peft_container",
    "refuse_sharded",
    "reshard",
    "sharded_parameters",
    "stored_factors",
]

AdapterFormat = Literal["peft", "peft-per-expert"]

# peft wraps a module with two adapted parameters twice; the one that the module lists first is inside.
_INNER, _NESTED = ("gate_up_proj", "up_proj"), "base_layer"

_RANK_DIMS = {FACTOR_A: -2, FACTOR_B: -1}


@dataclass(frozen=True)
class HubLinear:
    """A linear layer, or a stack of experts, as the models of transformers have it.

    Attributes:
        name: Its full name there; of the parameter, for stacked experts.
        module: Our module's full name.
        part: Part of our module that it is; `None` where ours is not fused.
        layout: Layout of our module.
    """

    name: str
    module: str
    part: str | None
    layout: LinearLayout

    @property
    def experts(self) -> int:
        """Number of stacked experts; 0 for an ordinary layer."""
        return self.layout.experts or 0

    @property
    def is_stacked(self) -> bool:
        """Whether the layer is a stack of experts."""
        return self.layout.is_stacked


@dataclass(frozen=True)
class Factor:
    """A parameter of an adapter, local, with its layout."""

    values: Tensor
    layout: TensorLayout

    @classmethod
    def of(cls, parameter: Tensor, layout: TensorLayout) -> Factor:
        """Read the layout that the parameter states; `layout` where it was replaced by one that states none."""
        return cls(parameter, layout_of_tensor(parameter) or layout)

    def full(self) -> Tensor:
        """Gather the full tensor in canonical order. A collective.

        Raises:
            CheckpointError: The parameter is a flat shard.
        """
        local = _gathered(self.values)
        if tuple(local.shape) != self.layout.local_shape:
            raise CheckpointError(
                f"an adapter's parameter has shape {tuple(local.shape)}, expected {self.layout.local_shape}: "
                "FullyShardedDataParallel (FSDP1) flattens parameters; export under its "
                "summon_full_params(model, writeback=False), or shard with fully_shard"
            )
        # A copy: numpy, by which it is written, keeps a storage from being resized, as FSDP does with parameters'.
        return self.layout.gather(local.detach().clone())

    def fill(self, local: Tensor) -> None:
        """Set the values to this rank's slice."""
        self.values.copy_(_sharded_like(local, self.values))

    def extended(self, others: Tensor, dim: int) -> Factor:
        """Put as many other values behind these, along the dim of the rank."""
        shape = list(self.layout.global_shape)
        shape[dim] *= 2
        return Factor(torch.cat([_gathered(self.values), others], dim), replace(self.layout, global_shape=tuple(shape)))


@dataclass(frozen=True)
class AdaptedLinear:
    """One pair of factors on one layer of ours: on all its parts together, or on one of them.

    Attributes:
        adapter: The module that holds the parameters.
        module: Full name of the layer.
        names: The Hugging Face modules, in the canonical order of B's rows; they share A. For stacked experts the
            one parameter.
        a, b: The factors.
        magnitude: Magnitude of DoRA, else `None`.
        shape, use_rslora, dropout: Options, as in an `adapter_config.json`.
        experts: Number of stacked experts; 0 for an ordinary layer.
    """

    adapter: LowRankAdapter
    module: str
    names: tuple[str, ...]
    a: Factor
    b: Factor
    magnitude: Factor | None
    shape: AdapterShape
    use_rslora: bool
    dropout: float
    experts: int = 0

    @property
    def is_stacked(self) -> bool:
        """Whether the adapted layer is a stack of experts."""
        return self.experts > 0

    def cast(self, a: torch.dtype, b: torch.dtype, magnitude: torch.dtype | None) -> None:
        """Give each parameter a type of its own."""
        if magnitude is not None:
            self.adapter.to(magnitude)
        self.adapter.linear_in.to(a)
        self.adapter.linear_out.to(b)


def hub_linears(model: nn.Module) -> list[HubLinear]:
    """List the linear layers and stacks of experts that an adapter can be on and that Hugging Face models have.

    Names are those of `meshpeft.hub.names` for a decoder, ours or Megatron's; another model's own otherwise.

    Raises:
        CheckpointError: A stage of a pipeline of Megatron's, or a part of a model.
    """
    model = held_module(model)
    if _is_of(model, "megatron.core"):
        _check_whole(model)
        describe_layers(model)
    found, sharded = [], sharded_parameters(model)
    for path, module in walk(model):
        layer = base_of(module)
        layer_type = layer_type_of(layer)
        if layer_type is None:
            continue
        name = path.full_name
        # A packed layer has no parameter of that name, and none that `fully_shard` could have sharded.
        if isinstance(layer, nn.Linear) and id(layer._parameters.get("weight")) in sharded:
            layout = LinearLayout(layer.in_features, layer.out_features)
        else:
            layout = layer_type.layout(layer)
        in_parts = layout.fused_parts is not None and not layout.is_stacked and not _is_of(model, "transformers")
        parts: tuple[str | None, ...] = (
            layout.fused_parts.names if in_parts and layout.fused_parts is not None else (None,)
        )
        for part in parts:
            hub_name = _hub_name(model, name, part)
            if hub_name is not None:
                found.append(HubLinear(hub_name, name, part, layout))
    return found


def _hub_name(model: nn.Module, name: str, part: str | None) -> str | None:
    if not has_our_names(model):
        return name if part is None else None
    try:
        return hf_module_name(name, part)
    except ModelError:
        return None


def has_our_names(model: nn.Module) -> bool:
    """Whether the layers have the names of our decoder, which are Megatron's."""
    return isinstance(model, Decoder) or _is_of(model, "megatron.core")


def _is_of(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or a base class of it, is defined in a package.

    Layers of transformers' models have the names and the form that its files have.
    """
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(model).__mro__)


def _check_whole(model: nn.Module) -> None:
    if not hasattr(model, "decoder"):
        raise CheckpointError(
            f"a {type(model).__name__} is no model that Hugging Face has, but may hold one or be a part of one: give "
            "the GPTModel (of a list of chunks the only one)"
        )
    stages = parallel_group_info().pp.world_size
    if stages > 1:
        raise CheckpointError(
            f"a GPTModel of a pipeline with {stages} stages has the layers of one of them, and the file would lack the "
            "others'; save with megatron.core.dist_checkpointing, load without pipeline parallel, and export then"
        )


def adapted_linears(model: nn.Module, adapter_name: str | None = None) -> list[AdaptedLinear]:
    """List the adapters on a model, in the order of its layers.

    Args:
        model: The model.
        adapter_name: Which of its named adapters; `None` where all of them have one name, or none.

    Raises:
        CheckpointError: An adapter has no counterpart in Hugging Face PEFT; or the model has none at all, or several of
            which no name chooses one, or none of this name.
    """
    wrappers = list(adapted_layers(model))
    adapter_name = _chosen_name(wrappers, adapter_name)
    parts: dict[str, dict[str | None, HubLinear]] = {}
    for linear in hub_linears(model):
        parts.setdefault(linear.module, {})[linear.part] = linear
    found = [
        _adapted(name, own, term)
        for name, wrapper in wrappers
        for term, own in _terms(name, wrapper, parts.get(name, {}), adapter_name)
    ]
    if not found:
        raise CheckpointError("the model carries no adapter")
    return found


def _chosen_name(wrappers: list[tuple[str, AdapterWrapper]], wanted: str | None) -> str | None:
    """Choose the name of the adapters that are meant; `None` for a model without named ones."""
    names = sorted({term.name for _, wrapper in wrappers for term in wrapper.terms() if term.name is not None})
    if wanted is None and len(names) < 2:
        return names[0] if names else None
    if wanted in names:
        return wanted
    if not names:
        raise CheckpointError(f"adapter_name={wanted!r}: the model's adapters have no names; leave it out")
    raise CheckpointError(
        f"adapter_name={wanted!r}: the model has adapters named {', '.join(names)}; choose one of them, for a file "
        "holds one"
    )


def _terms(
    module: str, wrapper: AdapterWrapper, parts: Mapping[str | None, HubLinear], adapter_name: str | None
) -> Iterator[tuple[AdapterTerm, list[HubLinear]]]:
    """Yield the terms of a layer's adapter that are meant, each with the parts of the layer that it is on."""
    terms = wrapper.terms()
    expressible = bool(parts) and bool(terms)
    for term in terms:
        if not term.adapter.is_linear or not (term.part is None or term.part in parts):
            expressible = False
    if not expressible:
        raise CheckpointError(
            f"{module}: a {type(wrapper).__name__} on a {type(wrapper.to_wrap).__name__} has no counterpart in "
            "Hugging Face PEFT's format; merge the adapter and save the model instead"
        )
    for term in terms:
        if term.name in (None, adapter_name):
            yield term, list(parts.values()) if term.part is None else [parts[term.part]]


def _adapted(module: str, parts: list[HubLinear], term: AdapterTerm) -> AdaptedLinear:
    adapter = term.adapter
    a, b = (Factor.of(factor.weight, factor.layout) for factor in (adapter.linear_in, adapter.linear_out))
    shape = AdapterShape(adapter.dim, adapter.alpha)
    start_a, start_b = adapter.linear_in.start, adapter.linear_out.start
    if start_a is not None and start_b is not None:
        # On the base as its files have it, the adapter is what it has become, less what the base gave up.
        a, b = a.extended(start_a, -2), b.extended(-start_b, -1)
        shape = AdapterShape.of_scale(2 * adapter.dim, adapter.scale, adapter.use_rslora)
    return AdaptedLinear(
        adapter,
        module,
        tuple(part.name for part in parts),
        a,
        b,
        _magnitude(adapter),
        shape,
        adapter.use_rslora,
        adapter.dropout,
        parts[0].experts,
    )


def _magnitude(adapter: Any) -> Factor | None:
    values: Tensor | None = getattr(adapter, "weight_magnitude", None)
    return None if values is None else Factor.of(values, adapter.magnitude_layout)


@dataclass(frozen=True)
class FactorsInFile:
    """One pair of factors of ours, and the modules of the file that hold it.

    Attributes:
        module: Full name of our layer.
        names: The file's modules, which share A; or the parameter of stacked experts.
        a, b, magnitude: Layouts of the parameters.
        shape: Rank and alpha.
        use_rslora: How they scale.
        experts: Number of stacked experts; 0 for an ordinary layer.
        written: How the file has the factors.
    """

    module: str
    names: tuple[str, ...]
    a: TensorLayout
    b: TensorLayout
    magnitude: TensorLayout | None
    shape: AdapterShape
    use_rslora: bool
    experts: int = 0
    written: Written = AS_THEY_ARE

    @property
    def is_stacked(self) -> bool:
        """Whether the adapted layer is a stack of experts."""
        return self.experts > 0

    @classmethod
    def of(cls, linear: AdaptedLinear, written: Written = AS_THEY_ARE) -> FactorsInFile:
        """Find where the factors of an adapter on the model are in a file."""
        return cls(
            linear.module,
            linear.names,
            linear.a.layout,
            linear.b.layout,
            None if linear.magnitude is None else linear.magnitude.layout,
            linear.shape,
            linear.use_rslora,
            linear.experts,
            written,
        )

    @property
    def own_factors(self) -> bool:
        """Whether each expert has factors of its own."""
        return self.a.is_stacked

    @property
    def layouts(self) -> tuple[tuple[TensorLayout, str], ...]:
        """Layout of each parameter, with the suffix of its tensors."""
        magnitudes = () if self.magnitude is None else ((self.magnitude, MAGNITUDE),)
        return ((self.a, FACTOR_A), (self.b, FACTOR_B), *magnitudes)


class Names(Protocol):
    """The names in a file of our layers."""

    @property
    def per_expert(self) -> bool:
        """Whether experts have tensors of their own."""

    def of_module(self, name: str) -> str:
        """Name in the file of the layer with this name in transformers."""

    def of_stack(self, name: str) -> str:
        """Name in the file of a parameter of stacked experts: what stands before `lora_A`."""

    def swaps(self, name: str) -> bool:
        """Whether the file has the factors of such a parameter in each other's place, transposed."""

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """Name in the file of one expert's part of such a parameter."""


@dataclass(frozen=True)
class WrittenNames:
    """The names that an export uses.

    Attributes:
        format: Format of the file.
        linears: Every layer of the model, by name.
        stacks: The stacked experts that have an adapter.
        model: The model.
    """

    format: AdapterFormat
    linears: Mapping[str, HubLinear]
    stacks: Mapping[str, HubLinear]
    model: nn.Module

    @property
    def per_expert(self) -> bool:
        """Whether experts have tensors of their own."""
        return self.format == "peft-per-expert"

    def of_module(self, name: str) -> str:
        """Name in the file of the layer with this name in transformers."""
        if not self.per_expert:
            return name
        return name_in_checkpoints(self.model, self.linears[name])

    def of_stack(self, name: str) -> str:
        """Name in the file of a parameter of stacked experts: what stands before `lora_A`."""
        return peft_container(name, self.stacks)

    def swaps(self, name: str) -> bool:
        """Whether the file has the factors of such a parameter in each other's place, transposed."""
        return is_swapped_by_peft(self.model, self.linears[name].module)

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """Name in the file of one expert's part of such a parameter."""
        return expert_module_name(self.model, self.linears[name].module, part, expert)

    def of_experts(self, name: str) -> list[str]:
        """List the names of all parts of all experts of such a parameter."""
        layout = self.linears[name].layout
        return [
            self.of_expert(name, part, expert) for expert in range(layout.experts or 0) for part in parts_of(layout)
        ]

    def of_first_expert(self, name: str) -> list[str]:
        """List the names of the first expert's parts, under which a file's header describes all experts."""
        return [self.of_expert(name, part, 0) for part in parts_of(self.linears[name].layout)]

    def of_all(self, skip: Collection[str]) -> list[str]:
        """List the names of all layers that are modules, except `skip`, which are adapted by their parameter."""
        found: list[str] = []
        for name, linear in self.linears.items():
            if not linear.is_stacked:
                found += [] if name in skip else [self.of_module(name)]
            elif self.per_expert:
                found += self.of_experts(name)
        return found


def name_in_checkpoints(model: nn.Module, linear: HubLinear) -> str:
    """Name a layer that is no stack of experts as the family's checkpoints on the hub do."""
    if isinstance(model, Decoder):
        return hf_module_name(linear.module, linear.part, model_type=model.config.model_type)
    stored: Mapping[str, str] = getattr(model, "stored_names", {})
    return stored.get(f"{linear.name}.weight", linear.name).removesuffix(".weight")


def peft_container(name: str, adapted: Collection[str]) -> str:
    """Name peft's module for a parameter of stacked experts: `..mlp.experts`, or `..mlp.experts.base_layer`.

    Args:
        name: `..mlp.experts.gate_up_proj` (`up_proj` without a gate) or `..mlp.experts.down_proj`.
        adapted: All such parameters that have an adapter.
    """
    container, _, leaf = name.rpartition(".")
    both = any(other != name and other.rpartition(".")[0] == container for other in adapted)
    return f"{container}.{_NESTED}" if both and leaf in _INNER else container


def is_adapted_as_parameter(model: nn.Module, name: str) -> bool:
    """Whether peft reaches a layer of a model with experts only by its parameter `{name}.weight`.

    Routers are no linear layers in transformers; and peft (0.21) takes any target that ends like a projection of the
    experts for the experts themselves, in the families whose files have these one by one as those of Qwen2-MoE or
    Mixtral have them.
    """
    config: Any = getattr(model, "config", None)
    if name.rpartition(".")[2] not in ("gate", "gate_proj", "up_proj", "down_proj"):
        return False
    if isinstance(config, DecoderConfig):
        return config.moe is not None
    if has_grouped_experts(model):
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN  # heavy, and loaded with the model

        return _MODEL_TO_CONVERSION_PATTERN.get(config.model_type) in ("mixtral", "qwen2_moe")
    counts = ("num_experts", "num_local_experts", "num_moe_experts")  # of transformers, and of Megatron
    return any(getattr(config, count, None) for count in counts)


def parts_of(layout: LinearLayout) -> tuple[str | None, ...]:
    """Parts of a layer's output, such as gate and up; `(None,)` for one that is not fused."""
    return (None,) if layout.fused_parts is None else layout.fused_parts.names


def stored_factors(pair: FactorsInFile, names: Names) -> list[Stored]:
    """Describe the tensors of a file that hold A, B, and the magnitude if there is one."""
    if not pair.is_stacked:
        return [_by_module(pair, names, layout, suffix) for layout, suffix in pair.layouts]
    if names.per_expert:
        return [_by_expert(pair, names, layout, suffix) for layout, suffix in pair.layouts]
    prefix = f"{PREFIX}{names.of_stack(pair.names[0])}"

    def in_a(layout: TensorLayout) -> Stored:
        return StackedA(layout, f"{prefix}.{FACTOR_A}", pair.experts, pair.own_factors, pair.written.rank)

    def in_b(layout: TensorLayout) -> Stored:
        return StackedB(layout, f"{prefix}.{FACTOR_B}", pair.experts, pair.own_factors, pair.written.rank)

    if names.swaps(pair.names[0]):
        return [Transposed.of(pair.a, in_b), Transposed.of(pair.b, in_a)]
    return [in_a(pair.a), in_b(pair.b)]


def _by_module(pair: FactorsInFile, names: Names, layout: TensorLayout, suffix: str) -> StoredTensors:
    # A layer of transformers' own that fuses its parts is one module there, too.
    by_part = suffix != FACTOR_A and layout.fused_parts is not None and len(pair.names) > 1
    return StoredTensors(
        layout,
        [
            StoredTensor(f"{PREFIX}{names.of_module(name)}.{suffix}", number if by_part else None)
            for number, name in enumerate(pair.names)
        ],
        rank_dim=_RANK_DIMS.get(suffix),
        rank=pair.written.rank,
    )


def _by_expert(pair: FactorsInFile, names: Names, layout: TensorLayout, suffix: str) -> StoredTensors:
    by_part = suffix != FACTOR_A and layout.fused_parts is not None

    def tensors() -> Iterator[StoredTensor]:
        for expert in range(pair.experts):
            for number, part in enumerate((None,) if pair.b.fused_parts is None else pair.b.fused_parts.names):
                key = f"{PREFIX}{names.of_expert(pair.names[0], part, expert)}.{suffix}"
                yield StoredTensor(key, number if by_part else None, expert)

    # Of DoRA experts that share A and B, each has its own magnitude.
    stacked = len(layout.global_shape) == (2 if suffix == MAGNITUDE else 3)
    return StoredTensors(layout, list(tensors()), stacked, _RANK_DIMS.get(suffix), pair.written.rank)


def sharded_parameters(model: nn.Module) -> frozenset[int]:
    """Collect the ids of the parameters that `fully_shard` manages and that are sharded now."""
    return frozenset(
        id(parameter.sharded_param)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for parameter in group.fsdp_params
    )


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """Refuse a model that `fully_shard` sharded, where its slices cannot be used.

    Args:
        model: The model.
        instead: What to do, for the message.

    Raises:
        CheckpointError: A parameter is sharded.
    """
    sharded = sharded_parameters(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in sharded:
            raise CheckpointError(f"{name} is sharded by PyTorch's fully_shard, whose slices are not ours: {instead}")


def reshard(model: nn.Module) -> None:
    """Free what a forward pass left gathered, in the type that it computes in; the sharded values are the real ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gathered(values: Tensor) -> Tensor:
    """Gather the full tensor of a DTensor, a collective; return another tensor unchanged."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def _sharded_like(values: Tensor, target: Tensor) -> Tensor:
    """Shard a tensor that every rank holds as `target` is sharded."""
    if not isinstance(target, DTensor):
        return values
    values = values.to(target.device, target.dtype)
    with torch.no_grad():
        return distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
