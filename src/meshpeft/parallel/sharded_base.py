"""A frozen base that is sharded over ranks which would hold the same of it, in the bytes in which it is stored.

A frozen weight has no gradient, so a rank can keep 1/n of its bytes, if it gathers them before each use: in the forward
pass, and again in the backward pass. Nothing else is communicated, and the weights in use are bit for bit the same.

* A *block* is what is gathered at once: the frozen matrices of a layer, one after the other as bytes, packed codes and
  scales as they are. A table of the vocabulary is cut into blocks of some rows, no larger than a layer.
* A *store* holds the blocks of one axis: this rank's share of each, and two buffers of the largest. While one block is
  in use the next is gathered into the other buffer: the one that followed the last time the blocks were read in this
  order. So every rank of the axis has to read the same blocks in the same order.
* A parameter keeps its name, shape, type, device and layout, as a `BlockTensor`: a tensor without memory that is read
  from the store whenever an operation needs its values. Autograd keeps the `BlockTensor` for the backward pass, and
  reads it again there. So whatever multiplies by a weight, of any engine, need not know of it.

A view of a `BlockTensor` (transposed, some rows) is another one. Results of operations are ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.states import start_all_gather, take_slice

__all__ = [
    "BlockStore",
    "BlockTensor",
    "changed_in_place",
    "gathered",
    "is_stored",
    "reads_store",
    "stored_",
    "stored_by_rows_",
    "stored_like",
]

# Tensors begin at multiples of it in a block, as PyTorch's own memory does: a product may round by its alignment.
_ALIGNMENT = 64
_MARK = "_reads_store"


@dataclass(frozen=True)
class _Place:
    """Where the values of a contiguous tensor are among the bytes of a block."""

    block: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(eq=False)
class _Slot:
    """One of the two buffers, and the block that is in it."""

    buffer: Tensor | None = None
    block: int | None = None
    work: Any = None
    tensors: dict[_Place, Tensor] = field(default_factory=dict)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


class BlockStore:
    """The blocks of one axis, each sharded over it, and two buffers for those that are in use.

    Args:
        axis: Axis whose ranks hold the same weights.

    Attributes:
        shards: This rank's bytes of each block.
        gathers: How many blocks were gathered.
        gathered_bytes: Bytes that this rank received from others for them.
        changes: How often values were replaced.
    """

    def __init__(self, axis: ParallelAxis) -> None:
        self.axis = axis
        self.shards: list[Tensor] = []
        self.gathers = self.gathered_bytes = self.changes = 0
        self._slots = [_Slot(), _Slot()]
        self._current = 0  # the slot that was read last
        self._order: dict[tuple[int | None, int], int] = {}  # what followed two blocks when they were read last
        self._before: int | None = None
        self._first: int | None = None  # what was read first since there are buffers

    def add(self, tensors: Sequence[Tensor]) -> list[_Place]:
        """Make a block of full tensors, the same on every rank of the axis; return the place of each. No collective."""
        places, pieces, at = [], [], 0
        for tensor in tensors:
            places.append(_Place(len(self.shards), at, tuple(tensor.shape), tensor.dtype))
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            filling = -raw.numel() % _ALIGNMENT
            pieces += [raw, raw.new_zeros(filling)] if filling else [raw]
            at += raw.numel() + filling
        filling = -at % (self.axis.world_size * _ALIGNMENT)
        full = torch.cat([*pieces, pieces[0].new_zeros(filling)])
        self.shards.append(take_slice(full, self.axis, 0).clone())
        self._settle()
        return places

    def read(self, place: _Place) -> Tensor:
        """Return the values at a place, a view of a buffer that another block will be gathered into. A collective.

        Each rank of the axis reads the same blocks in the same order.
        """
        slot = self._slots[self._current]
        if slot.block != place.block:
            slot = self._move_to(place.block)
        slot.wait()
        if place not in slot.tensors:
            assert slot.buffer is not None
            raw = slot.buffer[place.start : place.start + place.nbytes]
            slot.tensors[place] = raw.view(place.dtype).view(place.shape)
        return slot.tensors[place]

    def write(self, place: _Place, values: Tensor) -> None:
        """Replace the values at a place by full ones, the same on every rank of the axis. No collective."""
        raw = values.detach().to(place.dtype).contiguous().view(-1).view(torch.uint8)
        self._settle()  # only now: the values may be another weight's, read from these blocks
        self.changes += 1
        shard = self.shards[place.block]
        full = shard.new_zeros(shard.shape[0] * self.axis.world_size)
        mask = full.clone()
        full[place.start : place.start + place.nbytes] = raw
        mask[place.start : place.start + place.nbytes] = 1
        own, changed = take_slice(full, self.axis, 0), take_slice(mask, self.axis, 0)
        self.shards[place.block] = torch.where(changed.bool(), own, shard)

    def move(self, device: torch.device) -> None:
        """Move this rank's bytes to a device, unless they are there."""
        if self.shards and _is_elsewhere(device, self.shards[0].device):
            self._settle()
            self.shards = [shard.to(device) for shard in self.shards]

    def expect_first(self) -> None:
        """Gather what was read first since `release`: a pass has ended, and another one follows. A collective."""
        current, other = self._slots[self._current], self._slots[1 - self._current]
        if self._first is not None and current.block is not None:
            self._order[self._before, current.block] = self._first
            if other.block != self._first:
                self._gather(self._first, other)

    def release(self) -> None:
        """Free the buffers, until a block is read again."""
        self._settle()

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds, without the buffers."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of both buffers."""
        largest = max((shard.nbytes for shard in self.shards), default=0)
        return 2 * largest * self.axis.world_size

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStore:
        copied = memo[id(self)] = BlockStore(self.axis)
        copied.shards = [shard.clone() for shard in self.shards]
        return copied

    def _settle(self) -> None:
        for slot in self._slots:
            slot.wait()
        self._slots, self._before, self._first = [_Slot(), _Slot()], None, None

    def _move_to(self, block: int) -> _Slot:
        """Make a block the current one, and start to gather the one that is expected to follow."""
        left = self._slots[self._current].block
        self._first = block if self._first is None else self._first
        self._current = 1 - self._current
        slot, other = self._slots[self._current], self._slots[1 - self._current]
        if slot.block != block:
            self._gather(block, slot)
        if left is not None:
            self._order[self._before, left] = block
        self._before = left
        step = 1 if left is None or block > left else -1
        following = self._order.get((left, block), block + step)
        if 0 <= following < len(self.shards) and other.block != following:
            slot.wait()  # one collective at a time, so that none waits for another's ranks
            self._gather(following, other)
        return slot

    def _gather(self, block: int, slot: _Slot) -> None:
        slot.wait()  # what was expected and did not come
        shard = self.shards[block]
        size = shard.shape[0] * self.axis.world_size
        if slot.buffer is None:
            slot.buffer = shard.new_empty(max(own.shape[0] for own in self.shards) * self.axis.world_size)
        slot.block, slot.tensors = block, {}
        slot.work = start_all_gather(slot.buffer[:size], shard, self.axis)
        self.gathers += 1
        self.gathered_bytes += size - shard.shape[0]


class BlockTensor(Tensor):
    """A tensor whose values are in a `BlockStore`; see the module. Made by `stored_`.

    Attributes:
        store: Store that has them.
        places: Where: rows of the tensor, one place after the other.
    """

    store: BlockStore
    places: tuple[_Place, ...]

    @staticmethod
    def __new__(
        cls, store: BlockStore, places: Sequence[_Place], geometry: Tensor, device: torch.device
    ) -> BlockTensor:
        """Make a view.

        Args:
            store, places: See the class.
            geometry: Its size, strides, offset and type, as a view of the tensor at the places; on the meta device.
            device: Device of its values.
        """
        made: BlockTensor = Tensor._make_wrapper_subclass(
            cls,
            geometry.shape,
            geometry.stride(),
            geometry.storage_offset(),
            dtype=geometry.dtype,
            device=device,
        )
        made.store, made.places = store, tuple(places)
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # typeshed has it as a function
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, BlockTensor):
            if func is torch.ops.aten.view.dtype:  # the bits as numbers of another type: no conversion of the values
                return func(first.gathered().clone(), *args[1:], **kwargs)
            if _is_view(func):
                return first._viewed(func, args[1:], kwargs)
            if func is torch.ops.aten._to_copy.default:
                return first._converted(kwargs)
            # Of its kind, whatever its values are.
            first.store.move(first.device)
            like = first.store.shards[0][:0].view(first.dtype)
            if func.name().startswith("aten::new_"):
                return func(like, *args[1:], **kwargs)
            if func is torch.ops.aten.empty_like.default:
                return func(like.new_empty(first.shape), **kwargs)
            if func is torch.ops.aten.copy_.default:
                return first._written(args[1])
            if func is torch.ops.aten.embedding.default and len(first.places) > 1 and first.is_full:
                return first._looked_up(args[1])
        read = _Reader((*args, *kwargs.values()))
        if _writes(func, args, kwargs):
            raise ParallelError(f"{func} would write into a weight of a sharded base, which is read-only")
        return func(*tree_map_only(BlockTensor, read, args), **tree_map_only(BlockTensor, read, kwargs))

    def gathered(self) -> Tensor:
        """Return the values: a view of a buffer that other values will take the place of. A collective.

        A tensor of several blocks, and one in another type than the stored one, is new memory.
        """
        self.store.move(self.device)  # where another parameter was moved alone
        first = self.store.read(self.places[0])
        if len(self.places) == 1:
            full, at = first, self.places[0].start // first.dtype.itemsize
        else:
            full, at = first.new_empty(self._stored_shape), 0
            for part, place in zip(full.split(self._rows), self.places, strict=True):
                part.copy_(self.store.read(place))
        if not self.is_full:
            # The offset is that in memory: of the buffer, which the block begins.
            full = full.as_strided(self.shape, self.stride(), at + self.storage_offset())
        return full if full.dtype == self.dtype else full.to(self.dtype)

    @property
    def is_full(self) -> bool:
        """Whether this is the tensor at the places, and no other view of it."""
        return self.storage_offset() == 0 and self.is_contiguous() and tuple(self.shape) == self._stored_shape

    @property
    def _rows(self) -> list[int]:
        return [place.shape[0] for place in self.places]

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        return (sum(self._rows), *self.places[0].shape[1:])

    def _geometry(self) -> Tensor:
        """Return a tensor without memory of this size, strides, offset and type."""
        base = torch.empty(math.prod(self._stored_shape), dtype=self.dtype, device="meta")
        return base.as_strided(self.shape, self.stride(), self.storage_offset())

    def _viewed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            found = func(self._geometry(), *args, **kwargs)
        return [self._part(part) for part in found] if isinstance(found, (list, tuple)) else self._part(found)

    def _part(self, geometry: Tensor) -> BlockTensor:
        """Return the view of that geometry; of one block where its values are all there."""
        places, width = self.places, math.prod(self._stored_shape[1:])
        if len(places) > 1 and geometry.numel():
            first = geometry.storage_offset()
            last = first + sum(
                (size - 1) * stride for size, stride in zip(geometry.shape, geometry.stride(), strict=True)
            )
            at = 0
            for place in places:
                end = at + place.shape[0] * width
                if at <= first and last < end:
                    with _disable_current_modes():
                        base = torch.empty(end - at, dtype=geometry.dtype, device="meta")
                        geometry = base.as_strided(geometry.shape, geometry.stride(), first - at)
                    places = (place,)
                    break
                at = end
        return BlockTensor(self.store, places, geometry, self.device)

    def _converted(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the same in another type, to which each reading converts it, or on another device.

        A parameter goes there with its store, as its module does; anything else is a copy of the values.
        """
        device = self.device if kwargs.get("device") is None else torch.device(kwargs["device"])
        if _is_elsewhere(device, self.device):
            if not isinstance(self, nn.Parameter):
                return self.gathered().to(device, kwargs.get("dtype"), copy=True)
            if device.type == "meta":
                raise ParallelError("a weight of a sharded base would lose its values on the meta device")
            self.store.move(device)
        with _disable_current_modes():
            geometry = self._geometry().to(kwargs.get("dtype") or self.dtype)
        return BlockTensor(self.store, self.places, geometry, self.store.shards[0].device)

    def _written(self, values: Tensor) -> BlockTensor:
        if not self.is_full:
            raise ParallelError("a weight of a sharded base can be replaced as a whole only")
        for place, part in zip(self.places, values.expand(self.shape).split(self._rows), strict=True):
            self.store.write(place, part)
        return self

    def _looked_up(self, index: Tensor) -> Tensor:
        """Return the rows [*, columns] at an index [*], of a table in several blocks: they are read one by one."""
        found = None
        for start, part in zip(accumulate(self._rows, initial=0), self.split(self._rows), strict=False):
            local = index - start
            held = (local >= 0) & (local < part.shape[0])
            values = torch.embedding(part, local * held)
            # Chosen, not added: what other rows hold may be infinite.
            found = values if found is None else torch.where(held.unsqueeze(-1), values, found)
        assert found is not None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = BlockTensor(deepcopy(self.store, memo), self.places, self._geometry(), self.device)
            memo[id(self)] = _like(self, copied)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ParallelError(
            "a weight of a sharded base cannot be pickled: each rank holds a part of it. Write the model by "
            "save_pretrained, or as a checkpoint of the full model, which any layout reads"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # theirs has no types
        return f"BlockTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.store.axis})"


class _Reader:
    """Reads the stored tensors of one operation."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        blocks: set[tuple[int, int]] = set()

        def note(tensor: BlockTensor) -> None:
            blocks.update((id(tensor.store), place.block) for place in tensor.places)

        tree_map_only(BlockTensor, note, arguments)
        self._several = len(blocks) > 1

    def __call__(self, tensor: BlockTensor) -> Tensor:
        found = tensor.gathered()
        # Reading another block may put values in its place.
        return found.clone() if self._several else found


@cache
def _is_view(func: Any) -> bool:
    """Whether what an operation returns is a view of its first argument, or that itself."""
    schema = func._schema
    if not schema.arguments or any(argument.is_write for argument in schema.arguments):
        return False
    first = schema.arguments[0].alias_info
    return first is not None and any(returned.alias_info is not None for returned in schema.returns)


def _is_elsewhere(device: torch.device, here: torch.device) -> bool:
    """Whether a device is another one; `cuda` is any GPU."""
    return device.type != here.type or device.index not in (None, here.index)


def _writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes into a stored tensor: one that it is given by itself, in a list, or as `out=`."""
    for at, argument in enumerate(func._schema.arguments):
        given = args[at] if at < len(args) else kwargs.get(argument.name)
        if argument.is_write and any(isinstance(leaf, BlockTensor) for leaf in tree_leaves(given)):
            return True
    return False


def is_stored(tensor: object) -> bool:
    """Whether a tensor's values are in a store."""
    return isinstance(tensor, BlockTensor)


def reads_store(module: nn.Module) -> bool:
    """Whether parameters of a module's own were put into a store, without a look at them: `torch.compile` cannot."""
    return bool(module.__dict__.get(_MARK, False))


def gathered(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that code will read by their address; of a `BlockTensor` what its store has."""
    return tensor.gathered() if isinstance(tensor, BlockTensor) else tensor


@contextmanager
def changed_in_place(tensor: Tensor) -> Iterator[Tensor]:
    """Give the values of a tensor to be changed; of a `BlockTensor` they are put back. A collective then."""
    if not isinstance(tensor, BlockTensor):
        yield tensor.detach()
        return
    values = tensor.gathered().clone()
    yield values
    tensor.copy_(values)


def stored_like(old: Tensor, values: Tensor) -> Tensor:
    """Put values, the same on every rank, into a new block of the store that an old tensor is in. No collective."""
    assert isinstance(old, BlockTensor)
    places = [place for part in values.split(old._rows) for place in old.store.add([part])]
    with _disable_current_modes():
        geometry = torch.empty(tuple(values.shape), dtype=values.dtype, device="meta")
    return BlockTensor(old.store, places, geometry, old.device)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """Make `new` a parameter where `old` is one, with the attributes that others put on it (its layout)."""
    made = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    for name, value in vars(old).items():
        if name not in ("store", "places"):
            setattr(made, name, value)
    return made


Holders: TypeAlias = Iterable[tuple[nn.Module, str]]
"""Modules, and the names of their own parameters, tied ones under each of their names."""


def stored_(holders: Holders, store: BlockStore) -> None:
    """Put frozen parameters of modules into one new block of a store; in their place are `BlockTensor`s.

    Raises:
        ParallelError: One gets a gradient.
    """
    tensors = _frozen(holders)
    places = store.add([parameter for parameter, _ in tensors]) if tensors else []
    for (old, held), place in zip(tensors, places, strict=True):
        _put(store, [place], old, held)


def stored_by_rows_(
    holders: Holders, store: BlockStore, rows: int, read: Callable[[int, int], Tensor] | None = None
) -> None:
    """Put each so many rows of one frozen parameter into a block of their own; otherwise as `stored_`.

    Args:
        holders: Modules and names, all of one parameter.
        store: The store.
        rows: How many.
        read: Gives rows, from a number on so many, of a parameter that holds no values yet.

    Raises:
        ParallelError: It gets a gradient.
    """
    ((old, held),) = _frozen(holders)
    count = old.shape[0]
    sizes = [min(rows, count - first) for first in range(0, count, rows)]
    places = []
    for first, size in zip(range(0, count, rows), sizes, strict=True):
        places += store.add([old.narrow(0, first, size) if read is None else read(first, size)])
    _put(store, places, old, held)


def _frozen(holders: Holders) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module, name in holders:
        parameter = module._parameters[name]
        assert parameter is not None
        if parameter.requires_grad:
            raise ParallelError(f"{name} of a {type(module).__name__} is trained: freeze the base before it is sharded")
        found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _put(store: BlockStore, places: Sequence[_Place], old: nn.Parameter, held: list[tuple[nn.Module, str]]) -> None:
    with _disable_current_modes():
        geometry = torch.empty(tuple(old.shape), dtype=old.dtype, device="meta")
    new = _like(old, BlockTensor(store, places, geometry, store.shards[places[0].block].device))
    for module, name in held:
        module._parameters[name] = new  # type: ignore[assignment]
        module.__dict__[_MARK] = True
