"""A layer and the adapter on it, in the layer's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshpeft.parallel import LayerType, group_offsets, layer_type_of, sharded_state_dict
from meshpeft.parallel.sharded_tensor import ShardedOffset
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.wrapped_keys import hide_wrapping, inside_wrapper, restore_wrapping

__all__ = ["AdapterWrapper", "BaseOutput"]


class BaseOutput(NamedTuple):
    """What a layer returned, taken apart, and how to put it together again with another output.

    `linear` is the layer's output, `bias` the bias it leaves to its caller (or `None`), `layernorm` the input after
    a layer norm that the layer contains (or `None`).
    """

    linear: Tensor
    bias: Tensor | None
    layernorm: Tensor | None
    rebuild: Callable[[Tensor], Any]


class AdapterWrapper(nn.Module):
    """A base layer with an adapter. Called like the base; returns what the base returns (a tensor, or a tuple).

    Its state dict has the base's keys as if it were not wrapped, and the adapter's under `adapter.`.

    Args:
        to_wrap: the base layer.
        adapter: its adapter.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = adapter
        self.applied_by: Any = None
        self._adapter_enabled = True
        # In a tuple, for a parameter that is an attribute becomes one of this module's.
        self._unmerged_weight: tuple[nn.Parameter] | None = None
        self._is_merged = False
        self._weight_is_stored = False
        self._stored_weight_of: type[nn.Module] | None = None
        self.register_state_dict_post_hook(hide_wrapping)
        self.register_load_state_dict_pre_hook(restore_wrapping)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("weight", "bias"):
                raise
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: code that multiplies by a layer's {name} itself "
                f"would silently leave out its adapter. Call the layer, or read .to_wrap.{name} on purpose"
            ) from None

    def _fqn_modifiers(self) -> dict[str, str]:
        return inside_wrapper(self.to_wrap)

    @property
    def layer_type(self) -> LayerType:
        """The registry's entry for the base layer."""
        found = layer_type_of(self.to_wrap)
        if found is None:
            raise NotImplementedError(f"no layout is registered for layers of type {type(self.to_wrap).__name__}")
        return found

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
        if self._is_merged:
            raise AdapterError("the adapter is merged into its layer's weight; unmerge before disabling it")
        self._adapter_enabled = False

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

    @property
    def is_stacked(self) -> bool:
        """Whether the base is a layer of grouped experts, with a weight [experts, out, in]."""
        return self.layer_type.layout(self.to_wrap).experts is not None

    def offsets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The end of each expert's rows, from a call of grouped experts, `layer(x, tokens_per_expert)`; else `None`."""
        if not self.is_stacked:
            return None
        tokens_per_expert: Tensor = args[0] if args else kwargs["tokens_per_expert"]
        return group_offsets(tokens_per_expert)

    def base_linear_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> BaseOutput:
        """Call the base and take apart what it returns.

        A base returns a tensor; `(output, bias)`; or, where it contains a layer norm whose output was asked for,
        `((output, layernorm_output), bias)`.
        """
        returned = self.to_wrap(x, *args, **kwargs)
        if isinstance(returned, Tensor):
            return BaseOutput(returned, None, None, lambda y: y)
        if isinstance(returned, tuple) and len(returned) == 2:
            output, bias = returned
            if isinstance(output, Tensor):
                return BaseOutput(output, bias, None, lambda y: (y, bias))
            linear, layernorm = output
            return BaseOutput(linear, bias, layernorm, lambda y: (y, bias))
        raise AdapterError(
            f"{type(self.to_wrap).__name__} returned {type(returned).__name__}; expected a tensor, (output, bias), "
            "or ((output, layernorm_output), bias)"
        )

    def gathers_now(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call of the base gathers an output that its layout says it leaves divided.

        Raises:
            AdapterError: it leaves divided what its layout says it gathers.
        """
        layer_type = self.layer_type
        if layer_type.gathers is None:
            return False
        gathers, stated = layer_type.gathers(self.to_wrap, kwargs), layer_type.layout(self.to_wrap).gather_output
        if stated and not gathers:
            raise AdapterError(
                f"{type(self.to_wrap).__name__} was made to gather its output and called not to; its adapter gathers. "
                "Make it with gather_output=False, and ask for gathering in the call"
            )
        return gathers and not stated

    def stored_weight(self) -> nn.Parameter | None:
        """The base's local weight if it is stored as it is used; `None` if it is made anew (dequantised) each time."""
        weight = getattr(self.to_wrap, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_floating_point() and self._reads(weight):
            return weight
        return None

    def _reads(self, weight: nn.Parameter) -> bool:
        # Asked once per base: reading a quantised weight means dequantising it.
        base = type(self.to_wrap)
        if self._stored_weight_of != base:
            self._weight_is_stored = self.layer_type.weight(self.to_wrap) is weight
            self._stored_weight_of = base
        return self._weight_is_stored

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

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Give the base the merged weight: computed in float32 or wider, rounded once to the weight's type.

        The base's parameter is replaced, not overwritten: an embedding that shared it (tied) keeps its values.

        Grouped experts are merged one after the other, and only one matrix at a time is widened.

        Args:
            keep_base: keep the base's own weight for an exact `unmerge` (a second weight in memory).

        Raises:
            AdapterError: the weight is not stored in the type it is used in (quantised).
        """
        if self._is_merged:
            return
        weight = self.stored_weight()
        if weight is None:
            raise AdapterError(
                f"{type(self.to_wrap).__name__} stores its weight in another form than it uses; merge into a "
                "dequantised copy of the base instead"
            )
        merged = torch.empty_like(weight)
        for matrix, values in zip(merged if self.is_stacked else (merged,), self.merged_weights(), strict=True):
            matrix.copy_(values)
        self.to_wrap.weight = _parameter_like(weight, merged)
        self._unmerged_weight = (weight,) if keep_base else None
        self._is_merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit; a tied one is tied again.

        Raises:
            AdapterError: it was merged with `keep_base=False`.
        """
        if not self._is_merged:
            return
        weight = self.stored_weight()
        if self._unmerged_weight is None or weight is None:
            raise AdapterError("the base's weight was not kept when the adapter was merged (keep_base=False)")
        [base] = self._unmerged_weight
        if (base.dtype, base.device) != (weight.dtype, weight.device):  # the model was cast or moved meanwhile
            base = _parameter_like(weight, base.to(weight.device, weight.dtype))
        self.to_wrap.weight = base
        self._unmerged_weight, self._is_merged = None, False

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The base's entries as if it were not wrapped, and the adapter's under `adapter.`.

        On a layer of an engine with a checkpoint format of its own, both are in that format.
        """
        entries = _described(self.to_wrap, prefix, sharded_offsets, metadata)
        adapter = _described(self.adapter, f"{prefix}adapter.", sharded_offsets, metadata)
        layer_type = layer_type_of(self.to_wrap)
        if layer_type is not None and layer_type.checkpoint is not None:
            adapter = layer_type.checkpoint(adapter)
        return {**entries, **adapter}


def _parameter_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """New values with everything that is stated on a parameter: its layout, and what an engine reads on it."""
    new = nn.Parameter(values.detach(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _described(
    module: nn.Module, prefix: str, sharded_offsets: Sequence[ShardedOffset], metadata: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    described = getattr(module, "sharded_state_dict", None) or partial(sharded_state_dict, module)
    return described(prefix, sharded_offsets, metadata)
