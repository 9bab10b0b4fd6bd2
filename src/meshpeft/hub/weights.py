"""The tensors of a Hugging Face directory in safetensors files, opened without being read."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from meshpeft.hub.files import MODEL_DIRECTORY, check_readable, read_json
from meshpeft.models.errors import ModelError
from meshpeft.parallel.errors import blamed_on, shown

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "WeightFiles"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPARED = 1 << 22  # values
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


class WeightFiles:
    """Names, shapes and slices of the tensors of a directory; a context manager.

    Reads `model.safetensors`, or the files named by `model.safetensors.index.json`.

    Raises:
        ModelError: a file is missing or truncated; the message names it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        with self._stack as stack:  # closes what was opened before a later file failed
            if _is_there(directory / WEIGHTS_NAME):
                opened = self._open(directory / WEIGHTS_NAME, "")
                self._files = dict.fromkeys(opened.keys(), opened)
            elif _is_there(directory / INDEX_NAME):
                self._open_indexed(read_json(directory / INDEX_NAME))
            elif not directory.is_dir():
                raise ModelError(f"{directory} is not a directory; expected {MODEL_DIRECTORY}")
            else:
                raise ModelError(f"{directory} holds no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}")
            self._stack = stack.pop_all()

    def _open_indexed(self, index: dict[str, Any]) -> None:
        path = self.directory / INDEX_NAME
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{path} has no weight_map")
        for tensor, name in weight_map.items():
            # Links out of the directory are how caches are made; names that lead out of it are not.
            if (
                not isinstance(name, str)
                or not 0 < len(name) < 250
                or "\0" in name
                or ".." in name.split("/")
                or name[0] == "/"
            ):
                raise ModelError(f"{path} names {shown(name)} for {shown(tensor)}; expected a file of the directory")
        opened = {
            name: self._open(self.directory / name, "the file that the index names")
            for name in sorted({*weight_map.values()})
        }
        held = {name: set(file.keys()) for name, file in opened.items()}
        for tensor, name in weight_map.items():
            if tensor not in held[name]:
                raise ModelError(f"{self.directory / name} does not hold {shown(tensor)}, which the index promises")
            self._files[tensor] = opened[name]

    def _open(self, path: Path, why: str) -> Any:
        check_readable(path, ModelError, why)
        with blamed_on(f"{path} is truncated or not a safetensors file", ModelError):
            return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files = {}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def stored(self, name: str) -> Any:
        """A tensor that is not read yet, of safetensors: its shape and type, and slices by index."""
        return self._files[name].get_slice(name)

    def scalar(self, name: str) -> Tensor:
        """A tensor without dimensions, which has no slices."""
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def is_integer(self, name: str) -> bool:
        """Whether a tensor holds integers or truth values, as some buffers do."""
        return self._files[name].get_slice(name).get_dtype() in _INTEGERS

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the file's header.

        Raises:
            ModelError: it is not one that a decoder computes in.
        """
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ModelError(f"{name} is stored as {stored}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values. A block of rows at a time is read, up to the first difference."""
        first, second = self._files[name].get_slice(name), self._files[other].get_slice(other)
        shape = first.get_shape()
        if shape != second.get_shape() or first.get_dtype() != second.get_dtype():
            return False
        if not shape:
            return torch.equal(self._files[name].get_tensor(name), self._files[other].get_tensor(other))
        rows = max(1, _COMPARED // max(1, math.prod(shape[1:])))
        return all(
            torch.equal(first[start : start + rows], second[start : start + rows]) for start in range(0, shape[0], rows)
        )

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...], place: Tensor) -> Tensor:
        """Copy a box of a tensor into `place`, cast to its type; nothing else of the tensor is read.

        Args:
            name: of the tensor.
            offset, shape: of the box.
            place: of the box's shape.

        Returns:
            `place`.
        """
        box = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        # What safetensors returns is a view of the mapped file.
        return place.copy_(self._files[name].get_slice(name)[box])


def _is_there(path: Path) -> bool:
    """Whether something has this name, if only a link that leads nowhere, or a file that may not be read."""
    return os.path.lexists(path)
