"""Where the values of one tensor are: its global shape, and the slice that this rank holds.

Slicing, gathering, initialisation, gradient reduction, checkpoint entries and export all read a
[`TensorLayout`][meshpeft.parallel.TensorLayout]; none of them looks at a layer's type or at a rank.

Two orders of a fused dim are kept apart. The **canonical** order is that of the unfused parts, one after the
other: `[q; k; v]`, `[gate; up]`. The **fused** order is what a layer holds locally: for `linear_qkv`, per query
group, `[q .. q k v | q .. q k v | ..]`; for `linear_fc1`, `[gate shard; up shard]`. A global tensor is always
canonical, a local one always fused, and [`FusedParts`][meshpeft.parallel.FusedParts] is the only code that converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from meshpeft.parallel.communication import all_gather, positive_dim
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank

__all__ = ["FusedParts", "ParameterMarks", "Piece", "TensorLayout", "layout_of_tensor", "set_layout"]


@dataclass(frozen=True)
class FusedParts:
    """Canonical parts that are fused along one dim.

    Attributes:
        names: the parts in canonical order, for instance `("q", "k", "v")`.
        sizes: the global size of each part along the fused dim.
        blocks: how many `[chunk of part 0, chunk of part 1, ..]` blocks the *global* tensor has (query groups
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
            ParallelError: the blocks, or a part, do not divide over `shards`.
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
        """Whether a local packed tensor is in the canonical order already."""
        return shards == 1 and self.local_blocks(1) == 1

    def chunks(self, shards: int) -> tuple[int, ...]:
        """Length of each part inside one block of one shard's local tensor."""
        blocks = self.local_blocks(shards)
        return tuple(size // (shards * blocks) for size in self.sizes)

    def split(self, tensor: Tensor, dim: int, shards: int) -> list[Tensor]:
        """The local slice of each part, in canonical order, from a local packed tensor. Differentiable.

        Args:
            tensor: packed along `dim`, whose length is `sum(sizes) / shards`.
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
        """The inverse of [`split`][meshpeft.parallel.FusedParts.split]. Differentiable."""
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
        global_shape: shape of the unsharded tensor; along a fused dim, the sum of the parts.
        shards: `(dim, axis)` for each dim that is sharded over a mesh axis; a negative dim counts from the end. Axes
            not named hold the same values.
        fused_parts: the canonical parts of dim `fused_dim`, if it is fused.
        grad_partial: model axes on which the gradient of this tensor is a summand (`P`), so that
            `finalize_gradients` sums it there.
        expert: the tensor belongs to experts: its data-parallel axis is `edp`, not `dp`.
        data_axis: the axis over which gradients of different tokens are summed, where the layer brings its own;
            `None` means the mesh's `edp` (experts) or `dp`.
        mesh_axes: every axis of the mesh that the layer is on, where it brings its own, data parallel first; on
            those that do not divide the tensor, it is replicated. `None` means the mesh's own.
        marks: what the engine of the layer reads on parameters, as attributes: a function of this layout, called
            by `set_layout`, so that they are wherever the layout is.
        counts_as: parameters of the model that the tensor stands for, where it stores them in another form;
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
        """Number of the model's parameters in the whole tensor."""
        return math.prod(self.global_shape) if self.counts_as is None else self.counts_as

    @property
    def shard_axes(self) -> tuple[ParallelAxis, ...]:
        """The axes of more than one rank over which the tensor is divided."""
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
        """The local tensor as the pieces of [`pieces`][meshpeft.parallel.TensorLayout.pieces]. Differentiable."""
        if self.fused_parts is None:
            return [local]
        return self.fused_parts.split(local, self.fused_dim, self._split(self.fused_dim))

    def part_views(self, local: Tensor) -> list[Tensor]:
        """Where the pieces are in the local tensor, to write them there: views, see `FusedParts.views`."""
        if self.fused_parts is None:
            return [local]
        return self.fused_parts.views(local, self.fused_dim, self._split(self.fused_dim))

    def join_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of [`split_parts`][meshpeft.parallel.TensorLayout.split_parts]."""
        if self.fused_parts is None:
            return parts[0]
        return self.fused_parts.fuse(parts, self.fused_dim, self._split(self.fused_dim))

    def slice(self, full: Tensor) -> Tensor:
        """This rank's local tensor of the canonical global tensor `full`. No gradient flows through it.

        Returns `full` itself where nothing is divided and nothing is packed; otherwise a copy or a view.
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
    for replicated: modules that state layouts derive from [`ShardedTensors`][meshpeft.parallel.ShardedTensors], which
    keeps them.

    Raises:
        ParallelError: the parameter does not have the layout's local shape.
    """
    if tuple(tensor.shape) != layout.local_shape:
        raise ParallelError(f"a tensor of shape {tuple(tensor.shape)} cannot have local shape {layout.local_shape}")
    setattr(tensor, _ATTRIBUTE, layout)
    if layout.marks is not None:
        for name, value in layout.marks(layout).items():
            setattr(tensor, name, value)


def layout_of_tensor(tensor: Tensor) -> TensorLayout | None:
    """The layout stated by [`set_layout`][meshpeft.parallel.set_layout], or `None`."""
    return getattr(tensor, _ATTRIBUTE, None)
