"""What a linear layer states about itself, once, and what follows for its weight and for adapters on it.

A layer type enters the registry with one [`LayerType`][meshpeft.parallel.LayerType]. Its
[`LinearLayout`][meshpeft.parallel.LinearLayout] decides the slices of every parameter, initialisation,
which gradients are partial, checkpoint entries and export; nothing else in the package asks what a layer is.

The two kinds of adapters in docs/adapters.md are the two branches of `factor_a` and `factor_b`:
*fused* adapters join between a layer's `enter` and `exit`; *standalone* ones run beside a base whose forward
hides its collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from meshpeft.parallel.class_registry import ClassRegistry
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_tensor import ShardedTensor
from meshpeft.parallel.tensor_layout import Packing, ParameterMarks, TensorLayout

__all__ = ["LayerType", "LinearLayout", "does_more_than_its_type", "layer_type_of", "layout_of", "register_layer_type"]


@dataclass(frozen=True)
class LinearLayout:
    """How a linear layer y = x W^T lies on the mesh. Sizes are global.

    Attributes:
        in_features, out_features: of the unsharded weight [out_features, in_features].
        shard: the dim of W that `axis` divides: `"out"` (column parallel), `"in"` (row parallel) or `None`.
        axis: the axis that divides W: `tp`, or `etp` for experts.
        sequence_parallel: activations outside the layer are divided over `axis` along dim 0.
        gather_output: a column-parallel layer returns all of its output.
        input_is_parallel: a row-parallel layer takes its slice of the input.
        packing: the canonical parts of the out dim (q, k, v; gate, up).
        in_packing: the canonical parts of the in dim (the `stride` of a row-parallel layer).
        experts: number of stacked experts over all ranks, `None` for an ordinary layer. The weight then is
            [experts, out_features, in_features], divided over `expert_axis` along dim 0.
        expert_axis: expert parallel. With `experts=None`: the tokens are divided over it, and one set of parameters
            serves them all (see `for_all_experts`).
        output_is_partial: the layer returns summands over `axis` that something after it adds up
            (row-parallel experts, Transformer Engine's `parallel_mode=None`).
        input_grad_is_reduced_outside: the layer's input gradient stays a summand over `axis`, which the
            producer of the input adds up.
        data_axis: where gradients of different tokens are summed, if not the mesh's own `dp` (or `edp`).
        marks: attributes that the layer's engine reads on its parameters, see
            [`TensorLayout`][meshpeft.parallel.TensorLayout].
        sums: whether the engine's own finalisation sums a gradient over all of its `grad_partial`, of adapters on
            grouped experts: what it does not is summed in the backward pass. `None` means that it does.
    """

    in_features: int
    out_features: int
    shard: Literal["out", "in"] | None = None
    axis: ParallelAxis = field(default_factory=lambda: ParallelAxis("tp"))
    sequence_parallel: bool = False
    gather_output: bool = False
    input_is_parallel: bool = False
    packing: Packing | None = None
    in_packing: Packing | None = None
    experts: int | None = None
    expert_axis: ParallelAxis | None = None
    output_is_partial: bool = False
    input_grad_is_reduced_outside: bool = False
    data_axis: ParallelAxis | None = None
    marks: ParameterMarks | None = None
    sums: Callable[[TensorLayout], bool] | None = None

    @property
    def is_expert(self) -> bool:
        """Whether the gradients of the layer are summed over expert-data parallel."""
        return self.experts is not None or self.expert_axis is not None or self.axis.name == "etp"

    def for_all_experts(self) -> LinearLayout:
        """The layout of one matrix that serves the tokens of every expert: replicated over `expert_axis`.

        The ranks of `expert_axis` see different tokens, so all its gradients are summands there.
        """
        return replace(self, experts=None)

    def weight(self) -> TensorLayout:
        """W [out, in], or [experts, out, in]; a replicated one's gradient is a summand where the tokens are divided."""
        partial = self.shard is None and self.sequence_parallel
        return self._tensor(
            (self.out_features, self.in_features), self.shard, out_packed=True, in_packed=True, partial=partial
        )

    def bias(self) -> TensorLayout:
        """b [out]: divided like the output of a column; replicated for a row, which adds it to token shards."""
        partial = self.shard != "out" and self.sequence_parallel
        return self._tensor(
            (self.out_features,), "out" if self.shard == "out" else None, out_packed=True, partial=partial
        )

    def factor_a(self, rank: int, *, fused: bool = True) -> TensorLayout:
        """A [rank, in] of an adapter y += s (x A^T) B^T on this layer."""
        partial = self._a_is_partial() if fused else self._standalone_a_is_partial()
        return self._tensor(
            (rank, self.in_features), "in" if self.shard == "in" else None, in_packed=True, partial=partial
        )

    def factor_b(self, rank: int, *, fused: bool = True) -> TensorLayout:
        """B [out, rank]; its rows are packed like the layer's output."""
        partial = self._b_is_partial() if fused else self._standalone_b_is_partial()
        return self._tensor(
            (self.out_features, rank), "out" if self.shard == "out" else None, out_packed=True, partial=partial
        )

    def magnitude(self, *, fused: bool = True) -> TensorLayout:
        """m [out] of DoRA: divided in a column; replicated in a row, where it scales what B made."""
        partial = self._b_is_partial() if fused else self._standalone_b_is_partial()
        return self._tensor(
            (self.out_features,), "out" if self.shard == "out" else None, out_packed=True, partial=partial
        )

    # Fused: x after `enter` is replicated in a column, so dA gets only the share of this rank's rows of B. In a
    # row the output is a summand, whose gradient is complete, while h = x A^T is a summand: so is dB.
    def _a_is_partial(self) -> bool:
        return self.shard == "out" or (self.shard is None and self.sequence_parallel)

    def _b_is_partial(self) -> bool:
        return self.shard == "in" or (self.shard is None and self.sequence_parallel)

    # Standalone: h is made whole by a rank-sized collective, so gradients are partial only where tokens are
    # divided, or where no collective is made because the base leaves its own to others.
    def _standalone_a_is_partial(self) -> bool:
        if self.shard == "out":
            return self.sequence_parallel or self.input_grad_is_reduced_outside
        return self.shard is None and self.sequence_parallel

    def _standalone_b_is_partial(self) -> bool:
        if self.shard == "in":
            return self.sequence_parallel or self.output_is_partial
        return self.shard is None and self.sequence_parallel

    def _mesh_axes(self) -> tuple[ParallelAxis, ...] | None:
        if self.data_axis is None:
            return None
        return (self.data_axis, *((self.expert_axis,) if self.expert_axis is not None else ()), self.axis)

    def _grad_partial(self, over_own_axis: bool) -> tuple[ParallelAxis, ...]:
        axes = [self.axis] if over_own_axis else []
        if self.experts is None and self.expert_axis is not None:
            axes.insert(0, self.expert_axis)
        return tuple(axis for axis in axes if axis.world_size > 1)

    def _tensor(
        self,
        shape: tuple[int, ...],
        shard: Literal["out", "in"] | None,
        *,
        out_packed: bool = False,
        in_packed: bool = False,
        partial: bool = False,
    ) -> TensorLayout:
        """A tensor whose dim 0 is out and whose last dim is in (or the rank), stacked over experts if any."""
        lead = 0 if self.experts is None else 1
        shards: list[tuple[int, ParallelAxis]] = []
        if self.experts is not None:
            shape = (self.experts, *shape)
            if self.expert_axis is not None:
                shards.append((0, self.expert_axis))
        if shard is not None:
            shards.append((lead if shard == "out" else len(shape) - 1, self.axis))
        packing, packed_dim = (self.packing if out_packed else None), lead
        if in_packed and self.in_packing is not None:
            packing, packed_dim = self.in_packing, len(shape) - 1
        return TensorLayout(
            shape,
            tuple(shards),
            packing=packing,
            packed_dim=packed_dim,
            grad_partial=self._grad_partial(partial),
            expert=self.is_expert,
            data_axis=self.data_axis,
            mesh_axes=self._mesh_axes(),
            marks=self.marks,
        )


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


def _plain_linear(module: nn.Linear) -> LinearLayout:
    return LinearLayout(module.in_features, module.out_features)


register_layer_type(
    nn.Linear,
    LayerType(
        layout=_plain_linear,
        weight=lambda module: module.weight,
        enter=lambda module, x: x,
        exit=lambda module, y: y if module.bias is None else y + module.bias,
    ),
)
