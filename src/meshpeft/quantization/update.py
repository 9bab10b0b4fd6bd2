"""Adapters by patterns, put on a model; they may start from what quantising its weights lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from meshpeft.parallel import layer_type_of, named_init_
from meshpeft.peft import (
    PEFT,
    AdapterError,
    AdapterWrapper,
    LoRA,
    NamedLoRALinear,
    PEFTConfig,
    adapter_wrappers,
    base_of,
    chunks_of,
    walk,
)
from meshpeft.peft.config import LayerPattern, LoRAInitMethod, matches
from meshpeft.peft.matching import ModulePath, is_router, nearest_names
from meshpeft.peft.method import Model
from meshpeft.peft.wrapper import wrapper_of
from meshpeft.quantization.starts import check_start, check_unshared, pissa_init, svdquant_init

__all__ = ["update_model"]


def update_model(model: Model, config: PEFTConfig | Mapping[str, Any]) -> Model:
    """Put adapters on the layers that the configuration's patterns match, in place.

    The first call turns layers into adapted ones; further calls, with other names, add adapters to these, and what
    is enabled is summed. Quantised layers (packed by `quantize_base`, or fake-quantised by ModelOpt) are adapted like
    any other. Routers are left alone.

    Args:
        model: Model with layers that have a registered layout, or list (or tuple) of its chunks. Its mode (training or
            evaluation) is kept.
        config: `PEFTConfig`, or dict of its fields.

    Returns:
        The model (the chunks); a new wrapper if the model itself is one linear layer.

    Raises:
        AdapterError: A pattern matches no layer; a layer has an adapter of this name, or one that was not put there
            by this function. Nothing is changed then.

    Example:
        >>> model = update_model(model, {"adapter_cfg": {"*": {"rank": 16}, "*output_layer*": {"enable": False}}})
    """
    method = _PatternLoRA(PEFTConfig.of(config))
    adapted = method(model, training=all(chunk.training for chunk in chunks_of(model)))
    chunks = chunks_of(adapted)
    method.add_to_adapted(chunks)
    method.initialize(chunks)
    return adapted


@dataclass
class _PatternLoRA(PEFT):
    """`LoRA` whose options differ from layer to layer, on layers that may have adapters already."""

    config: PEFTConfig
    # With names, which layers of different chunks may share.
    _adapted_before: list[tuple[str, AdapterWrapper]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _initialized_later: dict[LoRAInitMethod, list[tuple[str, AdapterWrapper]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def _survey(self, chunks: list[nn.Module]) -> None:
        layers = [found for chunk in chunks for found in _adaptable_layers(chunk)]
        names = [name for name, _ in layers]
        for pattern, value in self.config.adapter_cfg.items():
            if not any(matches(pattern, name) for name in names):
                self._report_unmet(pattern, names, enable=not isinstance(value, dict) and value.enable)
        give_up_a_part = []
        for name, module in layers:
            attributes = self.config.attributes_of(name)
            if attributes is None:
                continue
            base, wrapper = base_of(module), wrapper_of(module)
            if attributes.lora_init_method != "kaiming_zeros":
                check_start(attributes.lora_init_method, base, attributes.rank, name)
            if attributes.lora_init_method == "pissa":
                give_up_a_part.append((name, base))
            if wrapper is None:
                continue
            try:
                wrapper.check_can_add(self.config.adapter_name, LoRA().joins(base))
            except AdapterError as error:
                raise AdapterError(f"{name} {error}") from error
            self._adapted_before.append((name, wrapper))
        check_unshared(chunks, give_up_a_part)

    def _report_unmet(self, pattern: LayerPattern, names: list[str], enable: bool) -> None:
        nearest = nearest_names(pattern, names) if isinstance(pattern, str) else []
        message = f"adapter_cfg: {pattern!r} matches no layer that can carry an adapter"
        message += f"; nearest: {', '.join(nearest)}" if nearest else ""
        if enable:
            raise AdapterError(message)
        warnings.warn(message, stacklevel=5)

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Put an adapter on a layer that a pattern matches; other modules are returned as they are."""
        full_name = ModulePath(prefix or "", name or "").full_name
        if not _is_adaptable(m) or self.config.attributes_of(full_name) is None:
            return m
        wrapper = NamedLoRALinear(m)
        self._add(wrapper, full_name)
        return wrapper

    def add_to_adapted(self, chunks: list[nn.Module]) -> None:
        """Add the adapter to the layers that had others before."""
        for name, wrapper in self._adapted_before:
            self._add(wrapper, name)
        for chunk in chunks:
            self.freeze_model(chunk)

    def _add(self, wrapper: AdapterWrapper, full_name: str) -> None:
        attributes = self.config.attributes_of(full_name)
        if attributes is None:
            return
        method = LoRA(
            dim=attributes.rank,
            alpha=attributes.scale * attributes.rank,
            lora_A_init_method="zero",
            lora_B_init_method="zero",
            share_expert_adapters=False,
            lora_dtype=attributes.lora_dtype,
            seed=self.config.seed,
        )
        path = f"adapter.{self.config.adapter_name}"
        adapter = method.make_adapter(wrapper.to_wrap, full_name, path=path)
        if attributes.lora_init_method == "kaiming_zeros":
            name = f"{full_name}.{path}"
            named_init_(adapter.linear_in.weight, attributes.a_init, self.config.seed, f"{name}.linear_in.weight")
            named_init_(adapter.linear_out.weight, attributes.b_init, self.config.seed, f"{name}.linear_out.weight")
        else:
            self._initialized_later.setdefault(attributes.lora_init_method, []).append((full_name, wrapper))
        wrapper.add(self.config.adapter_name, adapter)

    def freeze_model(self, model: nn.Module, training: bool = True) -> None:
        """Freeze the base and this adapter as the configuration states; other adapters are left as they are."""
        wrappers = [wrapper for _, wrapper in adapter_wrappers(model)]
        if self.config.freeze_base_model:
            adapters = {id(parameter) for wrapper in wrappers for parameter in wrapper.adapter.parameters()}
            for parameter in model.parameters():
                if id(parameter) not in adapters:
                    parameter.requires_grad_(False)
        for wrapper in wrappers:
            for term in wrapper.terms():
                if term.name == self.config.adapter_name:
                    term.adapter.requires_grad_(not self.config.freeze_lora_weights)

    def initialize(self, chunks: list[nn.Module]) -> None:
        """Start the adapters that start from the weights. Collectives, where the weights are sharded."""
        for method, layers in self._initialized_later.items():
            start = svdquant_init if method == "svdquant" else pissa_init
            start(chunks, adapter_name=self.config.adapter_name, layers=layers)


def _is_adaptable(module: nn.Module) -> bool:
    return layer_type_of(module) is not None and not is_router(module)


def _adaptable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield full name and module of every layer that can carry an adapter, or does."""
    for path, module in walk(model):
        if _is_adaptable(base_of(module)):
            yield path.full_name, module
