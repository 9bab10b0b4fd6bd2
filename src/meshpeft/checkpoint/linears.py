"""The linear layers of a model and the adapters on them, under the names of Hugging Face modules.

A fused layer is one module of ours and several there. What a method's adapter consists of is said here once, in
`adapter_linears`; export, import and merging read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.peft_config import AdapterShape
from meshpeft.models import Decoder, ModelError
from meshpeft.models.hf_names import hf_module_name
from meshpeft.parallel.layer_layout import LinearLayout, layer_type_of
from meshpeft.parallel.tensor_layout import TensorLayout, layout_of_tensor
from meshpeft.peft import AdapterWrapper, LoRALinear

__all__ = ["AdaptedLinear", "HubLinear", "adapted_linears", "hub_linears"]


@dataclass(frozen=True)
class HubLinear:
    """A linear layer as Hugging Face checkpoints have it.

    Attributes:
        name: its full name there.
        module: our module's full name.
        part: which part of our module it is; `None` where ours is not fused.
        layout: of our module.
    """

    name: str
    module: str
    part: str | None
    layout: LinearLayout


@dataclass(frozen=True)
class AdaptedLinear:
    """One pair of factors, on one layer of ours, all its parts or one of them.

    Attributes:
        module: full name of the layer.
        names: the Hugging Face modules, in the canonical order of B's rows.
        a, b: the factors; local, with their layouts.
        shape, use_rslora, dropout: as in an `adapter_config.json`.
    """

    module: str
    names: tuple[str, ...]
    a: Tensor
    b: Tensor
    shape: AdapterShape
    use_rslora: bool
    dropout: float

    def parts_of(self, full: Tensor, layout: TensorLayout) -> list[Tensor]:
        """A gathered B, or magnitude, as those of `names`."""
        if layout.packing is None:
            return [full]
        return list(full.split(list(layout.packing.sizes), layout.packed_dim))


def hub_linears(model: nn.Module) -> list[HubLinear]:
    """Every linear layer of a model that an adapter can be on, and that Hugging Face checkpoints have.

    Names are those of `meshpeft.models.hf_names` for a decoder; another model's own otherwise.
    """
    found = []
    for name, module in _linears(model):
        layer_type = layer_type_of(module)
        if layer_type is None:
            continue
        layout = layer_type.layout(module)
        parts: tuple[str | None, ...] = (None,) if layout.packing is None else layout.packing.names
        for part in parts:
            hub_name = _hub_name(model, name, part)
            if hub_name is not None:
                found.append(HubLinear(hub_name, name, part, layout))
    return found


def _linears(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names they have without adapters."""
    for name, child in model.named_children():
        if isinstance(child, AdapterWrapper):
            yield prefix + name, child.to_wrap
        else:
            yield prefix + name, child
            yield from _linears(child, f"{prefix}{name}.")


def _hub_name(model: nn.Module, name: str, part: str | None) -> str | None:
    if not isinstance(model, Decoder):
        return name if part is None else None
    try:
        return hf_module_name(name, part)
    except ModelError:
        return None


def adapted_linears(model: nn.Module) -> list[AdaptedLinear]:
    """The adapters on a model, in the order of its layers.

    Raises:
        CheckpointError: an adapter has no counterpart in Hugging Face PEFT, or the model has none at all.
    """
    names: dict[str, list[str]] = {}
    for linear in hub_linears(model):
        names.setdefault(linear.module, []).append(linear.name)
    found = []
    for name, wrapper in ((name, m) for name, m in model.named_modules() if isinstance(m, AdapterWrapper)):
        if name not in names or not isinstance(wrapper, LoRALinear):
            raise CheckpointError(
                f"{name}: a {type(wrapper).__name__} on a {type(wrapper.to_wrap).__name__} has no counterpart in "
                "Hugging Face PEFT's format; merge the adapter and save the model instead"
            )
        adapter = wrapper.adapter
        a, b = wrapper.factors()
        shape = AdapterShape(adapter.dim, adapter.alpha)
        found.append(AdaptedLinear(name, tuple(names[name]), a, b, shape, adapter.use_rslora, adapter.dropout))
    if not found:
        raise CheckpointError("the model carries no adapter")
    return found


def stated_layout(tensor: Tensor, name: str) -> TensorLayout:
    """The layout of an adapter's parameter.

    Raises:
        CheckpointError: it lost its layout.
    """
    layout = layout_of_tensor(tensor)
    if layout is None:
        raise CheckpointError(f"{name} has no layout, so its global values are unknown; set it with set_layout")
    return layout
