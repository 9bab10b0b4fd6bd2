"""Adapters by name: several LoRA adapters on one layer, and switching adapters by layer and by name.

Enabled adapters are summed, and summed adapters are one adapter with their factors next to each other:
A = [A_1; A_2; ..], B = [B_1 B_2 ..]. It runs as one, in the same fused function and the same parallel states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from meshpeft.peft.adapter import LowRankAdapter
from meshpeft.peft.canonical import ModuleDict
from meshpeft.peft.config import LayerPattern, matches
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.lora import LowRankWrapper
from meshpeft.peft.matching import adapted_layers, adapter_wrappers, nearest_names
from meshpeft.peft.wrapper import AdapterTerm, check_ours

__all__ = ["NamedLoRALinear", "disable_adapters", "enable_adapters", "is_peft_model"]


class NamedLoRALinear(LowRankWrapper):
    """A layer with LoRA adapters that have names; without an enabled one it is the base layer.

    Args:
        to_wrap: Base layer.
    """

    adapter: ModuleDict

    def __init__(self, to_wrap: nn.Module) -> None:
        super().__init__(to_wrap, ModuleDict())
        self._disabled: set[str] = set()

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self.adapter)

    def named_adapters(self) -> Iterator[tuple[str, LowRankAdapter]]:
        """Yield every adapter with its name."""
        for name in self.adapter:
            yield name, cast(LowRankAdapter, self.adapter[name])

    def terms(self) -> list[AdapterTerm]:
        """Return one term for each adapter, also for those that are switched off."""
        return [AdapterTerm(adapter, name=name, path=name) for name, adapter in self.named_adapters()]

    def add(self, name: str, adapter: LowRankAdapter) -> None:
        """Add an adapter to those of the layer; errors as in `check_can_add`."""
        check_ours(type(self), adapter, LowRankAdapter)
        super().add(name, adapter)
        self.adapter[name] = adapter

    def check_can_add(self, name: str, fused: bool) -> None:
        """Check that another adapter can be added to the layer.

        Raises:
            AdapterError: The name is taken; the others run inside the layer's GEMM and this one would not, or the
                other way round.
        """
        if name in self.adapter:
            raise AdapterError(f"has an adapter {name!r} already; choose another name")
        if any(other.fused != fused for _, other in self.named_adapters()):
            where = ("inside its GEMM", "standalone")
            raise AdapterError(f"has adapters that run {where[fused]}, and {name!r} would run {where[not fused]}")

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Switch the adapter of this name on or off.

        Raises:
            AdapterError: Adapters are merged into the base's weight.
        """
        self.check_switchable()
        if enabled and not self._adapter_enabled:  # the layer was switched off: the others stay off
            self._disabled.update(self.adapter)
            self.enable_adapter_layers()
        (self._disabled.discard if enabled else self._disabled.add)(name)

    def is_enabled(self, name: str) -> bool:
        """Whether the adapter of this name takes part in `forward`."""
        return self._adapter_enabled and name in self.adapter and name not in self._disabled

    def active_terms(self) -> list[AdapterTerm]:
        """Return the terms of the enabled adapters."""
        return [term for term in self.terms() if term.name not in self._disabled]

    @property
    def is_active(self) -> bool:
        """Whether `forward` computes an adapter: any of them is enabled, and they are not part of the base's weight."""
        return super().is_active and bool(self.active_terms())

    def merged_weights(self) -> Iterator[Tensor]:
        """Yield W + sum of s B A over the enabled adapters, local, in float32 or wider; one by one for experts."""
        if self.active_terms():
            yield from super().merged_weights()
            return
        for (weight,) in self.matrices():
            yield weight.to(torch.promote_types(weight.dtype, torch.float32))


def is_peft_model(model: nn.Module | list[nn.Module]) -> bool:
    """Whether any layer of the model, or of its chunks, carries an adapter."""
    return next(adapter_wrappers(model), None) is not None


def enable_adapters(
    model: nn.Module | list[nn.Module],
    layers_to_enable: LayerPattern | Iterable[LayerPattern] | None = None,
    adapters_to_enable: str | Iterable[str] | None = None,
) -> None:
    """Let adapters take part in the model again.

    Args:
        model: with adapters; or a list of its chunks.
        layers_to_enable: patterns (`*` for any substring) or predicates of full layer names; `None`: all layers.
        adapters_to_enable: patterns of adapter names; `None`: all adapters.

    Raises:
        AdapterError: the model has no adapters; a pattern matches nothing.

    Example:
        >>> enable_adapters(model, layers_to_enable=["*mlp*"], adapters_to_enable=["finetuned"])
    """
    _switch(model, True, layers_to_enable, adapters_to_enable)


def disable_adapters(
    model: nn.Module | list[nn.Module],
    layers_to_disable: LayerPattern | Iterable[LayerPattern] | None = None,
    adapters_to_disable: str | Iterable[str] | None = None,
) -> None:
    """Leave adapters out of the model; arguments and errors as in `enable_adapters`."""
    _switch(model, False, layers_to_disable, adapters_to_disable)


def _switch(
    model: nn.Module | list[nn.Module],
    enabled: bool,
    layers: LayerPattern | Iterable[LayerPattern] | None,
    adapters: str | Iterable[str] | None,
) -> None:
    layer_patterns, adapter_patterns = _patterns(layers), _patterns(adapters)
    wrappers = list(adapted_layers(model))
    if not wrappers:
        raise AdapterError("the model has no adapters; call update_model first")
    for pattern in adapter_patterns or ():
        if not isinstance(pattern, str):
            raise AdapterError(f"adapter names are matched by strings, not by {pattern!r}")
    _check_met(layer_patterns, [name for name, _ in wrappers], "layer with an adapter")
    _check_met(adapter_patterns, {adapter for _, wrapper in wrappers for adapter in wrapper.adapter_names}, "adapter")
    meant = [
        (wrapper, adapter)
        for name, wrapper in wrappers
        if layer_patterns is None or any(matches(pattern, name) for pattern in layer_patterns)
        for adapter in wrapper.adapter_names
        if adapter_patterns is None or any(matches(pattern, adapter) for pattern in adapter_patterns)
    ]
    for wrapper, _ in meant:  # before the first one is switched
        wrapper.check_switchable()
    for wrapper, adapter in meant:
        wrapper.set_enabled(adapter, enabled)


def _patterns(patterns: LayerPattern | Iterable[LayerPattern] | None) -> list[LayerPattern] | None:
    if patterns is None:
        return None
    found = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in found:
        if not isinstance(pattern, str) and not callable(pattern):
            raise AdapterError(f"pattern {pattern!r} is neither a string nor a function of a layer's name")
    return found


def _check_met(patterns: list[LayerPattern] | None, names: Iterable[str], kind: str) -> None:
    known = list(names)
    for pattern in patterns or ():
        if not any(matches(pattern, name) for name in known):
            nearest = f"; nearest: {', '.join(nearest_names(pattern, known))}" if isinstance(pattern, str) else ""
            raise AdapterError(f"{pattern!r} matches no {kind}{nearest}")
