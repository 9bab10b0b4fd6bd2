"""What modules that hold layers say about them, where the layers themselves cannot.

A foreign layer does not know that its output packs q, k and v, nor that it belongs to expert 6 of 8: the module
around it does. A container type is registered like a layer type, in one place, by the engine that knows the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from meshpeft.parallel.class_registry import ClassRegistry
from meshpeft.parallel.layer_types import layer_type_of
from meshpeft.parallel.tensor_layout import FusedParts

__all__ = [
    "ContainerType",
    "container_type_of",
    "describe_layers",
    "global_names",
    "fused_parts_of",
    "register_container_type",
    "register_description",
]


@dataclass(frozen=True)
class ContainerType:
    """The registry's entry for one class of modules that hold layers.

    Attributes:
        fused_parts: name of a child layer -> the canonical parts of its output features.
        names: module below this one -> its own name, where it differs from the one that its parent gave it: numbers
            of layers and experts that count those of this rank only, as the global number.
        adapted: called on a model to which adapters were applied, once its trainable parameters are known; again
            each time.
    """

    fused_parts: Callable[[Any], Mapping[str, FusedParts]] | None = None
    names: Callable[[Any], Mapping[nn.Module, str]] | None = None
    adapted: Callable[[Any], None] | None = None


_CONTAINER_TYPES: ClassRegistry[ContainerType] = ClassRegistry()


def register_container_type(cls: type[nn.Module], container_type: ContainerType) -> None:
    """State what modules of `cls`, and of its subclasses that do not say otherwise, know about their layers."""
    _CONTAINER_TYPES.add(cls, container_type)


def container_type_of(module: nn.Module) -> ContainerType | None:
    """The entry of the nearest registered class of `module`, or `None`."""
    return _CONTAINER_TYPES.find(module)


def global_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module below `model` whose own name is not the one that its parent gave it, with its global one."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        container = container_type_of(module)
        if container is not None and container.names is not None:
            found.update(container.names(module))
    return found


_ATTRIBUTE = "meshpeft_fused_parts"
_descriptions: list[Callable[[nn.Module], None]] = []


def register_description(describe: Callable[[nn.Module], None]) -> None:
    """Let an engine describe layers that are of no class of its own, in models that are.

    Args:
        describe: called on a model; it calls `set_surroundings` on such layers in it.
    """
    _descriptions.append(describe)


def describe_layers(model: nn.Module) -> None:
    """Let every layer in `model` know what only the modules around it know, for its layout.

    Applying an adapter method does it first; call it before reading the layouts of a foreign model's layers.
    """
    for holder in model.modules():
        container = container_type_of(holder)
        if container is not None and container.fused_parts is not None:
            for name, fused_parts in container.fused_parts(holder).items():
                layer = getattr(holder, name)
                if layer_type_of(layer) is not None:  # otherwise it is adapted already, and was described before
                    setattr(layer, _ATTRIBUTE, fused_parts)
    for describe in _descriptions:  # of the engines whose classes were met
        describe(model)


def fused_parts_of(layer: nn.Module) -> FusedParts | None:
    """The canonical parts of a layer's output features, as the module that holds it states them, or `None`."""
    return getattr(layer, _ATTRIBUTE, None)
