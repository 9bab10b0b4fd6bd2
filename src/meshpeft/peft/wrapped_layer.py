"""The base layer in a wrapper: its weight, and the weight that takes its adapter in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from meshpeft.parallel import LayerType, layer_type_of
from meshpeft.peft.errors import AdapterError

__all__ = ["WrappedLayer", "parameter_like", "stored_weight_of"]


class WrappedLayer(nn.Module):
    """A base layer and an adapter that can be merged into its weight.

    Args:
        to_wrap: the base layer.
        adapter: its adapter.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = adapter
        # In a dict, for a parameter that is an attribute becomes one of this module's.
        self._unmerged: dict[str, nn.Parameter] | None = None
        self._is_merged = False

    @property
    def layer_type(self) -> LayerType:
        """The registry's entry for the base layer."""
        found = layer_type_of(self.to_wrap)
        if found is None:
            raise NotImplementedError(f"no layout is registered for layers of type {type(self.to_wrap).__name__}")
        return found

    # Asked in every call, and an engine's layers have no layout at hand, only what it is read from.
    @cached_property
    def is_stacked(self) -> bool:
        """Whether the base is a layer of grouped experts, with a weight [experts, out, in]."""
        return self.layer_type.layout(self.to_wrap).experts is not None

    def stored_weight(self) -> nn.Parameter | None:
        """The base's local weight if it is stored as it is used; `None` if it is made anew (dequantised) each time."""
        return stored_weight_of(self.to_wrap)

    def weight_source(self) -> Tensor | Callable[[], Tensor]:
        """The base's local weight, or where it is stored otherwise a function that makes it (nothing keeps it)."""
        weight = self.stored_weight()
        return weight if weight is not None else partial(self.layer_type.weight, self.to_wrap)

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is part of the base's weight now."""
        return self._is_merged

    def matrices(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The base's local weight and `tensors`; of grouped experts, one expert's matrices after the other's.

        A tensor that is no stack [experts, .., ..] serves every expert.
        """
        weight = self.layer_type.weight(self.to_wrap).detach()
        if not self.is_stacked:
            yield weight, *(tensor.detach() for tensor in tensors)
            return
        for expert in range(weight.shape[0]):
            yield weight[expert], *(tensor.detach()[expert] if tensor.dim() == 3 else tensor for tensor in tensors)

    def merged_weights(self) -> Iterator[Tensor]:
        """The local weight [out, in] that equals base and adapter, in float32 or the weight's wider type.

        One; or, of grouped experts, one for each local expert, made when it is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def check_mergeable(self) -> None:
        """Raise what there is to raise before the adapter becomes part of the base's weight; nothing, if it is already.

        Raises:
            AdapterError: the adapter is switched off; the weight is not stored in the type it is used in (quantised);
                an activation between the factors.
        """
        if self._is_merged:
            return
        if not self.adapter_enabled:
            raise AdapterError("the adapter is switched off, and merging it would switch it on; enable it first")
        if self.stored_weight() is None and self.layer_type.store is None:
            raise AdapterError(
                f"{type(self.to_wrap).__name__} stores its weight in another form than it uses; merge into a "
                "dequantised copy of the base instead"
            )
        if not all(getattr(adapter, "is_linear", True) for adapter in self.adapter.modules()):
            raise AdapterError("an adapter with an activation between its factors is no change of a weight")

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Give the base the merged weight: computed in float32 or wider, rounded once to the weight's type.

        The base's parameter is replaced, not overwritten: an embedding that shared it (tied) keeps its values.

        Grouped experts are merged one after the other, and only one matrix at a time is widened.

        Args:
            keep_base: keep the base's own weight for an exact `unmerge` (a second weight in memory).

        Raises:
            AdapterError: see `check_mergeable`.
        """
        if self._is_merged:
            return
        self.check_mergeable()
        merged = torch.empty_like(self.layer_type.weight(self.to_wrap))
        for matrix, values in zip(merged if self.is_stacked else (merged,), self.merged_weights(), strict=True):
            matrix.copy_(values)
        store = self.layer_type.store
        new = {"weight": merged} if store is None else store(self.to_wrap, merged)
        base = {name: self.to_wrap.get_parameter(name) for name in new}
        for name, parameter in base.items():
            setattr(self.to_wrap, name, parameter_like(parameter, new[name]))
        self._unmerged = base if keep_base else None
        self._is_merged = True

    def check_unmergeable(self) -> dict[str, nn.Parameter]:
        """The base's own parameters, by their names.

        Raises:
            AdapterError: it was merged with `keep_base=False`.
        """
        if self._unmerged is None:
            raise AdapterError("the base's weight was not kept when the adapter was merged (keep_base=False)")
        return self._unmerged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit; a tied one is tied again.

        Raises:
            AdapterError: see `check_unmergeable`.
        """
        if not self._is_merged:
            return
        for name, base in self.check_unmergeable().items():
            merged = self.to_wrap.get_parameter(name)
            moved = (base.dtype, base.device) != (merged.dtype, merged.device)  # the model was, meanwhile
            setattr(self.to_wrap, name, parameter_like(merged, base.to(merged.device, merged.dtype)) if moved else base)
        self._unmerged, self._is_merged = None, False


def stored_weight_of(layer: nn.Module) -> nn.Parameter | None:
    """A layer's local weight if it is stored as it is used; `None` if it is made anew (dequantised) each time."""
    weight, layer_type = getattr(layer, "weight", None), layer_type_of(layer)
    if layer_type is None or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    # Asked first, for it is cheap: reading a quantised weight means rounding it again.
    if layer_type.unrounded(layer) is not None:
        return None
    return weight if layer_type.weight(layer) is weight else None


def parameter_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """New values with everything that is stated on a parameter: its layout, and what an engine reads on it."""
    new = nn.Parameter(values.detach(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new
