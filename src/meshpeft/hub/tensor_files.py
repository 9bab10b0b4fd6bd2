"""Files of directories that people fetch, and the tensors in them: the one reader and the one writer of safetensors.

A safetensors file is eight bytes of header length, a JSON header, and the values one after the other. It is written
tensor by tensor and read slice by slice, so that no process holds all of it. Nothing is ever unpickled. A file is
opened only if it is one (a pipe would block, a device be endless), and read as text only up to a size that such files
have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

from meshpeft.models import ModelError
from meshpeft.parallel.errors import MeshPEFTError, blamed_on, first_few, reason_of, shown
from meshpeft.parallel.finite import finite_flag
from meshpeft.parallel.mesh import on_each_rank

__all__ = [
    "INDEX_NAME",
    "MODEL_DIRECTORY",
    "MODEL_WEIGHTS_NAME",
    "CheckpointError",
    "Declared",
    "TensorFileWriter",
    "TensorFiles",
    "check_readable",
    "files_to_copy",
    "read_json",
    "read_text",
]

MODEL_WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODEL_DIRECTORY = "a Hugging Face model directory (nothing is downloaded)"
MOST_BYTES = 32 << 20
"""Size limit of a JSON file: a weights index of 200,000 tensors has 20 MB, and parsing takes up to 25 times as much."""

_MOST_COPIED_BYTES = 1 << 30
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# In the order in which safetensors' own writer puts tensors into a file, the last first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}
_FLOATING = ("F64", "F32", "F16", "BF16")
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_CHECKSUM = "sha256"
_CHUNK_BYTES = 1 << 20
_COMPARED = 1 << 22  # values


class CheckpointError(MeshPEFTError):
    """A checkpoint or an adapter's file that cannot be written, or is not what the model needs.

    Names the first thing that is wrong; the model and the files are as they were.
    """


@contextmanager
def _open_file(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> Iterator[BinaryIO]:
    """Open a regular file for reading, through links; what is no file is refused before it can block or be endless.

    Args:
        path: Path of the file.
        error_type: Error that is raised.
        expected: What the directory should be, for the message where there is no such file.

    Raises:
        MeshPEFTError: There is no such file, it is a directory, a pipe or a device, or it may not be read.
    """
    hint = f"; expected {expected}" if expected else ""
    try:
        # A pipe without a writer would block until one comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = path if path.parent.is_dir() else path.parent
        what = "is not a directory" if missing.exists() else "does not exist"
        raise error_type(f"{missing} {what}{hint}") from error
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read: {reason_of(error)}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error_type(f"{path} is {_KINDS.get(kind, 'no file')}; expected a file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def check_readable(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> int:
    """Check that a path is a file that may be read, and return its size in bytes; for packages with unclear messages.

    Raises:
        MeshPEFTError: There is no such file, or it may not be read.
    """
    with _open_file(path, error_type, expected) as file:
        return os.fstat(file.fileno()).st_size


def read_text(
    path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "", most_bytes: int = MOST_BYTES
) -> str:
    """Read a UTF-8 file of a bounded size.

    Raises:
        MeshPEFTError: It is larger, not UTF-8, or cannot be opened.
    """
    with _open_file(path, error_type, expected) as file, blamed_on(f"{path} cannot be read", error_type):
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise error_type(f"{path} is larger than {most_bytes >> 20} MiB, which no such file is")
        return content.decode("utf-8")


def read_json(path: Path, error_type: type[MeshPEFTError] = ModelError, expected: str = "") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: Path of the file.
        error_type: Error that is raised.
        expected: What its directory should be, for the message where there is no such file.

    Raises:
        MeshPEFTError: There is no such file, or it holds something else.
    """
    text = read_text(path, error_type, expected)
    with blamed_on(f"{path} cannot be read as JSON", error_type):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise error_type(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def files_to_copy(directory: Path, names: Sequence[str]) -> list[Path]:
    """Find the named files in a directory, which are copied next to what was made from it.

    Weights are read through any link. What is copied may be given to others: a link to it may lead within the
    directory, or, from a snapshot in a Hugging Face cache, within that repository's part of the cache (`../../blobs`).

    Raises:
        ModelError: A file may not be read, is none, or is a link that leads elsewhere.
    """
    home = directory.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    found = [directory / name for name in names if os.path.lexists(directory / name)]
    for path in found:
        if not path.resolve().is_relative_to(home):
            raise ModelError(
                f"{path} is a link to {path.resolve()}, outside of {home}, and would be copied; put the file there"
            )
        if check_readable(path) > _MOST_COPIED_BYTES:
            raise ModelError(f"{path} is larger than {_MOST_COPIED_BYTES >> 30} GiB, which no such file is")
    return found


class Declared(NamedTuple):
    """What a file holds, or will hold, under one name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFileWriter:
    """Write the tensors of a file one by one, in the order in which they were declared.

    Args:
        path: The file, which is made, or replaced.
        declared: Names, types and shapes of all tensors.
        checksum: Put the SHA-256 of the values into the header, which other readers ignore. Not with `as_safetensors`.
        metadata: More entries of the header.
        as_safetensors: Lay the file out as safetensors' own writer does (by type, then name) and not as declared.
        error_type: Error that is raised.

    Raises:
        MeshPEFTError: A type that the format does not have; two tensors of one name.
    """

    def __init__(
        self,
        path: Path,
        declared: Sequence[Declared],
        *,
        checksum: bool = True,
        metadata: Mapping[str, str] | None = None,
        as_safetensors: bool = False,
        error_type: type[MeshPEFTError] = CheckpointError,
    ) -> None:
        self._error_type = error_type
        self._expected = list(declared)
        for name, dtype, _ in self._expected:
            if dtype not in _NAMES:
                raise error_type(f"{name} has type {dtype}, which safetensors files do not hold")
        twice = [name for name, count in Counter(tensor.name for tensor in self._expected).items() if count > 1]
        if twice:
            raise error_type(f"{path.name} would hold {first_few(twice)} twice; names in a file are unique")
        self._in_file = self._expected
        if as_safetensors:
            self._in_file = sorted(self._expected, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
        self._offsets: dict[str, int] = {}
        self._metadata = dict(metadata or {})
        self._written = 0
        self._digest = hashlib.sha256() if checksum else None
        header = self._header()
        self._file = open(path, "wb")  # noqa: SIM115  # open over several calls
        self._file.write(header)
        self._start = len(header)

    def _header(self) -> bytes:
        # Its length stays the same while the checksum grows into its final value.
        checksum = {} if self._digest is None else {_CHECKSUM: self._digest.hexdigest()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self._metadata, **checksum}}
        offset = 0
        for name, dtype, shape in self._in_file:
            self._offsets[name] = offset
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Values start at a multiple of 8, so that a mapped file can be read in place.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, which may be on any device.

        Raises:
            MeshPEFTError: It is not what was declared, or holds values that are not finite.
        """
        name, dtype, shape = self._expected[self._written]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise self._error_type(f"{name}: declared as {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if not finite_flag(tensor):
            raise self._error_type(f"{name}: its values are not finite (NaN or infinity)")
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if self._digest is not None:
            self._digest.update(values)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(values)
        self._written += 1

    def close(self) -> None:
        """Complete the file, and wait until the disk has it.

        Raises:
            MeshPEFTError: A declared tensor was not written.
        """
        if self._written != len(self._expected):
            raise self._error_type(f"{self._expected[self._written].name} was declared but not written")
        with self._file:
            self._file.seek(0)
            self._file.write(self._header())
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close the file as it is, if it is not closed yet."""
        with suppress(OSError):  # on a full disk what is still to be written fails once more
            self._file.close()


class TensorFiles:
    """Names, types, shapes and slices of the tensors in one or several safetensors files; a context manager.

    Args:
        paths: The files.
        path: The file or directory that messages name.
        error_type: Error that is raised.
        index: Name of each tensor -> its file, where not everything in the files counts.

    Raises:
        MeshPEFTError: A file is missing, cut, or not a safetensors file, or lacks a tensor that the index names.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        path: Path | None = None,
        error_type: type[MeshPEFTError] = CheckpointError,
        index: Mapping[str, Path] | None = None,
    ) -> None:
        self.path, self._error_type = path or paths[0], error_type
        with ExitStack() as stack:  # closes what was opened before a later file failed
            opened: dict[Path, Any] = {}
            for each in paths:
                check_readable(each, error_type, "the file that the index names" if index else "")
                with blamed_on(f"{each} is truncated or not a safetensors file", error_type):
                    opened[each] = stack.enter_context(safe_open(each, framework="pt", device="cpu"))
            held = {each: frozenset(file.keys()) for each, file in opened.items()}
            for name, each in (index or {}).items():
                if name not in held[each]:
                    raise error_type(f"{each} does not hold {shown(name)}, which the index promises")
            if index is None:
                index = {name: each for each, names in held.items() for name in names}
            self._files = {name: opened[each] for name, each in index.items()}
            self._metadata: dict[str, str] = (opened[paths[0]].metadata() or {}) if paths else {}
            self._names = frozenset(self._files)
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files = {}

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors names it, from the file's header: `BF16`."""
        found: str = self._files[name].get_slice(name).get_dtype()
        return found

    def dtype(self, name: str, *, floating: bool = False) -> torch.dtype:
        """Type of a tensor, from the file's header.

        Args:
            name: Name of the tensor.
            floating: Refuse integers, which would be codes whose meaning is not known here.

        Raises:
            MeshPEFTError: Tensors here do not have this type.
        """
        stored, known = self.stored_type(name), _FLOATING if floating else tuple(_DTYPES)
        if stored not in known:
            raise self._error_type(f"{self.path}: {name} is stored as {stored}; expected one of {', '.join(known)}")
        return _DTYPES[stored]

    def is_integer(self, name: str) -> bool:
        """Whether a tensor holds integers or truth values, as some buffers do."""
        return self.stored_type(name) in _INTEGERS

    @property
    def metadata(self) -> Mapping[str, str]:
        """Entries of the header of a single file that was written here; empty for a file without a checksum.

        What other programs write has none: its values may not be those that the entries describe.
        """
        return self._metadata if _CHECKSUM in self._metadata else {}

    def check_values(self) -> None:
        """Compare the values of a single file with its checksum, if it has one; reads all of it once.

        Raises:
            MeshPEFTError: They differ.
        """
        expected = self.metadata.get(_CHECKSUM)
        if expected is None:
            return
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise self._error_type(f"{self.path} is damaged: its values are not those that were written (SHA-256)")

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values. A block of rows at a time is read, up to the first difference."""
        shape = self.shape(name)
        if shape != self.shape(other) or self.stored_type(name) != self.stored_type(other):
            return False
        rows = max(1, _COMPARED // max(1, math.prod(shape[1:])))
        boxes = [(slice(start, start + rows),) for start in range(0, shape[0], rows)] if shape else [()]
        return all(torch.equal(self.view(name, box), self.view(other, box)) for box in boxes)

    def view(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """View a box of a tensor, or all of it, in the mapped file; nothing else is read, when the values are."""
        found: Tensor = self._files[name].get_slice(name)[box] if box else self._files[name].get_tensor(name)
        return found

    def read(self, name: str) -> Tensor:
        """Read all of a tensor; a plain one also under simulation."""
        with maybe_disable_local_tensor_mode():
            stored = self.view(name)  # of the mapped file: the copy lets the file go
            return torch.empty_like(stored, memory_format=torch.contiguous_format).copy_(stored)

    def read_into(self, place: Tensor, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Copy a box of a tensor into `place`, which has the box's shape and any type; nothing else is read.

        Under simulation it is called for each rank (`on_each_rank`).
        """
        box = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        return place.copy_(self.view(name, box))

    def read_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Read a box of a tensor; nothing else is read. Offsets may be symbolic."""
        return _read_box(self, name, list(offset), list(shape), self.dtype(name))


@on_each_rank
def _read_box(files: TensorFiles, name: str, offset: list[int], shape: list[int], dtype: torch.dtype) -> Tensor:
    return files.read_into(torch.empty(shape, dtype=dtype, device="cpu"), name, offset, shape)
