"""Slices of global tensors, planned by torch.distributed.checkpoint and stored as safetensors files and a manifest.

torch.distributed.checkpoint decides which rank writes which slice, and which boxes of what is stored a rank reads. The
files are one safetensors file per rank, with every slice under `key@offset`, and a `manifest.json`. Its own file format
is not used because it keeps its metadata as a pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from meshpeft.checkpoint.manifest import Chunk, FileRecord, TensorRecord, file_sha256
from meshpeft.hub.tensor_files import CheckpointError, Declared, TensorFiles, TensorFileWriter
from meshpeft.parallel.errors import shown

__all__ = ["Reader", "Slice", "SliceId", "SliceLoadPlanner", "SliceSavePlanner", "Writer", "dtype_name", "labelled"]


@dataclass(frozen=True)
class _Written:
    """The file and name of one slice; the file's record is the same for all slices in it."""

    file: str
    name: str
    record: FileRecord


class Writer(StorageWriter):
    """Write a checkpoint's files into a folder; the last call, on one rank, writes the manifest.

    Args:
        folder: Made empty by the coordinating rank before any rank writes.
        prepare: Makes the folder.
        publish: Takes the tensors and files of the manifest; called when all files are on the disk.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[], None],
        publish: Callable[[dict[str, TensorRecord], dict[str, FileRecord]], None],
    ) -> None:
        super().__init__()
        self.folder, self.prepare, self.publish = folder, prepare, publish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: no state is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, and name each rank's file."""
        self.prepare()
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, slice by slice."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan.items, str(plan.storage_data), planner) if plan.items else [])
        return done

    def _write(self, items: Sequence[WriteItem], file: str, planner: SavePlanner) -> list[WriteResult]:
        path = self.folder / file
        declared = [_declared(item) for item in items]
        writer = TensorFileWriter(path, declared, checksum=False)  # that of the whole file is in the manifest
        try:
            for item in items:
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor)
                writer.write(values)
            writer.close()
        finally:
            writer.abandon()
        record = FileRecord(path.stat().st_size, file_sha256(path))
        return [
            WriteResult(item.index, item.tensor_storage_size() or 0, _Written(file, slot.name, record))
            for item, slot in zip(items, declared, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Pass what was written to `publish`."""
        written: dict[MetadataIndex, _Written] = {item.index: item.storage_data for rank in results for item in rank}
        tensors = {}
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = []
            for chunk in stored.chunks:
                place = written[MetadataIndex(key, chunk.offsets)]
                chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.file, place.name))
            tensors[key] = TensorRecord(dtype_name(stored.properties.dtype), tuple(stored.size), tuple(chunks))
        self.publish(tensors, {place.file: place.record for place in written.values()})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether this could write there."""
        return isinstance(checkpoint_id, str | Path)


class Reader(StorageReader):
    """Read slices of a checkpoint's tensors.

    Args:
        directory: Directory of the checkpoint.
        tensors: Tensors of its manifest.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorRecord]) -> None:
        super().__init__()
        self.directory, self.tensors = directory, tensors
        self._chunks = {
            MetadataIndex(key, torch.Size(chunk.offset)): chunk
            for key, tensor in tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: no state is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe the manifest in torch.distributed.checkpoint's classes."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, tensor.dtype)),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks],
                )
                for key, tensor in self.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's slices, file by file."""
        by_file: dict[str, list[tuple[Any, Chunk]]] = {}
        for item in plan.items:
            chunk = self._chunks[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for name, items in by_file.items():
            with TensorFiles([self.directory / name]) as file:
                for item, chunk in items:
                    if chunk.name not in file.names() or file.shape(chunk.name) != chunk.shape:
                        raise CheckpointError(f"{file.path} does not hold {shown(chunk.name)} as the manifest says")
                    box = file.read_box(chunk.name, tuple(item.storage_offsets), tuple(item.lengths))
                    planner.resolve_tensor(item).copy_(box)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether this could read there."""
        return isinstance(checkpoint_id, str | Path)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type: `torch.float32` is `float32`."""
    return str(dtype).removeprefix("torch.")


def _declared(item: WriteItem) -> Declared:
    data = item.tensor_data
    assert data is not None
    return Declared(
        f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}", data.properties.dtype, tuple(data.chunk.sizes)
    )


SliceId: TypeAlias = tuple[str, tuple[int, ...]]
"""Key of a global tensor, and where a slice starts in it."""


@dataclass(frozen=True)
class Slice:
    """A slice of one global tensor that this rank holds, with the method that torch.distributed.checkpoint calls.

    Attributes:
        key: Key of the global tensor; a rank may hold several slices of one.
        dtype: Dtype of the tensor.
        global_shape: Shape of the global tensor.
        offset: Index at which the slice starts in it.
        shape: Shape of the slice.
        values: Gives the values, to be read or to be written into, with `shape`'s number of elements.
    """

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    def local(self) -> Tensor:
        """Get the values, in the slice's shape."""
        return self.values().view(self.shape)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Box of the slice in the global tensor."""
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))

    def __create_write_items__(self, _label: str, _object: object) -> list[WriteItem]:
        data = TensorWriteData(self.chunk, TensorProperties(dtype=self.dtype), torch.Size(self.global_shape))
        index = MetadataIndex(self.key, torch.Size(self.offset))
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]


def labelled(slices: Iterable[Slice]) -> dict[str, Slice]:
    """Number the slices: torch.distributed.checkpoint takes a dictionary, whose keys mean nothing."""
    return {str(number): part for number, part in enumerate(slices)}


def _by_id(slices: Mapping[str, Slice]) -> dict[SliceId, Slice]:
    return {(part.key, part.offset): part for part in slices.values()}


def _slice_id(index: MetadataIndex) -> SliceId:
    return index.fqn, tuple(index.offset or ())


class SliceSavePlanner(DefaultSavePlanner):
    """Plan `labelled` slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plan to write all slices of this rank; which rank writes those of several ranks is decided afterwards."""
        self.slices = _by_id(self.state_dict)
        return super().create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Get the values of a slice of this rank."""
        return self.slices[_slice_id(index)].local()


class SliceLoadPlanner(DefaultLoadPlanner):
    """Plan `labelled` slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Set up as the base class does, for values that are not tensors themselves."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.slices = _by_id(state_dict)

    def create_local_plan(self) -> LoadPlan:
        """Plan what to read of which stored boxes for each slice."""
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
        """Get the buffer of a slice of this rank."""
        return self.slices[_slice_id(index)].local()
