"""A layer and the adapter on it, in the layer's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshpeft.parallel import group_offsets, layer_type_of, sharded_state_dict
from meshpeft.parallel.sharded_tensor import ShardedOffset, in_format, in_format_of_caller
from meshpeft.peft.errors import AdapterError, UnseenAdapterError
from meshpeft.peft.wrapped_keys import hide_wrapping, inside_wrapper, restore_wrapping
from meshpeft.peft.wrapped_layer import WrappedLayer

__all__ = ["AdapterWrapper", "BaseOutput", "check_ours"]


def check_ours(wrapper: type, adapter: object, kind: type) -> None:
    """Refuse an adapter of another package where a wrapper gets it: it has no layout, by which ours run and are saved.

    Raises:
        AdapterError: the adapter is not of the kind that the wrapper takes.
    """
    if not isinstance(adapter, kind):
        raise AdapterError(
            f"{wrapper.__name__}: got an adapter of type {type(adapter).__module__}.{type(adapter).__qualname__}, "
            f"expected a meshpeft.peft.{kind.__name__}; let LoRA, CanonicalLoRA or DoRA make it, or derive a wrapper "
            "of your own from AdapterWrapper"
        )


class BaseOutput(NamedTuple):
    """What a layer returned, taken apart, and how to put it together again with another output.

    `linear` is the layer's output, `bias` the bias it leaves to its caller (or `None`), `layernorm` the input after
    a layer norm that the layer contains (or `None`).
    """

    linear: Tensor
    bias: Tensor | None
    layernorm: Tensor | None
    rebuild: Callable[[Tensor], Any]


class AdapterWrapper(WrappedLayer):
    """A base layer with an adapter. Called like the base; returns what the base returns (a tensor, or a tuple).

    Its state dict has the base's keys as if it were not wrapped, and the adapter's under `adapter.`.

    Args:
        to_wrap: the base layer.
        adapter: its adapter.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__(to_wrap, adapter)
        self.applied_by: Any = None
        self._adapter_enabled = True
        self.register_state_dict_post_hook(hide_wrapping)
        self.register_load_state_dict_pre_hook(restore_wrapping)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("weight", "bias"):
                raise
            raise UnseenAdapterError(
                f"{type(self).__name__} has no attribute {name!r}: code that multiplies by a layer's {name} itself "
                f"would silently leave out its adapter. Call the layer, or read .to_wrap.{name} on purpose"
            ) from None

    def _fqn_modifiers(self) -> dict[str, str]:
        return inside_wrapper(self.to_wrap)

    @property
    def adapter_enabled(self) -> bool:
        """Whether the adapter takes part in `forward`."""
        return self._adapter_enabled

    def enable_adapter_layers(self) -> None:
        """Let the adapter take part in `forward`."""
        self._adapter_enabled = True

    def disable_adapter_layers(self) -> None:
        """Be the base layer alone.

        Raises:
            AdapterError: the adapter is merged into the base's weight.
        """
        self.check_switchable()
        self._adapter_enabled = False

    def check_switchable(self) -> None:
        """Raise what there is to raise before adapters are left out, or taken in again.

        Raises:
            AdapterError: they are merged into the base's weight.
        """
        if self.is_merged:
            raise AdapterError("an adapter that is merged into its layer's weight takes part; unmerge before switching")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output for x, adapted.

        Args:
            x: the base's input, in the state that the base takes it.
            args, kwargs: handed to the base.
        """
        if not self._adapter_enabled or self._is_merged:
            return self.to_wrap(x, *args, **kwargs)
        layer_type = self.layer_type
        if self.joins and layer_type.enter is not None and layer_type.exit is not None:
            return layer_type.exit(self.to_wrap, self.inside(layer_type.enter(self.to_wrap, x), *args, **kwargs))
        return self.beside(x, *args, **kwargs)

    @property
    def joins(self) -> bool:
        """Whether the adapter runs between the base's `enter` and `exit`."""
        return bool(getattr(self.adapter, "fused", False))

    def inside(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted GEMM, between the base's `enter` and `exit`."""
        raise NotImplementedError(f"{type(self).__name__} cannot join its adapter to the base's GEMM")

    def beside(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapted output where the base's forward hides its collectives."""
        raise NotImplementedError(f"{type(self).__name__} cannot run its adapter beside the base")

    def offsets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The end of each expert's rows, from a call of grouped experts, `layer(x, tokens_per_expert)`; else `None`.

        Transformer Engine's layers call the numbers `m_splits`, a list.
        """
        if not self.is_stacked:
            return None
        given = args[0] if args else kwargs.get("m_splits", kwargs.get("tokens_per_expert"))
        if isinstance(given, Tensor):
            return group_offsets(given)
        device = next(self.adapter.parameters()).device
        return group_offsets(torch.tensor(given, device=device))

    def base_linear_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> BaseOutput:
        """Call the base and take apart what it returns.

        A base returns a tensor; `(output, bias)`; or, where it contains a layer norm whose output was asked for,
        `((output, layernorm_output), bias)` or `(output, bias, layernorm_output)`.
        """
        call = self.layer_type.call
        returned = self.to_wrap(x, *args, **kwargs) if call is None else call(self.to_wrap, x, *args, **kwargs)
        if isinstance(returned, Tensor):
            return BaseOutput(returned, None, None, lambda y: y)
        if isinstance(returned, tuple) and len(returned) == 2:
            output, bias = returned
            if isinstance(output, Tensor):
                return BaseOutput(output, bias, None, lambda y: (y, bias))
            linear, layernorm = output
            return BaseOutput(linear, bias, layernorm, lambda y: (y, bias))
        if isinstance(returned, tuple) and len(returned) == 3:
            linear, bias, layernorm = returned
            return BaseOutput(linear, bias, layernorm, lambda y: (y, bias))
        raise AdapterError(
            f"{type(self.to_wrap).__name__} returned {type(returned).__name__}; expected a tensor, (output, bias), "
            "((output, layernorm_output), bias), or (output, bias, layernorm_output)"
        )

    @cached_property
    def _states_gathering(self) -> bool:
        return self.layer_type.layout(self.to_wrap).gather_output

    def gathers_now(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call of the base gathers an output that its layout says it leaves divided.

        Raises:
            AdapterError: it leaves divided what its layout says it gathers.
        """
        layer_type = self.layer_type
        if layer_type.gathers is None:
            return False
        gathers, stated = layer_type.gathers(self.to_wrap, kwargs), self._states_gathering
        if stated and not gathers:
            raise AdapterError(
                f"{type(self.to_wrap).__name__} was made to gather its output and called not to; its adapter gathers. "
                "Make it with gather_output=False, and ask for gathering in the call"
            )
        return gathers and not stated

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The base's entries as if it were not wrapped, and the adapter's under `adapter.`.

        On a layer of an engine with a checkpoint format of its own, and for an engine that asks, both are in that
        format.
        """
        entries = _described(self.to_wrap, prefix, sharded_offsets, metadata)
        adapter = _described(self.adapter, f"{prefix}adapter.", sharded_offsets, metadata)
        layer_type = layer_type_of(self.to_wrap)
        if layer_type is not None and layer_type.checkpoint is not None:
            adapter = in_format(adapter, layer_type.checkpoint)
        return in_format_of_caller({**entries, **adapter}, metadata)


def _described(
    module: nn.Module, prefix: str, sharded_offsets: Sequence[ShardedOffset], metadata: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    described = getattr(module, "sharded_state_dict", None) or partial(sharded_state_dict, module)
    return described(prefix, sharded_offsets, metadata)
