"""`manifest.json`: what a checkpoint holds, in which files, with checksums.

It takes the place of the pickle that torch.distributed.checkpoint's own file format has: a checkpoint may come from
anywhere, and reading it must not run anything. The manifest carries its own SHA-256 and that of every other file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meshpeft.hub.tensor_files import CheckpointError, check_readable, read_text
from meshpeft.parallel.errors import blamed_on, shown

__all__ = ["MANIFEST", "Chunk", "FileRecord", "Manifest", "TensorRecord", "file_sha256"]

MANIFEST = "manifest.json"
"""The file that makes a directory a checkpoint."""

_FORMAT = "meshpeft checkpoint"
_VERSION = 1
_CHUNK_BYTES = 1 << 20
# 100,000 tensors in slices of 16 ranks, with their optimizer states, and the metrics of 100,000 steps.
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor, and the file and name of its values."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    name: str


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor: its type (`float32`), its shape, and the boxes that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint.

    Attributes:
        step: Optimizer steps that were done.
        full_model: The base model is part of it, not only the adapters.
        tensors: Tensors by checkpoint key.
        files: Files by name, in the checkpoint's directory.
        model: Identity of the model that the tensors belong to, see `identity`.
        optimizer: Options of the parameter groups; `None` without optimizer.
        random: States of the random generators.
        extra: The caller's own.
    """

    step: int
    full_model: bool
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Sequence[Mapping[str, Any]] | None = None
    random: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Encode the file."""
        content = json.dumps(_plain(self), allow_nan=False, separators=(",", ":"))
        checksum = hashlib.sha256(content.encode()).hexdigest()
        head = {"format": _FORMAT, "version": _VERSION, "sha256": checksum}
        return f"{json.dumps(head)}\n{content}\n".encode()

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint and check that it is consistent; no other file is opened.

        Raises:
            CheckpointError: The directory is no checkpoint, or the manifest is damaged.
        """
        path = directory / MANIFEST
        if not os.path.lexists(path):
            raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
        text = read_text(path, CheckpointError, most_bytes=_MOST_BYTES)
        with blamed_on(f"{path} is cut or damaged", CheckpointError):
            head_line, _, content = text.partition("\n")
            head = json.loads(head_line)
            found = hashlib.sha256(content.rstrip("\n").encode()).hexdigest()
            if head["format"] != _FORMAT:
                raise CheckpointError(f"{path} is of another format: {shown(head['format'])}")
            if head["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} has version {shown(head['version'])}; this program reads version {_VERSION}"
                )
            if head["sha256"] != found:
                raise CheckpointError(f"{path} is damaged: its content is not what was written (SHA-256)")
            return _parsed(json.loads(content))

    def check_tensors(self) -> None:
        """Check that the chunks of every tensor make it up, each once.

        Raises:
            CheckpointError: One is lost, or there twice.
        """
        for key, tensor in self.tensors.items():
            try:
                _check_chunks(key, tensor.shape, tensor.chunks, self.files)
            except ValueError as error:
                raise CheckpointError(
                    f"the ranks do not hold all of a tensor, each part of it once: {error}"
                ) from error

    def check_file(self, directory: Path, name: str, *, values: bool) -> None:
        """Check the size of a file, and with `values` its checksum; the file is read once.

        Raises:
            CheckpointError: It is missing, cut or damaged.
        """
        path, record = directory / name, self.files[name]
        try:
            size = check_readable(path, CheckpointError)
            if size != record.bytes:
                raise CheckpointError(f"{path} is cut: it has {size} bytes of {record.bytes}")
            if values and file_sha256(path) != record.sha256:
                raise CheckpointError(f"{path} is damaged: its content is not what was written (SHA-256)")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _plain(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "full_model": manifest.full_model,
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in manifest.files.items()},
        "tensors": {
            key: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "chunks": [[list(chunk.offset), list(chunk.shape), chunk.file, chunk.name] for chunk in tensor.chunks],
            }
            for key, tensor in manifest.tensors.items()
        },
        "model": manifest.model,
        "optimizer": manifest.optimizer,
        "random": manifest.random,
        "extra": manifest.extra,
    }


# What comes from a manifest goes into messages: no name and no shape of one is longer than a message has room for.
_LONGEST_NAME, _MOST_DIMS = 500, 16


def _parsed(content: Any) -> Manifest:
    files = {name: FileRecord(_size(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
    for name in files:
        if len(name) > _LONGEST_NAME or name != Path(name).name or name == MANIFEST:
            raise ValueError(f"{shown(name)} is not a file's name")
    tensors = {}
    for key, tensor in content["tensors"].items():
        shape, dtype = _shape(tensor["shape"]), tensor["dtype"]
        if len(key) > _LONGEST_NAME:
            raise ValueError(f"{shown(key)} is not a tensor's name: it has {len(key):,} characters")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{shown(dtype)} is not a type of tensors")
        chunks = tuple(Chunk(_shape(o), _shape(s), str(file), str(name)) for o, s, file, name in tensor["chunks"])
        _check_chunks(key, shape, chunks, files)
        tensors[key] = TensorRecord(dtype, shape, chunks)
    optimizer = content["optimizer"]
    if not (optimizer is None or isinstance(optimizer, list)):
        raise ValueError("the optimizer is not a list of groups")
    sections = {name: content[name] for name in ("model", "random", "extra")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{name} is not an object")
    return Manifest(
        _size(content["step"]), bool(content["full_model"]), tensors, files, optimizer=optimizer, **sections
    )


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{shown(value)} is not a size")
    return value


def _shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MOST_DIMS:
        raise ValueError(f"{shown(values)} is not a shape")
    return tuple(_size(value) for value in values)


def _check_chunks(key: str, shape: tuple[int, ...], chunks: tuple[Chunk, ...], files: Mapping[str, FileRecord]) -> None:
    """Check that the chunks are the cells of a regular grid, each once, and together all of the tensor."""
    for chunk in chunks:
        if chunk.file not in files:
            raise ValueError(f"{key} is in {shown(chunk.file)}, which is not a file of the checkpoint")
        if chunk.shape != chunks[0].shape or len(chunk.shape) != len(shape) or len(chunk.offset) != len(shape):
            raise ValueError(f"{key}: a part of shape {chunk.shape} in a tensor of shape {shape}")
        places = list(zip(chunk.offset, chunk.shape, shape, strict=True))
        if any(start + size > whole or (size and start % size) for start, size, whole in places):
            raise ValueError(f"{key}: a part is out of its place, at {chunk.offset}")
    if len({chunk.offset for chunk in chunks}) != len(chunks):
        raise ValueError(f"{key}: a part is there twice")
    held = sum(math.prod(chunk.shape) for chunk in chunks)
    if held != math.prod(shape):
        raise ValueError(f"{key}: {held} of {math.prod(shape)} values are there")
