"""What is known about classes of layers and of modules that hold layers, one entry each.

A class of linear layers enters with one `LayerType`, a class of modules that hold layers with one `ContainerType`. A
foreign layer does not know that its output fuses q, k and v, nor that it belongs to expert 6 of 8: the module around it
does.

To add a layer type, call `register_layer_type(cls, LayerType(layout=.., weight=..))`:

* `layout` gives a layer's `LinearLayout`: its sizes, which dim of W which axis shards, and the states of x and y.
  Slices, initialisation, gradient sums, checkpoint entries and export follow from it;
* `weight` gives the local weight;
* with `enter` and `exit`, the collectives before and after its product, adapters join the product; without, they are
  standalone. The other fields are for what a class does beyond that, and have defaults.

Register another package's layers in that package's file in `engines/`; one that can be packed also goes into
`PACKED_CLASSES` (`quantization/layers.py`). To add a method, see `peft/method.py`; a mesh axis, `parallel/mesh.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meshpeft.parallel.class_registry import ClassRegistry
from meshpeft.parallel.layout import FusedParts, LinearLayout
from meshpeft.parallel.sharded_tensor import ShardedTensor

__all__ = [
    "ContainerType",
    "LayerType",
    "container_type_of",
    "derive_layer_types",
    "describe_layers",
    "does_more_than_its_type",
    "fused_parts_of",
    "global_names",
    "in_surroundings",
    "layer_type_of",
    "layout_of",
    "register_container_type",
    "register_description",
    "register_layer_type",
    "set_surroundings",
]


@dataclass(frozen=True)
class LayerType:
    """The registry's entry for one class of layers.

    Attributes:
        layout: Reads a layer's `LinearLayout`.
        weight: The layer's local weight, in its compute type (dequantised if it is stored otherwise).
        enter: The collective before the GEMM; `None` where the forward hides its collectives, so that adapters
            run standalone instead of inside it (as they do on layers that do more, see
            `does_more_than_its_type`).
        exit: Adds the bias and makes the collective after the GEMM, given the GEMM's output.
        store: The layer's parameters, by name, that hold a given local weight, where that is not one parameter `weight`
            as it is (a DTensor, one for each expert).
        bias: The layer's local bias, where that is not its attribute `bias` as it is.
        gathers: Whether a call with these keyword arguments gathers the output of a column-parallel layer, where
            its layout alone does not decide that.
        checkpoint: The checkpoint entries of an adapter on the layer, in the form of the layer's engine.
        call: Calls the layer as a standalone adapter needs it, so that it returns also the output of a layer norm that
            it contains; `None` where it is called as it is.
        unrounded: The local weight, in the terms of `weight`, that an enabled quantiser of the layer rounds each time;
            `None` where there is none.
        packed: Form that the weight is stored in, where that is few bits (an object of `meshpeft.quantization`, see
            `packed_form`); `None` for other weights.
        decides: The layer's output steers where tokens go, or how much of them counts (routers, gates), so that only
            who names it means it.
    """

    layout: Callable[[Any], LinearLayout]
    weight: Callable[[Any], Tensor]
    enter: Callable[[Any, Tensor], Tensor] | None = None
    exit: Callable[[Any, Tensor], Any] | None = None
    store: Callable[[Any, Tensor], Mapping[str, Tensor]] | None = None
    bias: Callable[[Any], Tensor | None] = lambda module: getattr(module, "bias", None)
    gathers: Callable[[Any, Mapping[str, Any]], bool] | None = None
    checkpoint: Callable[[Mapping[str, ShardedTensor]], Mapping[str, Any]] | None = None
    call: Callable[..., Any] | None = None
    unrounded: Callable[[Any], Tensor | None] = lambda module: None
    packed: Callable[[Any], Any] = lambda module: None
    decides: bool = False

    @property
    def takes_adapters_inside(self) -> bool:
        """Whether adapters join between the layer's `enter` and `exit`; otherwise they run standalone."""
        return self.enter is not None


_LAYER_TYPES: ClassRegistry[LayerType] = ClassRegistry()


def register_layer_type(
    cls: type[nn.Module], layer_type: LayerType, when: Callable[[nn.Module], bool] | None = None
) -> None:
    """State how layers of `cls`, and of its subclasses that do not say otherwise, lie on the mesh.

    Args:
        cls: The class.
        layer_type: Its entry.
        when: The entry is only for the instances for which this holds, such as those that an engine sharded in place.
    """
    _LAYER_TYPES.add(cls, layer_type, when)


def derive_layer_types(cls: type[nn.Module], change: Callable[[LayerType], LayerType]) -> None:
    """State what becomes of the entries of layers of any class that a package made instances of `cls`, too.

    Args:
        cls: The package's class, which such layers have besides their own.
        change: The entry of their own class -> theirs.
    """
    _LAYER_TYPES.derive(cls, change)


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The entry of the nearest registered class of `module`, or `None`."""
    return _LAYER_TYPES.find(module)


def does_more_than_its_type(module: nn.Module) -> bool:
    """Whether a call of the layer is more than `enter`, the GEMM and `exit` of its entry.

    So it is with a `forward` of its own, of a subclass without an entry or of the instance, and with hooks. An
    adapter between `enter` and `exit` would leave that out.
    """
    cls = _LAYER_TYPES.class_of(module)
    own_forward = cls is not None and (type(module).forward is not cls.forward or "forward" in vars(module))
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return own_forward or any(hooks)


def layout_of(module: nn.Module) -> LinearLayout:
    """The layout of a registered layer.

    Raises:
        NotImplementedError: The layer's type is not registered; the message names it and those that are.
    """
    layer_type = layer_type_of(module)
    if layer_type is None:
        known = ", ".join(sorted(cls.__name__ for cls in _LAYER_TYPES.classes()))
        raise NotImplementedError(
            f"no layout is registered for layers of type {type(module).__module__}.{type(module).__qualname__}; "
            f"known: {known}. Register it with meshpeft.parallel.register_layer_type"
        )
    return layer_type.layout(module)


_SURROUNDINGS = "meshpeft_surroundings"


def set_surroundings(layer: nn.Module, change: Callable[[Any, LinearLayout], LinearLayout]) -> None:
    """State what the model around a layer implies for its layout, where the layer itself cannot know it.

    Args:
        layer: a layer whose class knows nothing of the mesh, such as `nn.Linear`.
        change: The layer and the layout of its class -> its layout in this model.
    """
    setattr(layer, _SURROUNDINGS, change)


def in_surroundings(layer: nn.Module, layout: LinearLayout) -> LinearLayout:
    """Return the layout of a layer in the model around it, given the layout that its class states."""
    change: Callable[[Any, LinearLayout], LinearLayout] | None = getattr(layer, _SURROUNDINGS, None)
    return layout if change is None else change(layer, layout)


def _plain_linear(module: nn.Linear) -> LinearLayout:
    return in_surroundings(module, LinearLayout(module.in_features, module.out_features))


register_layer_type(
    nn.Linear,
    LayerType(
        layout=_plain_linear,
        weight=lambda module: module.weight,
        enter=lambda module, x: x,
        exit=lambda module, y: y if module.bias is None else y + module.bias.to(y.dtype),
    ),
)


@dataclass(frozen=True)
class ContainerType:
    """The registry's entry for one class of modules that hold layers.

    Attributes:
        fused_parts: Name of a child layer -> the canonical parts of its output features.
        names: Module below this one -> its own name, where it differs from the one that its parent gave it: numbers
            of layers and experts that count those of this rank only, as the global number.
        adapted: Called on a model to which adapters were applied, once its trainable parameters are known; again
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


_FUSED_PARTS = "meshpeft_fused_parts"
_descriptions: list[Callable[[nn.Module], None]] = []


def register_description(describe: Callable[[nn.Module], None]) -> None:
    """Let an engine describe layers that are of no class of its own, in models that are.

    Args:
        describe: Called on a model; it calls `set_surroundings` on such layers in it.
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
                    setattr(layer, _FUSED_PARTS, fused_parts)
    for describe in _descriptions:  # of the engines whose classes were met
        describe(model)


def fused_parts_of(layer: nn.Module) -> FusedParts | None:
    """The canonical parts of a layer's output features, as the module that holds it states them, or `None`."""
    return getattr(layer, _FUSED_PARTS, None)
