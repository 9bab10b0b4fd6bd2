"""This package's checkpoint entries as those of Megatron-Core's `dist_checkpointing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from meshpeft.parallel import ParallelAxis, TensorLayout, parallel_group_info
from meshpeft.parallel import ShardedTensor as Entry
from meshpeft.parallel.sharded_tensor import part_name, register_checkpoint_format

__all__ = ["megatron_entries", "place_among_copies"]

ReplicaId = tuple[int, int, int]


def megatron_entries(entries: Mapping[str, Entry]) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Make Megatron's own entries for an adapter on one of its layers.

    A fused parameter becomes one factory, which saves its canonical parts under their names and packs them again when
    they are loaded; its optimizer state follows.

    Args:
        entries: Entries of parameters whose layouts have the axes of their mesh.

    Returns:
        Name of each parameter -> its entry. The data is the parameter itself, by which Megatron's optimizer finds it.
    """
    parts: dict[str, list[Entry]] = {}
    for entry in entries.values():
        parts.setdefault(entry.name, []).append(entry)
    return {name: _factory(name, group) if len(group) > 1 else _tensor(group[0]) for name, group in parts.items()}


def _tensor(entry: Entry) -> ShardedTensor:
    return _sharded_tensor(entry, entry.key, entry.source, _replica_id(entry.layout))


def _sharded_tensor(entry: Entry, key: str, data: Tensor, replica_id: ReplicaId) -> ShardedTensor:
    return ShardedTensor(
        key,
        data,
        data.dtype,
        tuple(data.shape),
        entry.global_shape,
        entry.global_offset,
        tuple(size // local for size, local in zip(entry.global_shape, entry.local_shape, strict=True)),
        replica_id,
        entry.prepended_axes,
    )


def _factory(name: str, parts: Sequence[Entry]) -> ShardedTensorFactory:
    layout = parts[0].layout
    assert layout is not None
    return ShardedTensorFactory(
        name, parts[0].source, partial(_split, parts, layout), partial(_join, layout), _replica_id(layout)
    )


@torch.no_grad()
def _split(
    entries: Sequence[Entry],
    layout: TensorLayout,
    key: str,
    tensor: Tensor,
    replica_id: ReplicaId,
    flattened_range: slice | None,
) -> list[ShardedTensor]:
    """Return what a factory saves: the parts of a parameter or of a state of it, under `key` with their names."""
    assert layout.fused_parts is not None and flattened_range is None
    return [
        _sharded_tensor(entry, part_name(key, part), local, replica_id)
        for entry, part, local in zip(entries, layout.fused_parts.names, layout.split_parts(tensor), strict=True)
    ]


@torch.no_grad()
def _join(layout: TensorLayout, parts: list[Tensor]) -> Tensor:
    return layout.join_parts(parts)


def _replica_id(layout: TensorLayout | None) -> ReplicaId:
    """Return (0, index over the layer's model axes, index over data parallel) among ranks with the same slice."""
    axes = _mesh_axes(layout)
    return (0, _place(axes[1:], layout), axes[0].rank)


def place_among_copies(layout: TensorLayout) -> int:
    """Return this rank's index among those that hold the same slice of a parameter, data parallel ones aside."""
    return _place((layout.mesh_axes or ())[1:], layout)


def _mesh_axes(layout: TensorLayout | None) -> tuple[ParallelAxis, ...]:
    """Return the axes of the mesh that a tensor is on, data parallel first: its layer's, or the mesh's own."""
    if layout is not None and layout.mesh_axes is not None:
        return layout.mesh_axes
    info, expert = parallel_group_info(), layout is not None and layout.expert
    weight_axes = [axis for axis in info.weight_axes(expert=expert) if axis not in info.token_axes(expert=expert)]
    return (info.token_axis(expert=expert), *weight_axes)


def _place(axes: tuple[ParallelAxis, ...], layout: TensorLayout | None) -> int:
    sharded = {axis.name for _, axis in layout.shards} if layout is not None else set()
    place = 0
    for axis in axes:
        if axis.name not in sharded:
            place = place * axis.world_size + axis.rank
    return place


# Every module of Megatron's hands this group down with a call, or adds it.
register_checkpoint_format(lambda metadata: "dp_cp_group" in metadata, megatron_entries)
