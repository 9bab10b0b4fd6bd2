"""Packed formats: bytes, errors, and blocks that know nothing of each other."""

from __future__ import annotations

import importlib

import pytest
import torch

from meshpeft.quantization import QuantizationError
from meshpeft.quantization.formats import FORMATS, weight_format

# Bytes a value with blocks of 64; relative error of normally distributed values, 10% above what was measured.
BYTES_AND_ERROR = {"nf4": (0.5625, 0.102), "int4": (0.5625, 0.113), "int8": (1.0625, 0.0066), "fp8": (1.0625, 0.0275)}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(96, 256), (3, 32, 128)])
def test_pack_and_unpack(name, shape):
    bytes_per_value, error = BYTES_AND_ERROR[name]
    weight = 0.02 * torch.randn(shape)
    packed = FORMATS[name].pack(weight, 64)
    unpacked = FORMATS[name].unpack(packed, 64, torch.float32)
    assert (packed.codes.nbytes + packed.scales.nbytes) / weight.numel() == bytes_per_value
    assert (unpacked - weight).norm() / weight.norm() < error
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(FORMATS[name].unpack(packed, 64, dtype), unpacked.to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_packed_alone_is_a_slice_of_the_whole(name):
    weight = torch.randn(8, 256)
    weight[:, 128:] *= 30  # a scale of the whole tensor would show
    whole, slice_ = FORMATS[name].pack(weight, 64), FORMATS[name].pack(weight[2:4, 64:128].contiguous(), 64)
    columns = whole.codes.shape[1] // 4
    assert torch.equal(whole.codes[2:4, columns : 2 * columns], slice_.codes)
    assert torch.equal(whole.scales[2:4, 1:2], slice_.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_stay_zeros(name):
    weight = torch.randn(4, 64)
    weight[1] = 0
    unpacked = FORMATS[name].unpack(FORMATS[name].pack(weight, 64), 64, torch.float32)
    assert unpacked.isfinite().all() and not unpacked[1].any()


def test_unknown_formats_and_block_sizes_are_named():
    with pytest.raises(QuantizationError, match=r"format='nf5': expected one of nf4, int8, int4, fp8"):
        weight_format("nf5", 64)
    with pytest.raises(QuantizationError, match=r"block_size=48: expected one of 32, 64"):
        weight_format("nf4", 48)
    for name, size in ((["nf4"], 64), ("nf4", 64.0)):
        with pytest.raises(QuantizationError, match=r"expected one of"):
            weight_format(name, size)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(QuantizationError, match=r"needs bitsandbytes.*pip install 'meshpeft\[quantization\]'"):
        FORMATS["nf4"].pack(torch.ones(1, 64), 64)
