"""What a linear layer states about itself, once, and what follows for its weight and for adapters on it.

A layer type enters the registry with one [`LayerType`][meshpeft.parallel.LayerType] (`layer_types.py`). Its
[`LinearLayout`][meshpeft.parallel.LinearLayout] decides the slices of every parameter, initialisation,
which gradients are partial, checkpoint entries and export; nothing else in the package asks what a layer is.

The two kinds of adapters in docs/adapters.md are the two branches of `factor_a` and `factor_b`:
*fused* adapters join between a layer's `enter` and `exit`; *standalone* ones run beside a base whose forward
hides its collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.tensor_layout import FusedParts, ParameterMarks, TensorLayout

__all__ = ["LinearLayout"]


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
        fused_parts: the canonical parts of the out dim (q, k, v; gate, up).
        in_fused_parts: the canonical parts of the in dim (the `stride` of a row-parallel layer).
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
    fused_parts: FusedParts | None = None
    in_fused_parts: FusedParts | None = None
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

    @property
    def is_stacked(self) -> bool:
        """Whether the layer holds the weights of several experts, [experts, out, in]."""
        return self.experts is not None

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
        lead = int(self.is_stacked)
        shards: list[tuple[int, ParallelAxis]] = []
        if self.experts is not None:
            shape = (self.experts, *shape)
            if self.expert_axis is not None:
                shards.append((0, self.expert_axis))
        if shard is not None:
            shards.append((lead if shard == "out" else len(shape) - 1, self.axis))
        fused_parts, fused_dim = (self.fused_parts if out_packed else None), lead
        if in_packed and self.in_fused_parts is not None:
            fused_parts, fused_dim = self.in_fused_parts, len(shape) - 1
        return TensorLayout(
            shape,
            tuple(shards),
            fused_parts=fused_parts,
            fused_dim=fused_dim,
            grad_partial=self._grad_partial(partial),
            expert=self.is_expert,
            data_axis=self.data_axis,
            mesh_axes=self._mesh_axes(),
            marks=self.marks,
        )
