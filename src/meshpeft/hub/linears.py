"""The linear layers of a model and the adapters on them, under the names of Hugging Face modules.

A fused layer is one module of ours and several there; stacked experts are a parameter there. What each method's
adapter consists of is said here once, in `adapted_linears`; export and import read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from meshpeft.hub.adapter_config import AdapterShape
from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.fsdp import gathered, sharded_like, sharded_parameters
from meshpeft.hub.names import hf_module_name
from meshpeft.models import Decoder, ModelError
from meshpeft.parallel import describe_layers, parallel_group_info
from meshpeft.parallel.held_modules import held_module
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.layer_types import layer_type_of
from meshpeft.parallel.tensor_layout import TensorLayout, layout_of_tensor
from meshpeft.peft import (
    AdapterWrapper,
    DoRALinear,
    LoRALinear,
    LoRALinearSplitFC1UpGate,
    LoRALinearSplitQKV,
    LowRankAdapter,
)
from meshpeft.peft.matching import walk
from meshpeft.peft.named import NamedLoRALinear

__all__ = ["AdaptedLinear", "Factor", "HubLinear", "adapted_linears", "has_our_names", "hub_linears", "is_adapted"]


@dataclass(frozen=True)
class HubLinear:
    """A linear layer, or a stack of experts, as the models of transformers have it.

    Attributes:
        name: its full name there; of the parameter, for stacked experts.
        module: our module's full name.
        part: which part of our module it is; `None` where ours is not fused.
        layout: of our module.
    """

    name: str
    module: str
    part: str | None
    layout: LinearLayout

    @property
    def experts(self) -> int | None:
        """Number of stacked experts; `None` for an ordinary layer."""
        return self.layout.experts


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
        """The full tensor in canonical order. A collective.

        Raises:
            CheckpointError: the parameter is a flat shard.
        """
        local = gathered(self.values)
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
        self.values.copy_(sharded_like(local, self.values))

    def beside(self, others: Tensor, dim: int) -> Factor:
        """These values and as many others, along the dim of the rank."""
        shape = list(self.layout.global_shape)
        shape[dim] *= 2
        return Factor(torch.cat([gathered(self.values), others], dim), replace(self.layout, global_shape=tuple(shape)))


@dataclass(frozen=True)
class AdaptedLinear:
    """One pair of factors on one layer of ours: on all its parts together, or on one of them.

    Attributes:
        adapter: the module that holds the parameters.
        module: full name of the layer.
        names: the Hugging Face modules, in the canonical order of B's rows; they share A. For stacked experts the
            one parameter.
        a, b: the factors.
        magnitude: of DoRA, else `None`.
        shape, use_rslora, dropout: as in an `adapter_config.json`.
        experts: number of stacked experts; `None` for an ordinary layer.
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
    experts: int | None = None

    def cast(self, a: torch.dtype, b: torch.dtype, magnitude: torch.dtype | None) -> None:
        """Give each parameter a type of its own."""
        if magnitude is not None:
            self.adapter.to(magnitude)
        self.adapter.linear_in.to(a)
        self.adapter.linear_out.to(b)


def hub_linears(model: nn.Module) -> list[HubLinear]:
    """Every linear layer, and stack of experts, that an adapter can be on and that Hugging Face models have.

    Names are those of `meshpeft.hub.names` for a decoder, ours or Megatron's; another model's own otherwise.

    Raises:
        CheckpointError: a stage of a pipeline of Megatron's, or a part of a model.
    """
    model = held_module(model)
    if _is_of(model, "megatron.core"):
        _check_whole(model)
        describe_layers(model)
    found, sharded = [], sharded_parameters(model)
    for place, module in walk(model):
        layer = module.to_wrap if isinstance(module, AdapterWrapper) else module
        layer_type = layer_type_of(layer)
        if layer_type is None:
            continue
        name = place.full_name
        if isinstance(layer, nn.Linear) and id(layer._parameters["weight"]) in sharded:  # no tensor parallel's DTensor
            layout = LinearLayout(layer.in_features, layer.out_features)
        else:
            layout = layer_type.layout(layer)
        packed = layout.fused_parts is not None and layout.experts is None and not _is_of(model, "transformers")
        parts: tuple[str | None, ...] = (
            layout.fused_parts.names if packed and layout.fused_parts is not None else (None,)
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
    """Whether the layers are called as those of our decoder: it is one, or one of Megatron's, whose names these are."""
    return isinstance(model, Decoder) or _is_of(model, "megatron.core")


def _is_of(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or one that it derives from, is a package's.

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


def is_adapted(model: nn.Module) -> bool:
    """Whether a model carries any adapter."""
    return any(isinstance(module, AdapterWrapper) for module in model.modules())


def adapted_linears(model: nn.Module, adapter_name: str | None = None) -> list[AdaptedLinear]:
    """The adapters on a model, in the order of its layers.

    Args:
        model: the model.
        adapter_name: which of its named adapters; `None` where all of them have one name, or none.

    Raises:
        CheckpointError: an adapter has no counterpart in Hugging Face PEFT, or the model has none at all, or several
            of which no name chooses one, or none of this name.
    """
    adapter_name = _chosen_name(model, adapter_name)
    parts: dict[str, dict[str | None, HubLinear]] = {}
    for linear in hub_linears(model):
        parts.setdefault(linear.module, {})[linear.part] = linear
    found = [
        adapted
        for place, wrapper in walk(model)
        if isinstance(wrapper, AdapterWrapper)
        for adapted in _of_wrapper(place.full_name, wrapper, parts.get(place.full_name, {}), adapter_name)
    ]
    if not found:
        raise CheckpointError("the model carries no adapter")
    return found


def _chosen_name(model: nn.Module, wanted: str | None) -> str | None:
    """The name of the named adapters that are meant; `None` for a model without any."""
    wrappers = [module for module in model.modules() if isinstance(module, NamedLoRALinear)]
    names = sorted({name for wrapper in wrappers for name in wrapper.adapter_names})
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


def _of_wrapper(
    module: str, wrapper: AdapterWrapper, parts: dict[str | None, HubLinear], adapter_name: str | None
) -> Iterator[AdaptedLinear]:
    whole = list(parts.values())
    if parts and isinstance(wrapper, NamedLoRALinear):
        named = dict(wrapper.named_adapters()).get(adapter_name or "")
        if named is not None:
            yield _of_adapter(module, whole, named, None)
    elif parts and isinstance(wrapper, LoRALinear | DoRALinear) and wrapper.adapter.is_linear:
        magnitude = None
        if isinstance(wrapper, DoRALinear):
            magnitude = Factor.of(wrapper.adapter.weight_magnitude, wrapper.adapter.magnitude_layout)
        yield _of_adapter(module, whole, wrapper.adapter, magnitude)
    elif (
        isinstance(wrapper, LoRALinearSplitQKV | LoRALinearSplitFC1UpGate) and parts.keys() >= wrapper.adapters().keys()
    ):
        for part, adapter in wrapper.adapters().items():
            yield _of_adapter(module, [parts[part]], adapter, None)
    else:
        raise CheckpointError(
            f"{module}: a {type(wrapper).__name__} on a {type(wrapper.to_wrap).__name__} has no counterpart in "
            "Hugging Face PEFT's format; merge the adapter and save the model instead"
        )


def _of_adapter(
    module: str, parts: list[HubLinear], adapter: LowRankAdapter, magnitude: Factor | None
) -> AdaptedLinear:
    a, b = (Factor.of(factor.weight, factor.layout) for factor in (adapter.linear_in, adapter.linear_out))
    shape = AdapterShape(adapter.dim, adapter.alpha)
    start_a, start_b = adapter.linear_in.start, adapter.linear_out.start
    if start_a is not None and start_b is not None:
        # On the base as its files have it, the adapter is what it has become, less what the base gave up.
        a, b = a.beside(start_a, -2), b.beside(-start_b, -1)
        shape = AdapterShape.of_scale(2 * adapter.dim, adapter.scale, adapter.use_rslora)
    return AdaptedLinear(
        adapter,
        module,
        tuple(part.name for part in parts),
        a,
        b,
        magnitude,
        shape,
        adapter.use_rslora,
        adapter.dropout,
        parts[0].experts,
    )
