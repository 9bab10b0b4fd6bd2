"""Which slice of which global tensor this rank holds, under names that no layout changes.

A checkpoint, whatever writes it, needs nothing else. The entries derive from each parameter's
`TensorLayout` alone: no layer describes itself a second time here.

Fused parameters are stored as their canonical parts: `linear_qkv.weight` as `linear_qkv.q.weight`,
`linear_qkv.k.weight` and `linear_qkv.v.weight`. Stacked experts keep their expert dim, which is global.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from meshpeft.parallel.class_registry import load_engines_in_use
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.layout import TensorLayout, layout_of_tensor, set_layout
from meshpeft.parallel.mesh import is_simulated, on_each_rank
from meshpeft.parallel.sharded_base import BlockTensor

__all__ = [
    "COMPILED",
    "KeepsLayouts",
    "held_module",
    "is_held",
    "ShardedOffset",
    "ShardedStateDict",
    "ShardedTensor",
    "ShardedTensors",
    "expert_key",
    "in_format",
    "in_format_of_caller",
    "part_name",
    "register_checkpoint_format",
    "sharded_state_dict",
    "sharded_tensors",
]

ShardedOffset: TypeAlias = tuple[int, int, int]
"""`(axis, index, count)`: the tensor is slice `index` of `count` along an axis that is put in front of its own."""


@dataclass(frozen=True, eq=False)
class ShardedTensor:
    """One contiguous box of one global tensor.

    Attributes:
        key: The global tensor's name, the same at every layout.
        source: The local tensor that the values are of: a parameter or a buffer, all parts of it.
        global_shape: Shape of the global tensor, prepended axes first.
        global_offset: Where the box starts in it; symbolic under simulation.
        replica_id: 0 on exactly one of the ranks that hold the same box, which is the one that would write it;
            symbolic under simulation.
        prepended_axes: How many dims in front of `global_shape` the local tensor does not have.
        name: Name of `source`; differs from `key` where this is one part of a fused tensor.
        part: Number of this part; `None` where `source` is not fused.
        layout: Layout of `source`; `None` where it is the same on every rank.
    """

    key: str
    source: Tensor = field(repr=False)
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: int = 0
    prepended_axes: int = 0
    name: str = ""
    part: int | None = None
    layout: TensorLayout | None = field(default=None, repr=False)

    @property
    def data(self) -> Tensor:
        """The local values, detached; of the global tensor's shape without its `prepended_axes`.

        A view of `source`, or a copy (made each time) where its parts are interleaved, or its base is sharded.
        """
        source = self.source.detach()
        if isinstance(source, BlockTensor):
            source = source.gathered().clone()
        return source if self.part is None or self.layout is None else self.layout.split_parts(source)[self.part]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.source.dtype

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the box, with a 1 for each prepended axis."""
        own = self.source.shape if self.part is None or self.layout is None else self.layout.pieces()[self.part].shape
        return (1,) * self.prepended_axes + tuple(own)


ShardedStateDict: TypeAlias = dict[str, ShardedTensor]
"""Local name -> what this rank holds. The name is the entry's `key`, until a caller renames one of them."""


class KeepsLayouts:
    """Mixin of a module that keeps the layouts of its parameters, its children's among them, in copies.

    PyTorch puts new parameters in the place of the old ones when a module is copied, moved off the meta device
    (`to_empty`), or cast under simulation; without their layouts they would pass for replicated ones.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layouts = _layouts(self)
        applied = super()._apply(fn, recurse)  # type: ignore[misc]  # nn.Module's: the mixin stands before it
        _mark(self, layouts)
        return applied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__dict__, memo))
        _mark(copied, _layouts(self))
        return copied


class ShardedTensors(KeepsLayouts):
    """Mixin of a module whose parameters have layouts: describes them for a checkpoint, and keeps them in copies.

    `load_state_dict` takes stacked experts also one by one, as other systems store them: `weight3` for expert 3 of
    `weight`, numbered over all ranks. A rank takes its own and ignores the others.
    """

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """See `sharded_state_dict`.

        An engine that asks gets entries of its own format, see `in_format_of_caller`.
        """
        assert isinstance(self, nn.Module)
        return in_format_of_caller(sharded_state_dict(self, prefix, sharded_offsets, metadata), metadata)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, layout in _layouts(self).items():
            if layout.expert and "." not in name:
                _stack_experts(state_dict, prefix + name, layout)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]  # nn.Module's


def _layouts(module: Any) -> dict[str, TensorLayout]:
    """The layouts of a module's parameters and buffers, its children's among them."""
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    found = {name: layout_of_tensor(tensor) for name, tensor in tensors}
    return {name: layout for name, layout in found.items() if layout is not None}


def _mark(module: Any, layouts: Mapping[str, TensorLayout]) -> None:
    for name, layout in layouts.items():
        path, _, own = name.rpartition(".")
        holder = module.get_submodule(path)
        tensor = holder._parameters[own] if own in holder._parameters else holder._buffers[own]
        if layout_of_tensor(tensor) is None:
            set_layout(tensor, layout)


def expert_key(key: str, expert: int) -> str:
    """The name of one of the experts that are stacked under `key`: `linear_fc1.weight`, 3 -> `linear_fc1.weight3`."""
    return f"{key}{expert}"


def _stack_experts(state_dict: dict[str, Tensor], key: str, layout: TensorLayout) -> None:
    """Put this rank's experts under `key`, if they are there one by one and all of one shape."""
    names = [expert_key(key, expert) for expert in range(layout.global_shape[0])]
    first, count = layout.pieces()[0].offset[0], layout.local_shape[0]
    # All ranks' experts where this process is all ranks.
    own = names if is_simulated() else names[first : first + count]
    if key in state_dict or not all(name in state_dict for name in own):
        return
    if len({state_dict[name].shape for name in own}) == 1:
        state_dict[key] = _stacked([state_dict.get(name) for name in names], first, count)
        for name in names:
            state_dict.pop(name, None)


@on_each_rank
def _stacked(experts: list[Tensor | None], first: int, count: int) -> Tensor:
    return torch.stack([expert for expert in experts[first : first + count] if expert is not None])


def sharded_state_dict(
    module: nn.Module,
    prefix: str = "",
    sharded_offsets: Sequence[ShardedOffset] = (),
    metadata: Mapping[str, Any] | None = None,
) -> ShardedStateDict:
    """What this rank holds of a module's parameters and persistent buffers, and of its children's.

    A child with a `sharded_state_dict` of its own is asked for it. What a wrapper holds (a compiled block) has the
    wrapper's name. A tensor without a layout is the same on every
    rank. Not a collective.

    Args:
        module: Described itself by its parameters, whatever methods it has.
        prefix: Prefix of the names, with its dot.
        sharded_offsets: `(axis, index, count)` of each axis that is put in front of the tensors' own: of layer 3 of
            8, stored stacked, `((0, 3, 8),)`. The caller then leaves the layer's number out of `prefix`.
        metadata: For the children's own methods; not read here.

    Returns:
        An entry for each parameter, or for each part of a fused one.

    Raises:
        ParallelError: `sharded_offsets` do not number their axes 0, 1, .., or an index is out of range.
    """
    _check_offsets(sharded_offsets)
    entries: ShardedStateDict = {}
    for name, tensor in _own_tensors(module):
        for entry in sharded_tensors(prefix + name, tensor, layout_of_tensor(tensor), sharded_offsets):
            entries[entry.key] = entry
    for name, child in module.named_children():
        child_prefix = prefix if is_held(name, prefix) else f"{prefix}{name}."
        described = getattr(child, "sharded_state_dict", None)
        if callable(described):
            entries.update(described(child_prefix, sharded_offsets, metadata))
        else:
            entries.update(sharded_state_dict(child, child_prefix, sharded_offsets, metadata))
    return entries


Format: TypeAlias = "Callable[[Mapping[str, ShardedTensor]], Mapping[str, Any]]"
_formats: list[tuple[Callable[[Mapping[str, Any]], bool], Format]] = []


def register_checkpoint_format(asks: Callable[[Mapping[str, Any]], bool], entries: Format) -> None:
    """State how an engine's checkpoints describe what this package's modules hold.

    Args:
        asks: Whether the `metadata` of a call of `sharded_state_dict` are those of the engine's own calls.
        entries: Entries of this package -> those of the engine's format.
    """
    _formats.append((asks, entries))


def in_format_of_caller(entries: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Convert entries to the format of the engine that asks for them; keep them if it is none.

    An engine that recurses through a model meets modules of this package on layers, and in places, of any class. Its
    checkpoints would store entries that it does not know as objects, the same on every rank.
    """
    if not metadata:
        return dict(entries)
    load_engines_in_use()
    converted = dict(entries)
    for asks, form in _formats:
        if asks(metadata):
            converted = in_format(converted, form)
    return converted


def in_format(entries: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """Convert the entries that are this package's; others are in a format already."""
    ours = {name: entry for name, entry in entries.items() if isinstance(entry, ShardedTensor)}
    return {**{name: entry for name, entry in entries.items() if name not in ours}, **form(ours)}


def sharded_tensors(
    name: str,
    tensor: Tensor,
    layout: TensorLayout | None,
    sharded_offsets: Sequence[ShardedOffset] = (),
) -> list[ShardedTensor]:
    """The entries of one tensor: one, or one for each part of a fused one in canonical order.

    Args:
        name: Full name of the tensor. A part is put before the last component: `linear_qkv.q.weight`.
        tensor: Local values, of the layout's local shape.
        layout: `None` for a tensor that is the same on every rank.
        sharded_offsets: See `sharded_state_dict`.

    Raises:
        ParallelError: The tensor does not have the layout's local shape.
    """
    layout = TensorLayout(tuple(tensor.shape)) if layout is None else layout
    if tuple(tensor.shape) != layout.local_shape:
        raise ParallelError(f"{name} has shape {tuple(tensor.shape)}, but its layout says {layout.local_shape}")
    before_offset = tuple(index for _, index, _ in sharded_offsets)
    before_shape = tuple(count for _, _, count in sharded_offsets)
    replica_id = _replica_id(layout)
    return [
        ShardedTensor(
            key=part_name(name, piece.part),
            source=tensor,
            global_shape=before_shape + piece.global_shape,
            global_offset=before_offset + piece.offset,
            replica_id=replica_id,
            prepended_axes=len(sharded_offsets),
            name=name,
            part=None if piece.part is None else number,
            layout=layout,
        )
        for number, piece in enumerate(layout.pieces())
    ]


def part_name(name: str, part: str | None) -> str:
    """`linear_qkv.weight`, `q` -> `linear_qkv.q.weight`."""
    if part is None:
        return name
    module, dot, attribute = name.rpartition(".")
    return f"{module}{dot}{part}.{attribute}"


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    buffers = [
        (name, buffer)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*own, *buffers]


def _check_offsets(sharded_offsets: Sequence[ShardedOffset]) -> None:
    if [axis for axis, _, _ in sharded_offsets] != list(range(len(sharded_offsets))):
        raise ParallelError(f"sharded_offsets={tuple(sharded_offsets)}: expected the axes 0, 1, .. in order")
    for axis, index, count in sharded_offsets:
        if not 0 <= index < count:
            raise ParallelError(f"sharded_offsets: index {index} of axis {axis} is not in [0, {count})")


def _replica_id(layout: TensorLayout) -> int:
    """This rank's place among those of its pipeline stage that hold the same slice."""
    sharded = {axis.name for _, axis in layout.shards}
    replica = 0
    for axis in layout.all_axes:
        if axis.name not in sharded:
            replica = replica * axis.world_size + axis.rank
    return replica


# Names in checkpoints, exported adapters and patterns are those of the model without wrappers: compiled or not, in a
# data-parallel wrapper or not, it reads what it wrote.
COMPILED = "_orig_mod"
"""What `torch.compile` calls the module that it wraps."""

# Compilation, activation checkpointing, sharded data parallel.
_HELD = frozenset({COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def is_held(attribute: str, full_name: str) -> bool:
    """Whether a child is what a wrapper holds.

    Args:
        attribute: What its parent calls it. Data parallel and mixed precision say `module`, which is such a name only
            at the root.
        full_name: Its parent's; empty for the model.
    """
    return attribute in _HELD or (attribute == "module" and not full_name)


def held_module(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it."""
    for attribute, child in model.named_children():
        if is_held(attribute, ""):
            return held_module(child)
    return model
