"""Quantised bases: weights packed in few bits under the adapters, and adapters that start from what packing lost."""

from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import FormatName
from meshpeft.quantization.layers import KeptFactors, PackedLayer, packed_form
from meshpeft.quantization.quantize import (
    DEFAULT_EXCLUDED,
    BaseQuantizer,
    PackedSize,
    dequantize_base,
    forget_residuals,
    packed_size,
    quantize_base,
)
from meshpeft.quantization.starts import keep_starts, pissa_init, svdquant_init
from meshpeft.quantization.svd import LowRank, low_rank_part

__all__ = [
    "DEFAULT_EXCLUDED",
    "BaseQuantizer",
    "FormatName",
    "KeptFactors",
    "LowRank",
    "PackedLayer",
    "PackedSize",
    "QuantizationError",
    "dequantize_base",
    "forget_residuals",
    "keep_starts",
    "low_rank_part",
    "packed_form",
    "packed_size",
    "pissa_init",
    "quantize_base",
    "svdquant_init",
]
