"""The tensors of a Hugging Face directory in safetensors files, opened without being read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meshpeft.models.errors import ModelError

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "WeightFiles", "read_json"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; expected a Hugging Face model directory") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


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
        if (directory / WEIGHTS_NAME).exists():
            opened = self._open(directory / WEIGHTS_NAME)
            self._files = dict.fromkeys(opened.keys(), opened)
        elif (directory / INDEX_NAME).exists():
            self._open_indexed(read_json(directory / INDEX_NAME))
        else:
            raise ModelError(f"{directory} holds no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}")

    def _open_indexed(self, index: dict[str, Any]) -> None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{self.directory / INDEX_NAME} has no weight_map")
        opened = {name: self._open(self.directory / name) for name in sorted(set(weight_map.values()))}
        held = {name: set(file.keys()) for name, file in opened.items()}
        for tensor, name in weight_map.items():
            if tensor not in held[name]:
                raise ModelError(f"{self.directory / name} does not hold {tensor!r}, which the index promises")
            self._files[tensor] = opened[name]

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError as error:
            raise ModelError(f"{path} does not exist, but the index names it") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is truncated or not a safetensors file: {error}") from error

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
