"""safetensors files written tensor by tensor and read slice by slice, so that no process holds a whole one.

The format is eight bytes of header length, a JSON header, and the values one after the other. Files written here
carry the SHA-256 of the values in the header's metadata, which other readers ignore.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.files import check_readable
from meshpeft.parallel.errors import blamed_on, shown
from meshpeft.parallel.finite import finite_flag
from meshpeft.parallel.mesh import on_each_rank

__all__ = ["Declared", "TensorFileReader", "TensorFileWriter"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHECKSUM = "sha256"
_CHUNK_BYTES = 1 << 20


class Declared(NamedTuple):
    """What a file will hold under one name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFileWriter:
    """Writes the tensors of a file in the order in which they were declared.

    Args:
        path: of the file, which is made, or replaced.
        declared: names, types and shapes of all tensors.
        checksum: put the SHA-256 of the values into the header.
        metadata: more entries of the header, which other readers ignore.

    Raises:
        CheckpointError: a type that the format does not have.
    """

    def __init__(
        self,
        path: Path,
        declared: Sequence[Declared],
        *,
        checksum: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._expected = list(declared)
        self._metadata = dict(metadata or {})
        self._written = 0
        self._digest = hashlib.sha256() if checksum else None
        header = self._header()
        self._file = open(path, "wb")  # noqa: SIM115  # open over several calls
        self._file.write(header)

    def _header(self) -> bytes:
        # Its length stays the same while the checksum grows into its final value.
        checksum = {} if self._digest is None else {_CHECKSUM: self._digest.hexdigest()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self._metadata, **checksum}}
        offset = 0
        for name, dtype, shape in self._expected:
            if dtype not in _NAMES:
                raise CheckpointError(f"{name} has type {dtype}, which safetensors files do not hold")
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Values start at a multiple of 8, so that a mapped file can be read in place.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, tensor: Tensor) -> None:
        """The next tensor, on any device.

        Raises:
            CheckpointError: it is not what was declared, or holds values that are not finite.
        """
        name, dtype, shape = self._expected[self._written]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: declared as {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if not finite_flag(tensor):
            raise CheckpointError(f"{name}: its values are not finite (NaN or infinity)")
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if self._digest is not None:
            self._digest.update(values)
        self._file.write(values)
        self._written += 1

    def close(self) -> None:
        """Complete the file, and wait until the disk has it.

        Raises:
            CheckpointError: a declared tensor was not written.
        """
        if self._written != len(self._expected):
            raise CheckpointError(f"{self._expected[self._written].name} was declared but not written")
        with self._file:
            self._file.seek(0)
            self._file.write(self._header())
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Let the file go as it is, if it is not closed yet."""
        with suppress(OSError):  # on a full disk what is still to be written fails once more
            self._file.close()


class TensorFileReader:
    """Names, types, shapes and slices of a file's tensors; a context manager. Never unpickles anything.

    Raises:
        CheckpointError: there is no such file, it is cut or not a safetensors file, or holds a type that tensors
            here do not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        check_readable(path, CheckpointError)
        with self._stack as stack, blamed_on(f"{path} is cut or not a safetensors file", CheckpointError):
            self._opened: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            self.tensors: Mapping[str, Declared] = {name: self._declared(name) for name in list(self._opened.keys())}
            self._stack = stack.pop_all()

    def _declared(self, name: str) -> Declared:
        stored = self._opened.get_slice(name)
        if stored.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {shown(name)} is stored as {stored.get_dtype()}; expected one of {', '.join(_DTYPES)}"
            )
        return Declared(name, _DTYPES[stored.get_dtype()], tuple(stored.get_shape()))

    def __enter__(self) -> TensorFileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The entries of the header of a file that was written here; empty for a file without a checksum.

        What other programs write has none: its values may not be those that the entries speak of.
        """
        found = self._opened.metadata() or {}
        return found if _CHECKSUM in found else {}

    def check_values(self) -> None:
        """Compare the values with the checksum, if the file has one; reads all of it once.

        Raises:
            CheckpointError: they differ.
        """
        expected = (self._opened.metadata() or {}).get(_CHECKSUM)
        if expected is None:
            return
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise CheckpointError(f"{self.path} is damaged: its values are not those that were written (SHA-256)")

    def read(self, name: str) -> Tensor:
        """All of a tensor: a plain one also under simulation."""
        with maybe_disable_local_tensor_mode():
            return _copied(self._opened, name, None)

    def read_box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box of a tensor; nothing else is read. Offsets may be symbolic."""
        return _read_box(self._opened, name, list(offset), list(shape))

    def read_stack(self, names: Sequence[str], offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box [matrices, ..] of the stack of these tensors, of which only those in the box are read."""
        return _read_stack(self._opened, list(names), list(offset), list(shape))


@on_each_rank
def _read_box(opened: Any, name: str, offset: list[int], shape: list[int]) -> Tensor:
    return _copied(
        opened, name, tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
    )


@on_each_rank
def _read_stack(opened: Any, names: list[str], offset: list[int], shape: list[int]) -> Tensor:
    box = tuple(slice(start, start + length) for start, length in zip(offset[1:], shape[1:], strict=True))
    return torch.stack([_copied(opened, names[offset[0] + index], box) for index in range(shape[0])])


def _copied(opened: Any, name: str, box: tuple[slice, ...] | None) -> Tensor:
    stored = opened.get_tensor(name) if not box else opened.get_slice(name)[box]
    # What safetensors returns is a view of the mapped file: the copy lets the file go.
    return torch.empty_like(stored, memory_format=torch.contiguous_format).copy_(stored)
