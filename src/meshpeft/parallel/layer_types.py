"""The registry of layer types: what every class of linear layers says of itself, in one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meshpeft.parallel.class_registry import ClassRegistry
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.sharded_tensor import ShardedTensor

__all__ = [
    "LayerType",
    "derive_layer_types",
    "does_more_than_its_type",
    "in_surroundings",
    "layer_type_of",
    "layout_of",
    "register_layer_type",
    "set_surroundings",
]


@dataclass(frozen=True)
class LayerType:
    """The registry's entry for one class of layers.

    Attributes:
        layout: reads a layer's [`LinearLayout`][meshpeft.parallel.LinearLayout].
        weight: the layer's local weight, in its compute type (dequantised if it is stored otherwise).
        enter: the collective before the GEMM; `None` where the forward hides its collectives, so that adapters
            run beside the layer instead of inside it (as they do on layers that do more, see
            `does_more_than_its_type`).
        exit: adds the bias and makes the collective after the GEMM, given the GEMM's output.
        store: the layer's parameters, by name, that hold a given local weight, where that is not one parameter `weight`
            as it is (a DTensor, one for each expert).
        bias: the layer's local bias, where that is not its attribute `bias` as it is.
        gathers: whether a call with these keyword arguments gathers the output of a column-parallel layer, where
            its layout alone does not decide that.
        checkpoint: the checkpoint entries of an adapter on the layer, in the form of the layer's engine.
        call: calls the layer as an adapter beside it needs it, so that it returns also the output of a layer norm that
            it contains; `None` where it is called as it is.
        unrounded: the local weight, in the terms of `weight`, that an enabled quantiser of the layer rounds each time;
            `None` where there is none.
        packed: Form that the weight is stored in, where that is few bits (an object of `meshpeft.quantization`, see
            `packed_form`); `None` for other weights.
        decides: the layer's output steers where tokens go, or how much of them counts (routers, gates), so that only
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
    def fused(self) -> bool:
        """Whether adapters join between the layer's `enter` and `exit`."""
        return self.enter is not None


_LAYER_TYPES: ClassRegistry[LayerType] = ClassRegistry()


def register_layer_type(
    cls: type[nn.Module], layer_type: LayerType, when: Callable[[nn.Module], bool] | None = None
) -> None:
    """State how layers of `cls`, and of its subclasses that do not say otherwise, lie on the mesh.

    Args:
        cls: the class.
        layer_type: its entry.
        when: the entry is only for the instances for which this holds, such as those that an engine divided in place.
    """
    _LAYER_TYPES.add(cls, layer_type, when)


def derive_layer_types(cls: type[nn.Module], change: Callable[[LayerType], LayerType]) -> None:
    """State what becomes of the entries of layers of any class that a package made instances of `cls`, too.

    Args:
        cls: the package's class, which such layers have besides their own.
        change: the entry of their own class -> theirs.
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
        NotImplementedError: the layer's type is not registered; the message names it and those that are.
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
