"""Packed formats, which store a weight in few bits: those of bitsandbytes and torchao, in blocks along the input.

Each block of `block_size` consecutive values of a row has a float32 scale of its own, and nothing is shared between
blocks. A shard that cuts no block in two therefore holds exactly a slice of the full packed weight; for others see
`blocks`. (Formats with a scale, or a mean of scales, over the full tensor do not have
this property: a shard quantised alone differs from a slice of the full weight.)

| format | bytes a value, blocks of 64 | from |
|---|---|---|
| `nf4` | 0.5625: 16 levels for normally distributed values (Dettmers et al. 2023, QLoRA) | bitsandbytes |
| `int4` | 0.5625: integers -8 to 7 | torchao |
| `int8` | 1.0625: integers -127 to 127 | torchao |
| `fp8` | 1.0625: float8 e4m3 | torchao |

NF4 comes from bitsandbytes because torchao's has a mean over the full tensor's scales; the others from torchao
because bitsandbytes has no integer of four bits.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from meshpeft.quantization.errors import QuantizationError

__all__ = ["BLOCK_SIZES", "FORMATS", "FormatName", "Packed", "WeightFormat", "weight_format"]

FormatName = Literal["nf4", "int8", "int4", "fp8"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Packed(NamedTuple):
    """A packed weight: `codes` uint8 [.., in * bits / 8] and `scales` float32 [.., in / block_size]."""

    codes: Tensor
    scales: Tensor


class WeightFormat(ABC):
    """Format in which a weight is stored."""

    name: ClassVar[FormatName]
    bits: ClassVar[int]

    @abstractmethod
    def pack(self, weight: Tensor, block_size: int) -> Packed:
        """Store a weight.

        Args:
            weight: [.., in], float32, contiguous.
            block_size: Values that share a scale; divides `in`.
        """

    @abstractmethod
    def unpack(self, packed: Packed, block_size: int, dtype: torch.dtype) -> Tensor:
        """Return the weight [.., in] in float32, float16 or bfloat16, rounded once from float32."""

    def columns(self, codes: Tensor) -> int:
        """Return the number of values in a row of codes."""
        return codes.shape[-1] * 8 // self.bits


class _NF4(WeightFormat):
    name, bits = "nf4", 4

    def pack(self, weight: Tensor, block_size: int) -> Packed:
        # Nested (compressed) statistics would share an offset over the full tensor.
        codes, state = _bitsandbytes().quantize_4bit(
            weight, blocksize=block_size, quant_type="nf4", compress_statistics=False
        )
        *rows, columns = weight.shape
        return Packed(codes.view(*rows, columns // 2), state.absmax.view(*rows, columns // block_size))

    def unpack(self, packed: Packed, block_size: int, dtype: torch.dtype) -> Tensor:
        functional = _bitsandbytes()
        shape = torch.Size((*packed.codes.shape[:-1], self.columns(packed.codes)))
        state = functional.QuantState(
            absmax=packed.scales.reshape(-1), shape=shape, dtype=dtype, blocksize=block_size, quant_type="nf4"
        )
        unpacked: Tensor = functional.dequantize_4bit(packed.codes.reshape(-1, 1), state)
        return unpacked.view(shape)


class _Integer(WeightFormat):
    """Integers around zero; `lowest` to `highest` of the stored ones."""

    lowest: ClassVar[int]
    highest: ClassVar[int]

    def pack(self, weight: Tensor, block_size: int) -> Packed:
        torchao = _torchao()
        block = (*(1,) * (weight.dim() - 1), block_size)
        limits = (torch.int8, self.lowest, self.highest)
        scales, zeros = torchao.choose_qparams_affine(
            weight,
            torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR,
            block,
            *limits,
            scale_dtype=torch.float32,
            keepdim=True,
        )
        codes = torchao.quantize_affine(weight, block, scales, zeros, *limits)
        return Packed(self._to_bytes(codes), scales)

    def unpack(self, packed: Packed, block_size: int, dtype: torch.dtype) -> Tensor:
        values = self._from_bytes(packed.codes)
        block = (*(1,) * (values.dim() - 1), block_size)
        limits = (torch.int8, self.lowest, self.highest)
        unpacked: Tensor = _torchao().dequantize_affine(
            values, block, packed.scales, None, *limits, output_dtype=torch.float32
        )
        return unpacked.to(dtype)

    def _to_bytes(self, values: Tensor) -> Tensor:
        return values.view(torch.uint8)

    def _from_bytes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8)


class _Int8(_Integer):
    name, bits = "int8", 8
    lowest, highest = -127, 127


class _Int4(_Integer):
    name, bits = "int4", 4
    lowest, highest = -8, 7

    def _to_bytes(self, values: Tensor) -> Tensor:
        # The first of two values in the upper half, as in the 4-bit formats of both libraries.
        shifted = (values - self.lowest).to(torch.uint8)
        return shifted[..., ::2] << 4 | shifted[..., 1::2]

    def _from_bytes(self, codes: Tensor) -> Tensor:
        pairs = torch.stack((codes >> 4, codes & 0xF), -1).flatten(-2)
        return pairs.view(torch.int8) + self.lowest


class _Float8(WeightFormat):
    name, bits = "fp8", 8

    # Keeps the scale of a block of zeros from being zero, which would make them NaN.
    _SMALLEST: ClassVar[float] = 1e-12

    def pack(self, weight: Tensor, block_size: int) -> Packed:
        torchao = _torchao()
        packed = torchao.Float8Tensor.from_hp(
            weight,
            torch.float8_e4m3fn,
            granularity=torchao.PerBlock([1] * (weight.dim() - 1) + [block_size]),
            hp_value_lb=self._SMALLEST,
        )
        return Packed(packed.qdata.view(torch.uint8), packed.scale)

    def unpack(self, packed: Packed, block_size: int, dtype: torch.dtype) -> Tensor:
        codes = packed.codes.view(torch.float8_e4m3fn)
        block = [1] * (codes.dim() - 1) + [block_size]
        unpacked: Tensor = _torchao().Float8Tensor(codes, packed.scales, block_size=block, dtype=dtype).dequantize()
        return unpacked


FORMATS: dict[str, WeightFormat] = {each.name: each for each in (_NF4(), _Int8(), _Int4(), _Float8())}
assert set(FORMATS) == set(get_args(FormatName))


def weight_format(name: str, block_size: int) -> WeightFormat:
    """Return the format of this name.

    Raises:
        QuantizationError: There is none, or its blocks cannot have this size.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise QuantizationError(f"format={name!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise QuantizationError(f"block_size={block_size!r}: expected one of {', '.join(map(str, BLOCK_SIZES))}")
    return FORMATS[name]


def _bitsandbytes() -> Any:
    return _library("bitsandbytes.functional", "bitsandbytes")


def _torchao() -> Any:
    return _library("torchao.quantization", "torchao")


def _library(module: str, package: str) -> Any:
    try:
        with _without_warnings():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise QuantizationError(
            f"this format needs {package}, which is not installed: pip install 'meshpeft[quantization]'"
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what both libraries log on import about kernels of other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
