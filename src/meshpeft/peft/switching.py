"""Adapters on a model: whether there are any, and switching them by layer and by name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from meshpeft.peft.config import LayerPattern, matches
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.matching import nearest_names
from meshpeft.peft.walk import adapted_layers, adapter_wrappers

__all__ = ["disable_adapters", "enable_adapters", "is_peft_model"]


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
