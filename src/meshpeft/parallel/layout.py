"""Where the values of a tensor are, what a linear layer's states are, and what follows for its parameters.

A `TensorLayout` is the global shape of one tensor and the slice that this rank holds.
Slicing, gathering, initialisation, gradient reduction, checkpoint entries and export all read it; none of them looks at
a layer's type or at a rank. A `LinearLayout` is that of a layer, and gives the layout
of each of its parameters, and of adapters on it.

Two orders of a fused dim are kept apart. The **canonical** order is that of the unfused parts, one after the other:
`[q; k; v]`, `[gate; up]`. The **fused** order is what a layer holds locally: for `linear_qkv`, per query group,
`[q .. q k v | q .. q k v | ..]`; for `linear_fc1`, `[gate shard; up shard]`. A global tensor is always canonical, a
local one always fused, and every conversion goes by `FusedParts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank, parallel_group_info
from meshpeft.parallel.states import I, P, R, Shard, State, all_gather, convert, positive_dim

__all__ = [
    "FusedParts",
    "LinearLayout",
    "ParameterMarks",
    "Piece",
    "TensorLayout",
    "convert_parts",
    "layout_of_tensor",
    "master_tensor",
    "set_layout",
]


@dataclass(frozen=True)
class FusedParts:
    """Canonical parts that are fused along one dim.

    Attributes:
        names: The parts in canonical order, for instance `("q", "k", "v")`.
        sizes: The global size of each part along the fused dim.
        blocks: How many `[chunk of part 0, chunk of part 1, ..]` blocks the *global* tensor has (query groups
            for `linear_qkv`); `None` means one block per shard (gate and up of `linear_fc1`).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: int | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names:
            raise ParallelError(
                f"fused parts: {len(self.names)} names for {len(self.sizes)} sizes; give one size a part"
            )
        if self.blocks is not None and any(size % self.blocks for size in self.sizes):
            raise ParallelError(f"fused parts: parts of sizes {self.sizes} do not divide into {self.blocks} blocks")

    def local_blocks(self, shards: int) -> int:
        """Blocks in one shard's local tensor.

        Raises:
            ParallelError: The blocks, or a part, do not divide over `shards`.
        """
        if self.blocks is None:
            for name, size in zip(self.names, self.sizes, strict=True):
                if size % shards:
                    raise ParallelError(
                        f"fused parts: part {name!r} of size {size} does not divide over {shards} shards"
                    )
            return 1
        if self.blocks % shards:
            raise ParallelError(f"fused parts: {self.blocks} blocks do not divide over {shards} shards")
        return self.blocks // shards

    def keeps_order(self, shards: int) -> bool:
        """Whether a local fused tensor is in the canonical order already."""
        return shards == 1 and self.local_blocks(1) == 1

    def chunks(self, shards: int) -> tuple[int, ...]:
        """Length of each part inside one block of one shard's local tensor."""
        blocks = self.local_blocks(shards)
        return tuple(size // (shards * blocks) for size in self.sizes)

    def split(self, tensor: Tensor, dim: int, shards: int) -> list[Tensor]:
        """The local slice of each part, in canonical order, from a local fused tensor. Differentiable.

        Args:
            tensor: Fused along `dim`, whose length is `sum(sizes) / shards`.
        """
        dim = dim % tensor.dim()
        views = self.views(tensor, dim, shards)
        return views if self.local_blocks(shards) == 1 else [part.flatten(dim, dim + 1) for part in views]

    def views(self, tensor: Tensor, dim: int, shards: int) -> list[Tensor]:
        """Where the parts that `split` gives are in a local fused tensor: views, [.., part, ..] or, where there are
        several blocks, [.., blocks, chunk, ..].
        """
        dim = dim % tensor.dim()
        blocks, chunks = self.local_blocks(shards), self.chunks(shards)
        if blocks == 1:
            return list(tensor.split(chunks, dim))
        return list(tensor.unflatten(dim, (blocks, sum(chunks))).split(chunks, dim + 1))

    def fuse(self, parts: Sequence[Tensor], dim: int, shards: int) -> Tensor:
        """The inverse of `split`. Differentiable."""
        dim = dim % parts[0].dim()
        blocks, chunks = self.local_blocks(shards), self.chunks(shards)
        if blocks == 1:
            return torch.cat(list(parts), dim)
        blocked = [part.unflatten(dim, (blocks, chunk)) for part, chunk in zip(parts, chunks, strict=True)]
        return torch.cat(blocked, dim + 1).flatten(dim, dim + 1)


class Piece(NamedTuple):
    """A contiguous box of a canonical global tensor, and the part of the fused dim that it belongs to.

    `part` is `None` for an unfused tensor; `offset` and `shape` are relative to the part's own global tensor of
    `global_shape`. Offsets are symbolic under simulation.
    """

    part: str | None
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


ParameterMarks: TypeAlias = "Callable[[TensorLayout], Mapping[str, Any]]"
"""Attributes of a parameter, by name, as a function of its layout."""


@dataclass(frozen=True)
class TensorLayout:
    """The global tensor that a local one is a slice of.

    Attributes:
        global_shape: Shape of the unsharded tensor; along a fused dim, the sum of the parts.
        shards: `(dim, axis)` for each dim that is sharded over a mesh axis; a negative dim counts from the end. Axes
            not named hold the same values.
        fused_parts: The canonical parts of dim `fused_dim`, if it is fused.
        grad_partial: Model axes on which the gradient of this tensor is partial, so that
            `finalize_gradients` sums it there.
        expert: The tensor belongs to experts: its token axis is `edp`, not `dp` and `cp`.
        data_axis: The axis over which gradients of different tokens are summed, where the layer brings its own;
            `None` means the token axes of the mesh.
        mesh_axes: Every axis of the mesh that the layer is on, where it brings its own, data parallel first; on
            those that do not shard the tensor, it is replicated. `None` means the mesh's own.
        marks: What the engine of the layer reads on parameters, as attributes: a function of this layout, called
            by `set_layout`, so that they are wherever the layout is.
        counts_as: Parameters of the model that the tensor stands for, where it stores them in another form;
            `None` means one for each of its values.
    """

    global_shape: tuple[int, ...]
    shards: tuple[tuple[int, ParallelAxis], ...] = ()
    fused_parts: FusedParts | None = None
    fused_dim: int = 0
    grad_partial: tuple[ParallelAxis, ...] = ()
    expert: bool = False
    data_axis: ParallelAxis | None = None
    mesh_axes: tuple[ParallelAxis, ...] | None = None
    marks: ParameterMarks | None = None
    counts_as: int | None = None

    def __post_init__(self) -> None:
        dims = len(self.global_shape)
        object.__setattr__(self, "shards", tuple((positive_dim(dim, dims), axis) for dim, axis in self.shards))
        if self.fused_parts is not None:
            object.__setattr__(self, "fused_dim", positive_dim(self.fused_dim, dims))
        for dim, axis in self.shards:
            if self.global_shape[dim] % axis.world_size:
                raise ParallelError(
                    f"dim {dim} of a tensor of shape {self.global_shape} cannot be split over "
                    f"{axis.name}={axis.world_size}; use a divisor of {self.global_shape[dim]}"
                )
        if self.fused_parts is not None:
            if sum(self.fused_parts.sizes) != self.global_shape[self.fused_dim]:
                raise ParallelError(
                    f"fused parts: parts of sizes {self.fused_parts.sizes} do not add up to dim {self.fused_dim} "
                    f"of shape {self.global_shape}"
                )
            self.fused_parts.local_blocks(self._split(self.fused_dim))

    def _split(self, dim: int) -> int:
        """Number of shards along `dim`."""
        count = 1
        for sharded, axis in self.shards:
            if sharded == dim:
                count *= axis.world_size
        return count

    def _offset_rank(self, dim: int) -> int:
        """Index of this rank's shard along `dim` (symbolic under simulation)."""
        index: int = 0
        for sharded, axis in self.shards:
            if sharded == dim:
                index = index * axis.world_size + axis.rank
        return index

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice that each rank holds."""
        return tuple(size // self._split(dim) for dim, size in enumerate(self.global_shape))

    @property
    def is_stacked(self) -> bool:
        """Whether it is a stack of matrices, one for each expert: [experts, .., ..]."""
        return self.expert and len(self.global_shape) == 3

    @property
    def size(self) -> int:
        """Number of the model's parameters in the full tensor."""
        return math.prod(self.global_shape) if self.counts_as is None else self.counts_as

    @property
    def token_axes(self) -> tuple[ParallelAxis, ...]:
        """The axes over which the gradients of different tokens are summed, besides `grad_partial`."""
        if self.data_axis is not None:
            return (self.data_axis,)
        return parallel_group_info().token_axes(expert=self.expert)

    @property
    def all_axes(self) -> tuple[ParallelAxis, ...]:
        """Every axis that the tensor is on, token axes first; it is replicated over those that do not shard it."""
        return self.mesh_axes or parallel_group_info().weight_axes(expert=self.expert)

    @property
    def shard_axes(self) -> tuple[ParallelAxis, ...]:
        """The axes of more than one rank that shard the tensor."""
        return tuple(axis for _, axis in self.shards if axis.world_size > 1)

    def pieces(self) -> list[Piece]:
        """What this rank holds: one box per part (in canonical order), or the one box of an unfused tensor."""
        local = self.local_shape
        offset = tuple(self._offset_rank(dim) * size for dim, size in enumerate(local))
        if self.fused_parts is None:
            return [Piece(None, self.global_shape, offset, local)]
        dim, split, index = self.fused_dim, self._split(self.fused_dim), self._offset_rank(self.fused_dim)

        def along(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:dim], value, *values[dim + 1 :])

        return [
            Piece(
                name,
                along(self.global_shape, size),
                along(offset, index * (size // split)),
                along(local, size // split),
            )
            for name, size in zip(self.fused_parts.names, self.fused_parts.sizes, strict=True)
        ]

    def split_parts(self, local: Tensor) -> list[Tensor]:
        """The local tensor as the pieces of `pieces`. Differentiable."""
        if self.fused_parts is None:
            return [local]
        return self.fused_parts.split(local, self.fused_dim, self._split(self.fused_dim))

    def part_views(self, local: Tensor) -> list[Tensor]:
        """Where the pieces are in the local tensor, to write them there: views, see `FusedParts.views`."""
        if self.fused_parts is None:
            return [local]
        return self.fused_parts.views(local, self.fused_dim, self._split(self.fused_dim))

    def join_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_parts`."""
        if self.fused_parts is None:
            return parts[0]
        return self.fused_parts.fuse(parts, self.fused_dim, self._split(self.fused_dim))

    def slice(self, full: Tensor) -> Tensor:
        """This rank's local tensor of the canonical global tensor `full`. No gradient flows through it.

        Returns `full` itself where nothing is sharded and nothing is fused; otherwise a copy or a view.
        """
        if tuple(full.shape) != self.global_shape:
            raise ParallelError(f"expected a full tensor of shape {self.global_shape}, got {tuple(full.shape)}")
        sources = [full] if self.fused_parts is None else list(full.split(list(self.fused_parts.sizes), self.fused_dim))
        with torch.no_grad():
            parts = [
                _narrow(source, list(piece.offset), list(piece.shape))
                for source, piece in zip(sources, self.pieces(), strict=True)
            ]
            return self.join_parts(parts)

    def gather(self, local: Tensor) -> Tensor:
        """The canonical global tensor, on every rank: a collective over each axis in `shards`. No gradient."""
        if tuple(local.shape) != self.local_shape:
            raise ParallelError(f"expected a local tensor of shape {self.local_shape}, got {tuple(local.shape)}")
        parts = self.split_parts(local.detach())
        for dim, axis in reversed(self.shards):
            if axis.world_size > 1:
                parts = [all_gather(part, axis, dim) for part in parts]
        return parts[0] if self.fused_parts is None else torch.cat(parts, self.fused_dim)


@on_each_rank
def _narrow(full: Tensor, offset: list[int], shape: list[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        if length != full.shape[dim]:
            full = full.narrow(dim, start, length)
    return full


_ATTRIBUTE = "meshpeft_layout"


def set_layout(tensor: Tensor, layout: TensorLayout) -> None:
    """State the layout of a parameter.

    It is an attribute, which PyTorch drops when it copies or replaces a parameter, and a parameter without one passes
    for replicated: modules that state layouts derive from `KeepsLayouts`, which keeps them.

    Raises:
        ParallelError: The parameter does not have the layout's local shape.
    """
    if tuple(tensor.shape) != layout.local_shape:
        raise ParallelError(f"a tensor of shape {tuple(tensor.shape)} cannot have local shape {layout.local_shape}")
    setattr(tensor, _ATTRIBUTE, layout)
    if layout.marks is not None:
        for name, value in layout.marks(layout).items():
            setattr(tensor, name, value)


def layout_of_tensor(tensor: Tensor) -> TensorLayout | None:
    """The layout stated by `set_layout`, or `None`."""
    return getattr(tensor, _ATTRIBUTE, None)


@dataclass(frozen=True)
class LinearLayout:
    """How a linear layer y = x Wᵀ lies on the mesh: how W is sharded, and the states of x and y on that axis.

    `enter` converts x from its state outside the layer to the one in which the product takes it, and `exit` converts
    the product's output. The states between the two follow from the sharding of W alone:

    | W | x between | y between | x outside | y outside |
    |---|---|---|---|---|
    | sharded along out (column) | R | Shard(-1) | I; Shard(0), token shards; R, whose producer sums dx | Shard(-1); I |
    | sharded along in (row) | Shard(-1) | P | Shard(-1); I | I; Shard(0), token shards; P, summed after the layer |
    | replicated | as outside | as outside | I; Shard(0), token shards; R, whose producer sums dx | as x |

    An adapter runs *inside* the layer, between `enter` and `exit` (docs/adapters.md calls it fused), or *outside*,
    where the layer's forward hides its collectives (standalone). `states(inside=..)` are those of x and y where the
    adapter is, and three rules give the rest:

    * the gradient of a replicated factor is partial exactly where the activation beside it is not I: A and x, B and y,
      a magnitude and y, a bias and y (`factor_a`, `factor_b`, `magnitude`, `bias`);
    * dropout masks differ over the axis exactly where the activation is sharded (`states.differs`);
    * the standalone h = x Aᵀ is converted from (x for a column, P for a row) to (R for a column, y for a row):
      `bottleneck_states`.

    A layer type enters the registry with one `LayerType`; its layout decides the slices
    of every parameter, initialisation, gradient sums, checkpoint entries and export. Sizes are global.

    Attributes:
        in_features, out_features: Sizes of the unsharded weight [out_features, in_features].
        shard: Dim of W that `axis` shards: `"out"` (column parallel), `"in"` (row parallel) or `None`.
        axis: The axis that shards W: `tp`, or `etp` for experts.
        x, y: States outside the layer, on `axis`. By default those of a layer between column and row: I, then
            Shard(-1), for a column; Shard(-1), then I, for a row; I and I, or y as x, for a replicated W.
        fused_parts: Canonical parts of the out dim (q, k, v; gate, up).
        in_fused_parts: Canonical parts of the in dim (the `stride` of a row-parallel layer).
        experts: Number of stacked experts over all ranks, `None` for an ordinary layer. The weight then is
            [experts, out_features, in_features], sharded over `expert_axis` along dim 0.
        expert_axis: Expert parallel. With `experts=None` the tokens are sharded over it, and one set of parameters
            serves them all (see `for_all_experts`).
        data_axis: Axis over which gradients of different tokens are summed, where the layer brings its own; `None`
            means the token axes of the mesh.
        marks: Attributes that the layer's engine reads on its parameters, see
            `TensorLayout`.
        engine_sums_gradient: Whether the engine's own finalisation sums the gradient of a parameter of this layout over
            all of its `grad_partial`; read for adapters on grouped experts. Where it does not, the backward pass sums.
            `None` means that the finalisation sums every gradient.

    Raises:
        ParallelError: x or y in a state that is not in the table.
    """

    in_features: int
    out_features: int
    shard: Literal["out", "in"] | None = None
    axis: ParallelAxis = field(default_factory=lambda: ParallelAxis("tp"))
    x: State = None  # type: ignore[assignment]  # never: see __post_init__
    y: State = None  # type: ignore[assignment]
    fused_parts: FusedParts | None = None
    in_fused_parts: FusedParts | None = None
    experts: int | None = None
    expert_axis: ParallelAxis | None = None
    data_axis: ParallelAxis | None = None
    marks: ParameterMarks | None = None
    engine_sums_gradient: Callable[[TensorLayout], bool] | None = None

    def __post_init__(self) -> None:
        x = self.x or (Shard(-1) if self.shard == "in" else I)
        y = self.y or {"out": Shard(-1), "in": I, None: x}[self.shard]
        allowed = _OUTSIDE[self.shard]
        if x not in allowed[0] or y not in allowed[1] or (self.shard is None and x != y):
            raise ParallelError(
                f"a layer whose weight is sharded along {self.shard or 'nothing'} takes x in one of "
                f"{', '.join(map(repr, allowed[0]))} and gives y in one of {', '.join(map(repr, allowed[1]))}"
                f"{', the same' if self.shard is None else ''}; got x={x!r}, y={y!r}"
            )
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def states(self, *, inside: bool) -> tuple[State, State]:
        """States of x and y inside the layer, between `enter` and `exit`, or outside it."""
        if not inside or self.shard is None:
            return self.x, self.y
        return (R, Shard(-1)) if self.shard == "out" else (Shard(-1), P)

    @property
    def bottleneck_states(self) -> tuple[State, State]:
        """States of h = x Aᵀ of a standalone adapter: as A gives it, and as B takes it."""
        x, y = self.states(inside=False)
        if self.shard is None:
            return x, x
        return (x, R) if self.shard == "out" else (P, y)

    @property
    def is_full_outside(self) -> bool:
        """Whether a sharded layer takes and gives full activations: full factors then serve a standalone adapter."""
        return self.shard is not None and self.states(inside=False) == (I, I)

    @property
    def takes_token_shards(self) -> bool:
        """Whether the layer gathers its input from token shards, as a column does under sequence parallel."""
        return self.shard == "out" and self.x == Shard(0)

    @property
    def is_expert(self) -> bool:
        """Whether the gradients of the layer are summed over expert-data parallel."""
        return self.experts is not None or self.expert_axis is not None or self.axis.name == "etp"

    @property
    def is_stacked(self) -> bool:
        """Whether the layer holds one matrix for each of its experts: its weight is [experts, out, in]."""
        return self.experts is not None

    @property
    def token_axes(self) -> tuple[ParallelAxis, ...]:
        """The axes over which the layer sees different tokens, but for `axis` and `expert_axis`."""
        if self.data_axis is not None:
            return (self.data_axis,)
        return parallel_group_info().token_axes(expert=self.is_expert)

    def for_all_experts(self) -> LinearLayout:
        """The layout of one matrix that serves the tokens of every expert: replicated over `expert_axis`.

        The ranks of `expert_axis` see different tokens, so all its gradients are partial there.
        """
        return replace(self, experts=None)

    def weight(self) -> TensorLayout:
        """W [out, in], or [experts, out, in]."""
        shape = (self.out_features, self.in_features)
        return self._tensor(shape, self.shard, self.states(inside=True)[0], out_fused=True, in_fused=True)

    def bias(self) -> TensorLayout:
        """b [out], or [experts, out]: sharded like the output of a column; replicated for a row.

        A row adds it after `exit`; one whose output stays P adds a share of it on each rank.
        """
        return self._of_output((self.out_features,), self.states(inside=False)[1])

    def factor_a(self, rank: int, *, inside: bool = True) -> TensorLayout:
        """A [rank, in] of an adapter y += s (x Aᵀ) Bᵀ inside this layer, or outside it."""
        shard: Literal["in"] | None = "in" if self.shard == "in" else None
        return self._tensor((rank, self.in_features), shard, self.states(inside=inside)[0], in_fused=True)

    def factor_b(self, rank: int, *, inside: bool = True) -> TensorLayout:
        """B [out, rank] of such an adapter; its rows are fused like the layer's output."""
        return self._of_output((self.out_features, rank), self.states(inside=inside)[1])

    def magnitude(self, *, inside: bool = True) -> TensorLayout:
        """m [out] of DoRA; on grouped experts [experts, out].

        Its gradient is always summed over the axes that shard tokens (dp and cp; edp for experts). Over `axis`, which
        shards W (tp; etp for experts), it is summed where m is replicated and y beside it is not I:

        | W | m | fused: y inside the layer | standalone: y outside | summed over `axis` |
        |---|---|---|---|---|
        | column | sharded with its rows | Shard(-1) | Shard(-1) or I | never: each rank has its own rows |
        | row | replicated | P | I, Shard(0) or P | fused: always; standalone: unless y is I |
        | replicated | replicated | I, Shard(0) or R | I, Shard(0) or R | where y is not I |

        Who sums it: see the table of `decide_gradient_sum` (`meshpeft.peft.standalone`).
        """
        return self._of_output((self.out_features,), self.states(inside=inside)[1])

    def partial_axes(self, beside: State) -> tuple[ParallelAxis, ...]:
        """The axes over which the gradient of a replicated tensor is partial, given the activation beside it.

        The layer's axis, exactly where that activation is not I; and expert parallel, where one tensor serves all
        experts.
        """
        axes = [self.expert_axis] if self.experts is None and self.expert_axis is not None else []
        if beside is not I:
            axes.append(self.axis)
        return tuple(axis for axis in axes if axis.world_size > 1)

    def _of_output(self, shape: tuple[int, ...], beside: State) -> TensorLayout:
        return self._tensor(shape, "out" if self.shard == "out" else None, beside, out_fused=True)

    def _tensor(
        self,
        shape: tuple[int, ...],
        shard: Literal["out", "in"] | None,
        beside: State,
        *,
        out_fused: bool = False,
        in_fused: bool = False,
    ) -> TensorLayout:
        """A tensor whose dim 0 is out and whose last dim is in (or the rank), stacked over experts if any.

        Args:
            shape: Global shape of one expert's tensor.
            shard: Which of the two dims `axis` shards.
            beside: State of the activation beside it.
            out_fused, in_fused: Whether the parts of the output, or input, features are fused along that dim.
        """
        lead = int(self.is_stacked)
        shards: list[tuple[int, ParallelAxis]] = []
        if self.experts is not None:
            shape = (self.experts, *shape)
            if self.expert_axis is not None:
                shards.append((0, self.expert_axis))
        if shard is not None:
            shards.append((lead if shard == "out" else len(shape) - 1, self.axis))
        fused_parts, fused_dim = (self.fused_parts if out_fused else None), lead
        if in_fused and self.in_fused_parts is not None:
            fused_parts, fused_dim = self.in_fused_parts, len(shape) - 1
        own_mesh = None if self.data_axis is None else (self.data_axis, self.expert_axis, self.axis)
        return TensorLayout(
            shape,
            tuple(shards),
            fused_parts=fused_parts,
            fused_dim=fused_dim,
            # Each rank has its own slice of a tensor that the axis shards, whose gradient so is complete, as beside I.
            grad_partial=self.partial_axes(beside if shard is None else I),
            expert=self.is_expert,
            data_axis=self.data_axis,
            mesh_axes=None if own_mesh is None else tuple(axis for axis in own_mesh if axis is not None),
            marks=self.marks,
        )


# Sharded dim of W -> the states outside the layer that x, and y, may have.
_OUTSIDE: dict[str | None, tuple[tuple[State, ...], tuple[State, ...]]] = {
    "out": ((I, Shard(0), R), (Shard(-1), I)),
    "in": ((Shard(-1), I), (I, Shard(0), P)),
    None: ((I, Shard(0), R), (I, Shard(0), R)),
}


def convert_parts(
    x: Tensor, src: State, dst: State, axis: ParallelAxis, fused_parts: FusedParts | None, dim: int = -1
) -> Tensor:
    """Convert x between sharded and full along `dim`, where fused parts are sharded one by one.

    Args:
        x: [.., N, ..]: full and in canonical order in the state I; sharded and fused in `Shard(dim)`.
        src, dst, axis: As in `convert`.
        fused_parts: The parts of `dim`, if they are fused.
        dim: The dim that is sharded.
    """
    size = axis.world_size
    if src == dst or fused_parts is None or fused_parts.keeps_order(size):
        return convert(x, src, dst, axis)
    if isinstance(src, Shard):
        return torch.cat([convert(part, src, dst, axis) for part in fused_parts.split(x, dim, size)], dim)
    parts = [convert(part, src, dst, axis) for part in x.split(list(fused_parts.sizes), dim)]
    return fused_parts.fuse(parts, dim, size)


def master_tensor(parameter: Tensor) -> Tensor:
    """Gather a parameter, in canonical order. A collective over each axis that shards it; differentiable.

    | | forward | backward |
    |---|---|---|
    | dense, sharded over tp | Shard -> I, all-gather | I -> Shard, slice |
    | dense, replicated | nothing | nothing |
    | experts | Shard -> R over each axis, all-gather | P -> Shard, reduce-scatter, divided by tp |

    The result is `I` over tensor parallel, as a loss is. Where the ranks use it on different tokens, `mp_copy` makes it
    `R`. Ranks of expert parallel are ranks of data parallel, of tensor parallel, or of both, so their gradients are
    summed, and each counts once for each rank of tensor parallel.

    Args:
        parameter: Local values, with a layout.

    Returns:
        The full tensor of the layout's global shape, on every rank; a view of the parameter on one rank.

    Raises:
        ParallelError: The parameter has no layout.
    """
    layout = layout_of_tensor(parameter)
    if layout is None:
        raise ParallelError(
            f"a parameter of shape {tuple(parameter.shape)} has lost its layout: it was replaced by a new one; "
            "copy into it instead, or call set_layout on the new one"
        )
    parts = layout.split_parts(parameter.view_as(parameter))
    for dim, axis in reversed(layout.shards):
        parts = [convert(part, Shard(dim), R if layout.expert else I, axis) for part in parts]
    full = parts[0] if layout.fused_parts is None else torch.cat(parts, layout.fused_dim)
    return _with_gradient_over(full, _times_counted(layout))


def _times_counted(layout: TensorLayout) -> int:
    """How many times the same gradient of the full tensor is summed, by the gather and by `finalize_gradients`."""
    if layout.expert:
        return parallel_group_info().tp.world_size
    count = 1
    for axis in layout.grad_partial:
        count *= axis.world_size
    return count


def _with_gradient_over(full: Tensor, count: int) -> Tensor:
    """`full`, whose gradient is divided by `count`."""
    if count == 1 or not (full.requires_grad and torch.is_grad_enabled()):
        return full
    fixed = full.detach()
    return fixed + (full - fixed) / count
