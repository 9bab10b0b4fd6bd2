"""The weights in a model's directory, also those published in few bits: read as the numbers that codes stand for.

| format | named | the tensors of a matrix | a number |
|---|---|---|---|
| FP8 in blocks | `fp8` (DeepSeek, Qwen) | `weight` E4M3; `weight_scale_inv`, of a block | code * scale |
| MXFP4 | `mxfp4` (gpt-oss's experts) | `_blocks` of 32 codes; `_scales` | code * 2^(scale - 127) |
| NVFP4 | `modelopt` | `weight`; `weight_scale` E4M3, of 16 codes; `weight_scale_2` | code * (scale * scale 2) |
| FP8 | `modelopt` | `weight` E4M3; `weight_scale` | code * scale |

The product is computed in float32 and rounded to bfloat16, as each format's own decoding does. A box of a matrix is
read and decoded alone, so that a process reads its slices. Everything behind this file sees an ordinary checkpoint in
bfloat16, which `--quantize` may pack again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from meshpeft.hub.tensor_files import (
    INDEX_NAME,
    MODEL_DIRECTORY,
    MODEL_WEIGHTS_NAME,
    TensorFiles,
    read_json,
)
from meshpeft.models import ModelError
from meshpeft.parallel.errors import shown

__all__ = ["coding_of", "model_files", "quantization_of"]

_FORMATS = "fp8, mxfp4, and modelopt's FP8 and NVFP4"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Scales of activations and of the key-value cache, which training does not have.
_OF_ACTIVATIONS = ("input_scale", "k_scale", "v_scale", "activation_scale")


@dataclass(frozen=True)
class _Matrix:
    """A parameter that codes stand for.

    Attributes:
        shape: Its shape.
        parts: Names of the tensors that hold it.
        decode: Makes the float32 values of a box from its first and last indices along each dim.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[[Sequence[tuple[int, int]]], Tensor]


_Find: TypeAlias = "Callable[[_CodedFiles], dict[str, _Matrix]]"


class _CodedFiles(TensorFiles):
    """Files some of whose tensors are codes and scales.

    Args:
        paths, path, index: See `TensorFiles`.
        find: Finds what is coded, by name.
    """

    def __init__(self, paths: Sequence[Path], path: Path, find: _Find, index: Mapping[str, Path] | None) -> None:
        super().__init__(paths, path, ModelError, index)
        self._coded: dict[str, _Matrix] = {}
        try:
            self._coded = find(self)
        except BaseException:
            self._stack.close()
            raise
        hidden = {part for matrix in self._coded.values() for part in matrix.parts}
        hidden |= {name for name in self._names if name.rpartition(".")[2] in _OF_ACTIVATIONS}
        self._names = self._names - hidden | self._coded.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._coded[name].shape if name in self._coded else super().shape(name)

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors names it; what is coded is read in bfloat16."""
        return "BF16" if name in self._coded else super().stored_type(name)

    def view(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """View a box of a tensor, or all of it; what is coded is decoded."""
        matrix = self._coded.get(name)
        if matrix is None:
            return super().view(name, box)
        sides = (*box, *(slice(None) for _ in matrix.shape[len(box) :]))
        within = [side.indices(size)[:2] for side, size in zip(sides, matrix.shape, strict=True)]
        return matrix.decode(within).to(torch.bfloat16)

    def codes(self, name: str, *box: tuple[int, int]) -> Tensor:
        """Read a box of a tensor of codes or scales as it is, of floating types in float32."""
        found = super().view(name, tuple(slice(*side) for side in box))
        return found.float() if found.is_floating_point() else found

    def plain_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of codes or scales.

        Raises:
            ModelError: There is no such tensor.
        """
        if name not in self._files:
            raise ModelError(f"{self.path} lacks {name}, the scales of the codes beside it")
        return super().shape(name)

    def check(self, name: str, types: Sequence[str], shape: tuple[int, ...]) -> None:
        """Check the type and shape of a tensor of codes or scales.

        Raises:
            ModelError: They are others.
        """
        held = self.plain_shape(name)
        if TensorFiles.stored_type(self, name) not in types or held != shape:
            raise ModelError(
                f"{self.path}: {name} is {TensorFiles.stored_type(self, name)} {held}; expected {' or '.join(types)} "
                f"{shape}"
            )


_FLOATS = ("F32", "BF16", "F16")


def _fp8_in_blocks(block: tuple[int, int]) -> _Find:
    def find(files: _CodedFiles) -> dict[str, _Matrix]:
        found = {}
        for scales in sorted(files.names()):
            name, is_scale, rest = scales.rpartition("_scale_inv")
            if is_scale and not rest:
                found[name] = _in_blocks(files, name, scales, block)
        return found

    return find


def _in_blocks(files: _CodedFiles, name: str, scales: str, block: tuple[int, int]) -> _Matrix:
    """Describe a matrix of E4M3 with a scale for each block, the last of which may be cut."""
    shape = files.plain_shape(name)
    if len(shape) != 2:
        raise ModelError(f"{files.path}: {name} has shape {shape}; expected a matrix, which has {scales}")
    files.check(name, ("F8_E4M3",), shape)
    files.check(scales, _FLOATS, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))

    def decode(within: Sequence[tuple[int, int]]) -> Tensor:
        codes = files.codes(name, *within)
        grid = [(first // size, -(-last // size)) for (first, last), size in zip(within, block, strict=True)]
        factors = files.codes(scales, *grid)
        for dim, ((first, last), size) in enumerate(zip(within, block, strict=True)):
            own = torch.arange(first, last).div(size, rounding_mode="floor") - first // size
            factors = factors.index_select(dim, own)
        return codes * factors

    return _Matrix(shape, (name, scales), decode)


def _mxfp4(files: _CodedFiles) -> dict[str, _Matrix]:
    found = {}
    for blocks in sorted(files.names()):
        name, is_blocks, rest = blocks.rpartition("_blocks")
        if is_blocks and not rest:
            found[name] = _in_mxfp4(files, name)
    return found


def _in_mxfp4(files: _CodedFiles, name: str) -> _Matrix:
    """Describe a stack of matrices, [experts, in, out], whose codes are [experts, out, in / 32, 16]."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    held = files.plain_shape(blocks)
    if len(held) != 4 or held[3] != 16:
        raise ModelError(f"{files.path}: {blocks} has shape {held}; expected [experts, out, in / 32, 16]")
    files.check(blocks, ("U8",), held)
    files.check(scales, ("U8",), held[:3])

    def decode(within: Sequence[tuple[int, int]]) -> Tensor:
        experts, (first, last), rows = within
        grid = (first // 32, -(-last // 32))
        values = _from_e2m1(files.codes(blocks, experts, rows, grid))
        # Exact: three bits of a number, and a power of two.
        values = torch.ldexp(values, files.codes(scales, experts, rows, grid).int()[..., None] - 127)
        start = grid[0] * 32
        return values.flatten(-2)[..., first - start : last - start].transpose(-2, -1)

    return _Matrix((held[0], held[2] * 32, held[1]), (blocks, scales), decode)


def _modelopt(files: _CodedFiles) -> dict[str, _Matrix]:
    found = {}
    for scales in sorted(files.names()):
        name, is_scale, rest = scales.rpartition("_scale")
        if not is_scale or rest or name.rpartition(".")[2] != "weight":
            continue
        shape = files.plain_shape(scales)
        found[name] = _in_nvfp4(files, name, shape) if len(shape) == 2 else _in_fp8(files, name, shape)
    return found


def _in_nvfp4(files: _CodedFiles, name: str, of_scales: tuple[int, ...]) -> _Matrix:
    """Describe a matrix of two codes a byte, with a scale for 16 of a row, and one for all."""
    scales, second = f"{name}_scale", f"{name}_scale_2"
    rows, columns = of_scales[0], of_scales[1] * 16
    files.check(name, ("U8",), (rows, columns // 2))
    files.check(scales, ("F8_E4M3",), of_scales)
    files.check(second, ("F32",), files.plain_shape(second))

    def decode(within: Sequence[tuple[int, int]]) -> Tensor:
        own, (first, last) = within
        start, grid = first // 16 * 16, (first // 16, -(-last // 16))
        values = _from_e2m1(files.codes(name, own, (grid[0] * 8, grid[1] * 8))).unflatten(-1, (-1, 16))
        factors = files.codes(scales, own, grid) * files.codes(second)
        return (values * factors[..., None]).flatten(-2)[:, first - start : last - start]

    return _Matrix((rows, columns), (name, scales, second), decode)


def _in_fp8(files: _CodedFiles, name: str, of_scale: tuple[int, ...]) -> _Matrix:
    """Describe a matrix of E4M3 with a scale for all, or for each row."""
    scales, shape = f"{name}_scale", files.plain_shape(name)
    files.check(name, ("F8_E4M3",), shape)
    if of_scale not in ((), (1,), shape[:1]):
        raise ModelError(f"{files.path}: {scales} has shape {of_scale}; expected one scale, or one for each row")

    def decode(within: Sequence[tuple[int, int]]) -> Tensor:
        factors = files.codes(scales, *within[:1]) if of_scale == shape[:1] else files.codes(scales)
        return files.codes(name, *within) * (factors[:, None] if of_scale == shape[:1] else factors)

    return _Matrix(shape, (name, scales), decode)


def _from_e2m1(codes: Tensor) -> Tensor:
    """Decode two numbers a byte, the lower four bits first: [.., n] -> float32 [.., 2 n]."""
    pairs = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    return torch.tensor(_E2M1).index_select(0, pairs.flatten().int()).view(pairs.shape)


def quantization_of(directory: Path) -> Any:
    """Read what a model's directory says of the codes in its weights; `None` where there are none.

    Raises:
        ModelError: It cannot be read.
    """
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        if os.path.lexists(directory / name):
            found = read_json(directory / name).get(key)
            if found:
                return found
    return None


def coding_of(stated: Any) -> _Find | None:
    """Choose how weights are decoded.

    Args:
        stated: What a model's directory says of it (`quantization_of`).

    Raises:
        ModelError: It is not known how.
    """
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        stated = {"quant_method": stated}
    algorithm = stated.get("quant_algo")
    method = stated.get("quant_method", "modelopt" if algorithm else None)
    if method == "fp8" and "weight_block_size" in stated:
        block = stated["weight_block_size"]
        if (
            isinstance(block, list)
            and len(block) == 2
            and all(type(size) is int and 0 < size < 2**20 for size in block)
        ):
            return _fp8_in_blocks((block[0], block[1]))
        raise ModelError(f"weight_block_size={shown(block)}: expected two sizes, such as [128, 128]")
    if method == "mxfp4":
        return _mxfp4
    if method == "modelopt" and algorithm in ("NVFP4", "FP8"):
        return _modelopt
    named = shown(method) if algorithm is None else f"{shown(method)}, {shown(algorithm)}"
    raise ModelError(
        f"the weights are quantised already, by {named}; known are {_FORMATS}. Give the model in full, and --quantize"
    )


def model_files(directory: Path) -> TensorFiles:
    """Open `model.safetensors` of a Hugging Face directory, or the files that `model.safetensors.index.json` names.

    Codes of few bits are read as numbers, by the format that the directory's configuration names.

    Raises:
        ModelError: A file is missing or truncated; the message names it. Or the format is not known.
    """
    find = coding_of(quantization_of(directory))
    # A link that leads nowhere, or a file that may not be read, is there: it is named as what is wrong.
    if os.path.lexists(directory / MODEL_WEIGHTS_NAME):
        return _opened([directory / MODEL_WEIGHTS_NAME], directory, find)
    path = directory / INDEX_NAME
    if not os.path.lexists(path):
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory; expected {MODEL_DIRECTORY}")
        raise ModelError(f"{directory} holds no weights: expected {MODEL_WEIGHTS_NAME} or {INDEX_NAME}")
    weight_map = read_json(path).get("weight_map")
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
    index = {tensor: directory / name for tensor, name in weight_map.items()}
    return _opened(sorted({*index.values()}), directory, find, index)


def _opened(
    paths: Sequence[Path], directory: Path, find: _Find | None, index: Mapping[str, Path] | None = None
) -> TensorFiles:
    if find is None:
        return TensorFiles(paths, directory, ModelError, index)
    return _CodedFiles(paths, directory, find, index)
