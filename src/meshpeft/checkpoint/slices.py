"""The slices that the ranks hold of global tensors, and torch.distributed.checkpoint's plans of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

__all__ = ["Place", "Slice", "SliceLoadPlanner", "SliceSavePlanner", "labelled"]

Place: TypeAlias = tuple[str, tuple[int, ...]]
"""Key of a global tensor, and where a slice starts in it."""


@dataclass(frozen=True)
class Slice:
    """A slice of one global tensor that this rank holds, as torch.distributed.checkpoint asks for it.

    Attributes:
        key: of the global tensor; a rank may hold several slices of one.
        dtype: of the tensor.
        global_shape: of the global tensor.
        offset: where the slice starts in it.
        shape: of the slice.
        values: gives the values, to be read or to be written into, with `shape`'s number of elements.
    """

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    def local(self) -> Tensor:
        """The values, of the slice's shape."""
        return self.values().view(self.shape)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box."""
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))

    def __create_write_items__(self, _label: str, _object: object) -> list[WriteItem]:
        data = TensorWriteData(self.chunk, TensorProperties(dtype=self.dtype), torch.Size(self.global_shape))
        index = MetadataIndex(self.key, torch.Size(self.offset))
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]


def labelled(slices: Iterable[Slice]) -> dict[str, Slice]:
    """The dictionary that torch.distributed.checkpoint wants; its keys mean nothing."""
    return {str(number): part for number, part in enumerate(slices)}


def _by_place(slices: Mapping[str, Slice]) -> dict[Place, Slice]:
    return {(part.key, part.offset): part for part in slices.values()}


def _place(index: MetadataIndex) -> Place:
    return index.fqn, tuple(index.offset or ())


class SliceSavePlanner(DefaultSavePlanner):
    """Plans `labelled` slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """All slices of this rank; who writes those of several ranks is decided afterwards."""
        self.slices = _by_place(self.state_dict)
        return super().create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of a slice of this rank."""
        return self.slices[_place(index)].local()


class SliceLoadPlanner(DefaultLoadPlanner):
    """Plans `labelled` slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the base class does, but for values that are not tensors themselves."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.slices = _by_place(state_dict)

    def create_local_plan(self) -> LoadPlan:
        """What to read of which stored boxes for each slice."""
        assert self.metadata is not None
        stored = cast(Mapping[str, TensorStorageMetadata], self.metadata.state_dict_metadata)
        slices = self.slices.values()
        return LoadPlan(
            [
                item
                for part in slices
                for item in create_read_items_for_chunk_list(part.key, stored[part.key], [part.chunk])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values of a slice of this rank go."""
        return self.slices[_place(index)].local()
