"""A layer and the adapter on it, in the layer's place.

An `AdapterWrapper` gives the terms of its adapter (`terms`). Export, import, merge, starts from the weight and reports
read them, never the wrapper's class. So a new adapter method is one file of this package; `method.py` says what is in
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshpeft.parallel import I, LayerType, group_offsets, layer_type_of, layout_of, sharded_state_dict
from meshpeft.parallel.sharded_base import is_stored, reads_store, stored_like
from meshpeft.parallel.sharded_tensor import ShardedOffset, in_format, in_format_of_caller
from meshpeft.peft.adapter import LowRankAdapter
from meshpeft.peft.errors import AdapterError, UnseenAdapterError

__all__ = [
    "AdapterTerm",
    "AdapterWrapper",
    "BaseOutput",
    "RowProduct",
    "base_of",
    "check_ours",
    "parameter_like",
    "stored_weight_of",
    "wrapper_of",
]


def wrapper_of(module: nn.Module) -> AdapterWrapper | None:
    """Return the module itself where it is an adapted layer, else `None`."""
    return module if isinstance(module, AdapterWrapper) else None


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer itself: the one in the wrapper where the module is an adapted layer, else the module."""
    wrapper = wrapper_of(module)
    return module if wrapper is None else wrapper.to_wrap


@dataclass(frozen=True)
class AdapterTerm:
    """One low-rank term s B A (in DoRA scaled by m / norm) of the adapter on a layer.

    Attributes:
        adapter: Module that holds the factors `linear_in`, `linear_out`, and has their scale, dropout and sharing.
        part: Fused part of the layer that it adapts, such as `q`; `None` for the full layer.
        name: Name of the adapter, where a layer has several by name; else `None`.
        path: Path of `adapter` below the wrapper's `adapter`; empty where it is that module.
    """

    adapter: LowRankAdapter
    part: str | None = None
    name: str | None = None
    path: str = ""


def check_ours(wrapper: type, adapter: object, kind: type) -> None:
    """Refuse an adapter of another package: it has no layout, by which those of this one run and are saved.

    Raises:
        AdapterError: The adapter is not of the kind that the wrapper takes.
    """
    if not isinstance(adapter, kind):
        raise AdapterError(
            f"{wrapper.__name__}: got an adapter of type {type(adapter).__module__}.{type(adapter).__qualname__}, "
            f"expected a meshpeft.peft.{kind.__name__}; let LoRA, CanonicalLoRA or DoRA make it, or derive a wrapper "
            "of your own from AdapterWrapper"
        )


class BaseOutput(NamedTuple):
    """Result of a layer, taken apart.

    Attributes:
        linear: Output of the layer.
        bias: Bias that the layer leaves to its caller, or `None`.
        layernorm: Input after a layer norm that the layer contains, or `None`.
        rebuild: Makes the result that the layer would have returned with another output.
    """

    linear: Tensor
    bias: Tensor | None
    layernorm: Tensor | None
    rebuild: Callable[[Tensor], Any]


class RowProduct(NamedTuple):
    """An adapted product that can be computed for some rows of the input at a time.

    Attributes:
        run: Rows of x after the base's `enter`, and the same rows of `dropped` or `None` -> rows of the output before
            the base's `exit`. Without a collective.
        dropped: x' [*, in], x after dropout; `None` where the adapter takes x itself.
    """

    run: Callable[[Tensor, Tensor | None], Tensor]
    dropped: Tensor | None


class AdapterWrapper(nn.Module):
    """A base layer with an adapter. Called like the base; returns what the base returns (a tensor, or a tuple).

    Its state dict has the base's keys as if it were not wrapped, and the adapter's under `adapter.`.

    Args:
        to_wrap: Base layer.
        adapter: Adapter on it.

    Attributes:
        applied_by: Method that made the wrapper, with the options it had then; `None` for one made by hand.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = adapter
        self.applied_by: Any = None
        self._adapter_enabled = True
        # In a dict, for a parameter that is an attribute becomes one of this module's.
        self._unmerged: dict[str, nn.Parameter] | None = None
        self._is_merged = False
        self.register_state_dict_post_hook(_hide_wrapping)
        self.register_load_state_dict_pre_hook(_restore_wrapping)

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
        return _inside_wrapper(self.to_wrap)

    @property
    def layer_type(self) -> LayerType:
        """Registry entry of the base layer."""
        found = layer_type_of(self.to_wrap)
        if found is None:
            raise NotImplementedError(f"no layout is registered for layers of type {type(self.to_wrap).__name__}")
        return found

    # Read in every call, and making the layout of an engine's layer takes time.
    @cached_property
    def is_stacked(self) -> bool:
        """Whether the base is a layer of grouped experts, with a weight [experts, out, in]."""
        return layout_of(self.to_wrap).is_stacked

    def stored_weight(self) -> nn.Parameter | None:
        """Return the base's local weight if it is stored as it is used; see `stored_weight_of`."""
        return stored_weight_of(self.to_wrap)

    def weight_source(self) -> Tensor | Callable[[], Tensor]:
        """Return the base's local weight; or a function that dequantises it, whose result nothing keeps."""
        weight = self.stored_weight()
        return weight if weight is not None else partial(self.layer_type.weight, self.to_wrap)

    def terms(self) -> list[AdapterTerm]:
        """Return the low-rank terms of the adapter; none where its form is not low-rank.

        An adapter without terms is neither exported nor started from the layer's weight.
        """
        return []

    @property
    def starts_from_weight(self) -> bool:
        """Whether the adapter may start from the layer's weight (svdquant, PiSSA)."""
        return True

    def reset_magnitude(self) -> None:
        """Recompute what the adapter derives from weight and factors, after they were set; by default nothing is."""

    @property
    def adapter_enabled(self) -> bool:
        """Whether the adapter takes part in `forward`."""
        return self._adapter_enabled

    def enable_adapter_layers(self) -> None:
        """Let the adapter take part in `forward`."""
        self._adapter_enabled = True

    def disable_adapter_layers(self) -> None:
        """Leave the adapter out of `forward`.

        Raises:
            AdapterError: The adapter is merged into the base's weight.
        """
        self.check_switchable()
        self._adapter_enabled = False

    def check_switchable(self) -> None:
        """Check that the adapter can be switched on or off.

        Raises:
            AdapterError: It is merged into the base's weight.
        """
        if self.is_merged:
            raise AdapterError("an adapter that is merged into its layer's weight takes part; unmerge before switching")

    @property
    def adapter_names(self) -> list[str]:
        """Names under which adapters of the layer are switched: `default` for one that was given none."""
        return ["default"]

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Switch one adapter on or off.

        Args:
            name: One of `adapter_names`.
            enabled: Whether it takes part in `forward` from now on.

        Raises:
            AdapterError: It is merged into the base's weight.
        """
        if enabled:
            self.enable_adapter_layers()
        else:
            self.disable_adapter_layers()

    def add(self, name: str, adapter: LowRankAdapter) -> None:
        """Add another adapter to the layer; it is enabled.

        Raises:
            AdapterError: See `check_can_add`.
        """
        self.check_can_add(name, adapter.fused)

    def check_can_add(self, name: str, fused: bool) -> None:
        """Check that another adapter can be added to the layer; the message continues the layer's name.

        Args:
            name: Name of the new adapter.
            fused: Whether it runs inside the layer's GEMM.

        Raises:
            AdapterError: The adapter on the layer has no name.
        """
        raise AdapterError(f"carries an adapter without a name, made by {self.applied_by}: named ones cannot be added")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output for x, adapted.

        Args:
            x: Input of the base, in the state in which the base takes it.
            args, kwargs: Further arguments of the base.
        """
        if not self.is_active:
            return self.to_wrap(x, *args, **kwargs)
        if torch.compiler.is_compiling() and reads_store(self.to_wrap):
            # A compiled graph would gather a sharded weight once, when it is made.
            return torch.compiler.disable(self._adapted)(x, *args, **kwargs)
        return self._adapted(x, *args, **kwargs)

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer_type = self.layer_type
        if self.joins and layer_type.enter is not None and layer_type.exit is not None:
            return layer_type.exit(self.to_wrap, self.run_fused(layer_type.enter(self.to_wrap, x), *args, **kwargs))
        return self.run_standalone(x, *args, **kwargs)

    @property
    def is_active(self) -> bool:
        """Whether `forward` computes an adapter: one is enabled, and it is not part of the base's weight."""
        return self._adapter_enabled and not self._is_merged

    @property
    def joins(self) -> bool:
        """Whether the adapter runs inside the base's GEMM, between its `enter` and `exit`."""
        return bool(getattr(self.adapter, "fused", False))

    def run_fused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the adapted GEMM: x [*, in] after the base's `enter` -> [*, out] before its `exit`."""
        raise NotImplementedError(f"{type(self).__name__} cannot join its adapter to the base's GEMM")

    @property
    def runs_by_rows(self) -> bool:
        """Whether the adapted product of some rows of the input can be had without that of the others."""
        return False

    def row_product(self, x: Tensor) -> RowProduct:
        """Return what `run_fused` computes in a form that takes some rows at a time, with dropout of x drawn.

        Args:
            x: [*, in] after the base's `enter`, of a layer without experts, where `runs_by_rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot run on some rows of its input")

    def run_standalone(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base and the standalone adapter, where the base's forward hides its collectives."""
        raise NotImplementedError(f"{type(self).__name__} cannot run its adapter standalone")

    def offsets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the end of each expert's rows in a call `layer(x, tokens_per_expert)`; `None` for other layers.

        Transformer Engine's layers take the numbers as a list, `m_splits`.
        """
        if not self.is_stacked:
            return None
        given = args[0] if args else kwargs.get("m_splits", kwargs.get("tokens_per_expert"))
        if isinstance(given, Tensor):
            return group_offsets(given)
        device = next(self.adapter.parameters()).device
        return group_offsets(torch.tensor(given, device=device))

    def base_linear_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> BaseOutput:
        """Call the base and take its result apart.

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
        layout = self.layer_type.layout(self.to_wrap)
        return layout.shard == "out" and layout.y == I

    def gathers_now(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call of the base gathers an output that its layout states as sharded.

        Raises:
            AdapterError: The call leaves sharded what the layout states as gathered.
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

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is part of the base's weight now."""
        return self._is_merged

    def matrices(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the base's local weight with `tensors`; on grouped experts once for each expert, with its matrices.

        A tensor that is no stack [experts, .., ..] serves every expert.
        """
        weight = self.layer_type.weight(self.to_wrap).detach()
        if not self.is_stacked:
            yield weight, *(tensor.detach() for tensor in tensors)
            return
        for expert in range(weight.shape[0]):
            yield weight[expert], *(tensor.detach()[expert] if tensor.dim() == 3 else tensor for tensor in tensors)

    def merged_weights(self) -> Iterator[Tensor]:
        """Yield the local weight [out, in] that equals base and adapter, in float32 or the weight's wider type.

        Grouped experts have one for each local expert, made when it is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def check_mergeable(self) -> None:
        """Check that the adapter can be merged; one that is merged already passes.

        Raises:
            AdapterError: The adapter is switched off; the weight is not stored in the type it is used in (quantised);
                an activation is between the factors.
        """
        if self._is_merged:
            return
        if not self.adapter_enabled:
            raise AdapterError("the adapter is switched off, and merging it would switch it on; enable it first")
        if self.stored_weight() is None and self.layer_type.store is None:
            kind = type(self.to_wrap).__name__
            if self.layer_type.packed(self.to_wrap) is not None:
                raise AdapterError(
                    f"the weight of a {kind} is packed, and would lose most of what is merged into it; call "
                    "meshpeft.quantization.dequantize_base(model) first"
                )
            raise AdapterError(
                f"{kind} stores its weight in another form than it uses; export the adapter, and merge it into the "
                "base as it was before it was quantised"
            )
        if not all(term.adapter.is_linear for term in self.terms()):
            raise AdapterError("an adapter with an activation between its factors is no change of a weight")

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Give the base the merged weight: computed in float32 or wider, rounded once to the weight's type.

        The base's parameter is replaced, not overwritten: an embedding that shared it (tied) keeps its values.

        Grouped experts are merged one after the other, and only one matrix at a time is widened.

        Args:
            keep_base: Keep the base's own weight for an exact `unmerge` (a second weight in memory).

        Raises:
            AdapterError: See `check_mergeable`.
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
        """Return the base's own parameters, by name.

        Raises:
            AdapterError: The adapter was merged with `keep_base=False`.
        """
        if self._unmerged is None:
            raise AdapterError("the base's weight was not kept when the adapter was merged (keep_base=False)")
        return self._unmerged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit; a tied one is tied again.

        Raises:
            AdapterError: See `check_unmergeable`.
        """
        if not self._is_merged:
            return
        for name, base in self.check_unmergeable().items():
            merged = self.to_wrap.get_parameter(name)
            moved = (base.dtype, base.device) != (merged.dtype, merged.device)  # the model was, meanwhile
            setattr(self.to_wrap, name, parameter_like(merged, base.to(merged.device, merged.dtype)) if moved else base)
        self._unmerged, self._is_merged = None, False

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the base's entries as if it were not wrapped, and the adapter's under `adapter.`.

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


def stored_weight_of(layer: nn.Module) -> nn.Parameter | None:
    """Return a layer's local weight if it is stored as it is used; `None` if every use dequantises it."""
    weight, layer_type = getattr(layer, "weight", None), layer_type_of(layer)
    if layer_type is None or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    # First, because it is cheap: reading a quantised weight means rounding it again.
    if layer_type.unrounded(layer) is not None:
        return None
    return weight if layer_type.weight(layer) is weight else None


def parameter_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Make a parameter of new values with the attributes of an old one: its layout, and what an engine reads on it.

    Where the base is sharded over its replicas, the new one is, too.
    """
    values = values.detach()
    new = nn.Parameter(stored_like(old, values) if is_stored(old) else values, requires_grad=old.requires_grad)
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name not in new.__dict__})
    return new


def _hide_wrapping(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Rename the base's tensors as if it were not wrapped, in their order; a state-dict hook."""
    inner = f"{prefix}to_wrap."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        # Every key is removed and inserted again, to keep the order.
        state_dict[prefix + key.removeprefix(inner) if key.startswith(inner) else key] = state_dict.pop(key)


def _restore_wrapping(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_args: Any) -> None:
    """Undo `_hide_wrapping` in a state dict before it is loaded."""
    kept = (f"{prefix}to_wrap.", f"{prefix}adapter.")
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(kept)]:
        state_dict[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _inside_wrapper(base: nn.Module) -> dict[str, str]:
    """Map each key of the base to `to_wrap`, the attribute under which the wrapper has it.

    `torch.distributed.checkpoint.state_dict` calls `_fqn_modifiers` where it follows state-dict keys through a model.
    """
    return dict.fromkeys([*base._parameters, *base._buffers, *base._modules], "to_wrap")
